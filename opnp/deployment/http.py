"""Serving a detector over HTTP, in MLflow's protocol."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opnp.errors import InputError, first_line

__all__ = ["Latest", "serve"]

Latest = Callable[[], tuple[str, str]]
"""Tells the version that is to be served now, and the URI of its MLflow model."""

LOOK = 10.0  # seconds between two looks at what is to be served
SCORING = 600  # seconds that the answer to a request may take

log = logging.getLogger(__name__)


def serve(latest: Latest, host: str, port: int, max_bytes: int, follow: bool = False) -> None:
    """Answer MLflow's scoring protocol until stopped.

    Every answer states in the header ``opnp-version`` which version gave it. Connections whose
    requests do not come in time are closed; see `opnp.deployment.guard`.

    Args:
        latest: tells what to serve; see `opnp.deployment.mlflow_model` for the model.
        host: address to listen on; 127.0.0.1 admits this machine only.
        port: port to listen on.
        max_bytes: size in bytes above which a request is refused.
        follow: serve another version as soon as ``latest`` tells one, without a pause.

    Raises:
        InputError: the model cannot be loaded, or the port cannot be listened on.
    """
    import uvicorn

    from opnp.deployment.guard import Guarded, Timed

    listen(host, port).close()  # a port that is taken is told before work that takes seconds
    os.environ.setdefault("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", str(SCORING))
    version, uri = latest()
    guarded = Guarded(application(uri), max_bytes, version)
    ended = threading.Event()
    if follow:
        threading.Thread(target=watch, args=(guarded, latest, ended), daemon=True).start()
    listener = listen(host, port)
    server = uvicorn.Server(uvicorn.Config(guarded, host=host, port=port, http=Timed))
    try:
        server.run(sockets=[listener])
    finally:
        ended.set()


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address.

    Raises:
        InputError: another program listens there, or the address is none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InputError(
            f"The server cannot listen on {host}, port {port} ({reason}).", "port"
        ) from None


def application(uri: str) -> Any:
    """MLflow's application for a model.

    Raises:
        InputError: the model cannot be loaded.
    """
    from mlflow import pyfunc
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import scoring_server

    forget_code()
    try:
        return scoring_server.init(pyfunc.load_model(uri))
    except MlflowException as error:
        raise InputError(f"{uri} cannot be loaded ({first_line(error)}).") from None


def forget_code() -> None:
    """Forget the users' modules of models loaded before, so that the next one imports its own."""
    old = [path for path in sys.path if (Path(path).parent / "MLmodel").is_file()]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name.partition(".")[0] != "opnp" and file.startswith(tuple(f"{path}/" for path in old)):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path not in old]


def watch(guarded: Any, latest: Latest, ended: threading.Event) -> None:
    """Replace what is served whenever another version is the latest; what fails is tried again."""
    while not ended.wait(LOOK):
        try:
            version, uri = latest()
            if version != guarded.served[1]:
                guarded.served = application(uri), version
                log.warning("Version %s is served now.", version)
        except Exception as error:  # of MLflow, its store or the network: the old version stays
            log.warning("What is to be served could not be looked up (%s).", first_line(error))
