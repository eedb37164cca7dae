"""Flows on a schedule: a Prefect server says when to run, and a process that stays runs them."""

import asyncio
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flows import prefect_server
from flows.process import LOCK, alone, hide_what_is_told, program
from opnp.cli.remedies import tell
from opnp.errors import InputError
from opnp.pipeline import parameters

__all__ = ["due", "serve"]


def serve(flow: Any, cron: str | None, interval: float | None, **chosen: str) -> None:
    """Run the flow on a schedule until a signal ends this process.

    A run that is due while another is at work is cancelled.

    Args:
        flow: the flow.
        cron: when to run, as a cron line in UTC; None: see ``interval``.
        interval: seconds from one run to the next.
        chosen: parameters of the flow.

    Raises:
        SystemExit: the input is at fault, or a signal came.
    """
    with program(lock=None), prefect_server.running():  # each run holds the workspace itself
        parameters.load()
        run(flow, cron, interval, chosen)


@contextmanager
def due(lock: Path = LOCK) -> Iterator[None]:
    """Run the block as a scheduled flow, as `program` does for a command.

    Args:
        lock: lock file to hold.

    Raises:
        InputError: the input is at fault; the sentence is printed too.
    """
    hide_what_is_told()
    try:
        with alone(lock):
            yield
    except InputError as error:
        print(f"error: {tell(error)}", file=sys.stderr, flush=True)
        raise


def check_cron(cron: str | None) -> None:
    """Refuse a cron line that may mean two things.

    Prefect takes a sixth field for seconds, but reads it last; other programs read it first.

    Raises:
        InputError: it has not five fields, nor a name such as @daily.
    """
    fields = cron.split() if cron is not None else []
    if len(fields) > 5:
        raise InputError(
            f"--cron has {len(fields)} fields, {cron!r}: give five, minute, hour, day, month and "
            "day of the week; runs cannot be timed by the second."
        )


def next_runs(cron: str) -> str:
    """When the next three runs of a schedule in UTC are due."""
    from prefect.server.schemas.schedules import CronSchedule

    due = asyncio.run(CronSchedule(cron=cron, timezone="UTC").get_dates(3))
    return ", ".join(f"{time:%Y-%m-%d %H:%M}" for time in due)


def run(flow: Any, cron: str | None, interval: float | None, chosen: dict[str, str]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import (
        ConcurrencyLimitConfig,
        ConcurrencyLimitStrategy,
        StateType,
    )
    from prefect.exceptions import ObjectNotFound
    from prefect.runner import Runner
    from prefect.states import Cancelled

    check_cron(cron)
    try:
        deployment = flow.to_deployment(
            flow.name,
            cron=cron,
            interval=interval,
            parameters=chosen,
            # Do not queue the runs that were missed while the schedule was paused.
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
            ),
        )
    except ValueError:
        raise InputError(
            f'--cron is not a schedule: {cron!r}; "0 2 * * *" is every night at two.'
        ) from None
    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        before = client.read_deployment_by_name(f"{flow.name}/{flow.name}")
        if before.work_pool_name:
            # `prefect deploy` made it: served from here, it would lack its folder.
            client.delete_deployment(before.id)
    runner = Runner(flow.name, pause_on_shutdown=False)  # see `stay`
    made: Any = runner.add_deployment(deployment)
    when = f'at "{cron}" (UTC; next {next_runs(cron)})' if cron else f"every {interval:g} s"
    print(
        f"{flow.name} is served and runs {when}; "
        f"`prefect deployment run {flow.name}/{flow.name}` runs it now",
        flush=True,
    )
    ended = threading.Event()

    async def stay() -> None:
        running = asyncio.create_task(runner.start())
        told = asyncio.create_task(asyncio.to_thread(ended.wait))
        await asyncio.wait([running, told], return_when=asyncio.FIRST_COMPLETED)
        if not ended.is_set():
            ended.set()
            await running  # raises the error that ended it
        async with get_client() as client:
            # This comes first, since there may not be time for everything. Prefect would leave a
            # run that is just starting as it is, and it would block others for minutes.
            await client.pause_deployment(made)
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            for each in await client.read_flow_runs(
                deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[made])),
                flow_run_filter=FlowRunFilter(
                    state=FlowRunFilterState(
                        type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING])
                    )
                ),
            ):
                state: Any = Cancelled(message="The process that served it has ended.")
                await client.set_flow_run_state(each.id, state, force=True)

    # In the main thread Prefect would handle SIGTERM itself and exit within its event loop.
    with ThreadPoolExecutor(1) as pool:
        try:
            staying = pool.submit(asyncio.run, stay())
            staying.result()
        finally:
            ended.set()
