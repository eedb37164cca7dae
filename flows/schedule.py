"""Flows that run when it is time: a Prefect server says when, a process that stays runs them."""

import argparse
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

__all__ = ["due", "options", "serve"]


def options(parser: argparse.ArgumentParser) -> None:
    """Let a command be given ``--serve`` and when to run."""
    parser.add_argument("--serve", action="store_true", help="stay, and run when it is time")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--cron", help='when, as "0 2 * * *", in UTC')
    when.add_argument("--interval", type=float, help="seconds from one run to the next")


def serve(parser: argparse.ArgumentParser, given: argparse.Namespace, flow: Any) -> bool:
    """Run the flow when it is time, unless it is still at work, until a signal ends this process.

    Args:
        parser: of the command, with `options`.
        given: what it has parsed; what is not of `options` are parameters of the flow.
        flow: the flow.

    Returns:
        False at once where ``--serve`` is not given.

    Raises:
        SystemExit: the options do not go together, the input is at fault, or a signal came.
    """
    chosen = vars(given).copy()
    asked, cron, interval = (chosen.pop(each) for each in ("serve", "cron", "interval"))
    if not asked:
        if cron is not None or interval is not None:
            parser.error("--cron and --interval are of --serve")
        return False
    if cron is None and interval is None:
        parser.error("--serve needs --cron or --interval")
    if interval is not None and not 0 < interval < float("inf"):
        parser.error("--interval is a number of seconds above 0")
    if not prefect_server.named():
        parser.error("--serve needs a Prefect server: name it in PREFECT_API_URL")
    with program(lock=None), prefect_server.running():  # the workspace is each run's
        parameters.load()
        run(flow, cron, interval, {name: str(value) for name, value in chosen.items()})
    return True


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
            f'--cron is no schedule: {cron!r}; "0 2 * * *" is every night at two.'
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
