"""Flows that run when it is time: a Prefect server says when, a process that stays runs them."""

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
    """Run the flow when it is time, unless it is still at work, until a signal ends this process.

    Args:
        flow: the flow.
        cron: when to run, as a cron line in UTC; else see ``interval``.
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
    """Run the block as a flow that was due, as `program` does for a command.

    Args:
        lock: what to hold.

    Raises:
        InputError: the input is at fault; the sentence is printed as well.
    """
    hide_what_is_told()
    try:
        with alone(lock):
            yield
    except InputError as error:
        print(f"error: {tell(error)}", file=sys.stderr, flush=True)
        raise


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

    try:
        deployment = flow.to_deployment(
            flow.name,
            cron=cron,
            interval=interval,
            parameters=chosen,
            # A run is due once however long it waits: no queue of what a pause has missed.
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
            # Of `prefect deploy`: changed into one that is served, it would lack its folder.
            client.delete_deployment(before.id)
    runner = Runner(flow.name, pause_on_shutdown=False)  # see `stay`
    made: Any = runner.add_deployment(deployment)
    when = f'at "{cron}" (UTC)' if cron else f"every {interval:g} s"
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
            await running  # which raises what has ended it
        async with get_client() as client:
            # First, as there may not be time for all. Prefect would leave a run that is being
            # started as it is, in the way of others for minutes.
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
                state: Any = Cancelled(message="The process that served it was ended.")
                await client.set_flow_run_state(each.id, state, force=True)

    # In the main thread Prefect would take SIGTERM for itself, and exit amid its event loop.
    with ThreadPoolExecutor(1) as pool:
        try:
            staying = pool.submit(asyncio.run, stay())
            staying.result()
        finally:
            ended.set()
