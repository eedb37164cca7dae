"""A command of the pipeline as a program: alone in its workspace, and whatever ends it is told in
one sentence.

Nothing here saves anything: every file is whole or absent at any moment, so that a program that
ends early, or is killed, leaves what the next one goes on from.
"""

import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import psutil
from filelock import FileLock, Timeout

from flows import prefect_server, say_interrupted, workers
from opnp.cli.remedies import tell
from opnp.errors import InputError, UnavailableError
from opnp.pipeline import parameters, records
from opnp.pipeline.results import Run
from opnp.runtime.files import full_disk, write_json
from opnp.runtime.progress import track
from opnp.workspace import Workspace

__all__ = [
    "alone",
    "collect",
    "command",
    "hide_what_is_told",
    "program",
    "run_stage",
    "timed",
    "timings",
    "unless_bad_input",
]


LOCK = Path("logs/run.lock")
GRACE = 10.0  # seconds that tasks at work have to end in after a signal


class Stopped(BaseException):
    """SIGTERM came, as KeyboardInterrupt says of SIGINT."""


@contextmanager
def program(lock: Path | None = LOCK) -> Iterator[None]:
    """Run the block as the work of this process, alone in the workspace.

    Args:
        lock: what to hold, see `alone`; None: nothing.

    Raises:
        SystemExit: the input is at fault, the disk is full or the Prefect server gone (exit code 1,
            with a sentence); or SIGINT (130) or SIGTERM (143) came.
    """
    ended: str | int = 0
    try:
        with signals(), alone(lock) if lock else nullcontext():
            yield
    except InputError as error:
        ended = f"error: {tell(error)}"
    except (KeyboardInterrupt, Stopped) as error:
        ended = 128 + (signal.SIGTERM if isinstance(error, Stopped) else signal.SIGINT)
        say_interrupted()
    except Exception as error:
        reason = full_disk(error) or prefect_server.gone(error)
        if not reason:
            raise
        ended = f"error: {reason}"
    if prefect_server.lost():  # Prefect would try for hours to tell it what has run
        leave(ended)
    if ended:
        sys.exit(ended)


def leave(ended: str | int) -> NoReturn:
    """End this process and those it has started at once, whatever threads are at."""
    if isinstance(ended, str):
        print(ended, file=sys.stderr)
        ended = 1
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.terminate()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(ended)


@contextmanager
def signals() -> Iterator[None]:
    """Raise `KeyboardInterrupt` at SIGINT and `Stopped` at SIGTERM; end the process if they have
    not ended it in time.

    Python tells its handlers of a signal when the main thread comes to it, which a task at work may
    delay, and Prefect has handlers of its own; the descriptor is written to in any case.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        received = 0
        while received not in (signal.SIGINT, signal.SIGTERM):
            data = reader.recv(1)
            if not data:
                return
            received = data[0]
        reader.settimeout(GRACE)
        with suppress(TimeoutError):
            while data := reader.recv(1):
                if data[0] == signal.SIGINT == received:  # once more: at once
                    break
            else:
                return
        for part in Path().glob(f"artifacts/**/.*.{os.getpid()}.part"):
            part.unlink(missing_ok=True)
        say_interrupted()
        leave(128 + received)

    def stop(*_: Any) -> NoReturn:
        raise Stopped

    handlers = {signal.SIGTERM: stop}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a command in the background
        handlers[signal.SIGINT] = signal.default_int_handler
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in previous.items():
            signal.signal(number, handler)
        writer.close()
        watcher.join()
        reader.close()


@contextmanager
def alone(path: Path = LOCK) -> Iterator[None]:
    """Hold the workspace, so that no two runs mix their files.

    The lock is the system's, and goes with its process, however that ends. What the file says is
    only of use while its process lives.

    Args:
        path: the lock's file; another one is of work that may go on beside a run.

    Raises:
        InputError: another process holds it; the sentence names that process.
    """
    path.parent.mkdir(exist_ok=True)
    lock = FileLock(path)
    deadline = time.monotonic() + 2  # the holder may not have written its name yet
    while True:
        try:
            lock.acquire(blocking=False)
            break
        except Timeout:
            name = holder(path)
            if name or time.monotonic() > deadline:
                raise InputError(
                    f"{name or 'Another process'} is at work in this workspace: wait until it "
                    "ends, or stop it."
                ) from None
            time.sleep(0.05)
    try:
        words = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
        held = {"pid": os.getpid(), "command": shlex.join(words), "since": time.time()}
        path.write_text(json.dumps(held))
        yield
    finally:
        with suppress(OSError):
            path.write_text("")
        lock.release()


def holder(path: Path = LOCK) -> str | None:
    """The process that a lock's file names, if it lives and is the one that wrote it."""
    try:
        held = json.loads(path.read_text())
        if psutil.Process(held["pid"]).create_time() > held["since"]:
            return None  # a later process under the number of a dead one
        since = datetime.fromtimestamp(held["since"]).strftime("%Y-%m-%d %H:%M:%S")
        return f"Process {held['pid']} ({held['command']}, since {since})"
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


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


def command(name: str) -> None:
    """Run a command of `opnp` as ``python -m flows.NAME``, with the same options.

    Args:
        name: a stage, ``pipeline``, ``retrain`` or ``monitor``.
    """
    from opnp.cli.app import main

    words = {"pipeline": ["run"], "retrain": ["retrain"], "monitor": ["monitor"]}
    main(words.get(name, ["stage", name]), f"python -m flows.{name}")


def run_stage(name: str, **chosen: Any) -> None:
    """Run a stage as the work of this process, whether or not it is up to date.

    Args:
        name: the stage.
        chosen: more parameters of its flow.
    """
    flow = getattr(import_module("flows.stages"), name)
    hide_what_is_told()
    with program():
        workspace = Workspace(Path.cwd())
        parameters.complete(workspace.parameters)
        loaded = parameters.load(workspace.parameters)
        with prefect_server.running():
            timed(name, partial(workers.run, flow, workspace, loaded, **chosen))
        if name == "report" and "DVC_ROOT" in os.environ:
            # The last stage of `dvc repro`, which records no run itself as `pipeline` does.
            records.record_run(Run(workspace, loaded), timings())


def hide_what_is_told() -> None:
    """Keep Prefect from printing what the program tells in one sentence."""

    def keep(record: logging.LogRecord) -> bool:
        raised = record.exc_info[1] if record.exc_info else None
        if isinstance(raised, InputError) or (raised and prefect_server.gone(raised)):
            return False
        hidden = (
            "InputError",
            "Crash detected!",
            "state Crashed",
            "state Pending",  # of tasks that a flow which ends early leaves
            *prefect_server.GONE,
        )
        return not any(words in record.getMessage() for words in hidden)

    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(keep)
    # What they say of each single event while the server is away; Prefect's own loggers do not heed
    # their level.
    for name in ("prefect.events.clients", "prefect._internal.concurrency", "EventsWorker"):
        logging.getLogger(name).addFilter(critical)


def critical(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL
