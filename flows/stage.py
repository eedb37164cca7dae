"""What every stage's command has in common."""

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flows import engine, server
from flows.program import program
from opnp import parameters
from opnp.errors import InputError, UnavailableError
from opnp.files import write_json
from opnp.progress import track

__all__ = [
    "collect",
    "command",
    "hide_what_is_told",
    "timed",
    "timings",
    "unless_bad_input",
]

TIMINGS = Path("logs/timings.json")


def unless_bad_input(task: Any, run: Any, state: Any) -> bool:
    """Retry a task, except where the input is at fault: it would fail again."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, UnavailableError) or not isinstance(error, InputError)


def collect(futures: Iterable[Any], description: str, total: int) -> Iterator[Any]:
    """The results of mapped tasks in order, showing how many are done."""
    for future in track(futures, description, total):
        yield future.result()


def timed(name: str, stage: Callable[[], Any]) -> float:
    """Run a stage and note how many seconds it took, outside the artifacts, which hold no times."""
    start = time.monotonic()
    stage()
    seconds = round(time.monotonic() - start, 3)
    write_json(TIMINGS, {**timings(), name: seconds})
    return seconds


def timings() -> dict[str, float]:
    """Wall time in seconds of each stage, when it last ran here."""
    try:
        return dict(json.loads(TIMINGS.read_text()))
    except (OSError, ValueError):
        return {}


def command(stage: Any, **flags: str) -> None:
    """Run a stage's flow as a program: one sentence and exit code 1 if the input is at fault.

    Args:
        stage: the flow.
        flags: boolean parameters of the flow that are options of the program, with their help.
    """
    summary = stage.__doc__.splitlines()[0]
    parser = argparse.ArgumentParser(f"python -m flows.{stage.__name__}", description=summary)
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    chosen = vars(parser.parse_args())
    hide_what_is_told()
    with program():
        loaded = parameters.load()
        with server.running():
            timed(stage.__name__, partial(engine.run, stage, loaded, **chosen))


def hide_what_is_told() -> None:
    """Keep Prefect from printing what the program tells in one sentence."""

    def keep(record: logging.LogRecord) -> bool:
        raised = record.exc_info[1] if record.exc_info else None
        if isinstance(raised, InputError) or (raised and server.gone(raised)):
            return False
        hidden = ("InputError", "Crash detected!", "state Crashed", *server.GONE)
        return not any(words in record.getMessage() for words in hidden)

    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(keep)
    # What they say of each single event while the server is away.
    for name in ("prefect.events.clients", "prefect._internal.concurrency", "EventsWorker"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
