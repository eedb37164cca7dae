"""The pipeline as Prefect flows: one module for each stage, and `pipeline` for all of them.

The tools are configured here, before any of them is imported; variables that are already set in
the environment win. No tool reports usage to anybody.
"""

import os
import signal
import sys
from typing import Any, NoReturn

from opnp.cli import logs
from opnp.runtime import malloc

malloc.keep()
logs.show()  # in the processes of workers too

for name, value in {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # Wait two minutes for a server that goes away, with pauses of 2, 4, … 64 seconds.
    "PREFECT_CLIENT_MAX_RETRIES": "6",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    # Notice a tracking server that is down in seconds, not minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}.items():
    os.environ.setdefault(name, value)


def say_interrupted() -> None:
    print("interrupted: run again to go on", file=sys.stderr, flush=True)


def end(number: int, _: Any) -> NoReturn:
    say_interrupted()
    os._exit(128 + number)


def take_signals() -> dict[int, Any]:
    """End with one line at a signal that comes before `flows.process` takes them.

    A command imports libraries for seconds until then.

    Returns:
        The handlers before.
    """
    handlers: dict[int, Any] = {
        each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)
    }
    for each, handler in handlers.items():
        if handler is not signal.SIG_IGN:  # as SIGINT of a command in the background
            signal.signal(each, end)
    return handlers


if sys.argv[0] == "-m":  # python -m flows.NAME
    take_signals()
