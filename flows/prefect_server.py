"""One Prefect server for a whole run.

If PREFECT_API_URL or the Prefect profile names a server, the run uses that one. Otherwise the run
starts a server that ends with it. A run is this process or, under ``dvc repro``, the DVC process
above it, so that all its stages share one server instead of each waiting for its own.

``python -m flows.prefect_server PID FILE PORT`` is that server: it writes its address to FILE and
ends when the process PID does. If it ends earlier, the run starts it again.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from opnp.errors import InputError
from opnp.runtime.files import atomic

__all__ = ["running", "share_gpus", "start"]

LOGS = Path("logs")
ANSWER_LIMIT = 60.0  # seconds for a server to answer, on a machine that may be busy
START_LIMIT = 180.0  # seconds; a first start also creates Prefect's database


def owner() -> int:
    """The process with which the run ends."""
    if "DVC_ROOT" in os.environ:
        for ancestor in psutil.Process().parents():
            try:
                if any(Path(word).name == "dvc" for word in ancestor.cmdline()[:3]):
                    return ancestor.pid
            except psutil.Error:
                continue
    return os.getpid()


def address_file(pid: int) -> Path:
    return LOGS / f"prefect-server-{pid}.address"


def start() -> None:
    """Start the run's server unless it has one or another is named; do not wait for it."""
    file = address_file(owner())
    if named() or owner() in started or (file.exists() and answers(file.read_text())):
        return
    file.unlink(missing_ok=True)  # left by a killed server whose owner had the same process number
    launch()


def launch(port: int = 0) -> None:
    """Start a server for the run on a port; 0 means any free port."""
    words = map(str, (owner(), address_file(owner()), port))
    LOGS.mkdir(exist_ok=True)
    with open(LOGS / "prefect-server.log", "a") as log:
        started[owner()] = subprocess.Popen(
            [sys.executable, "-m", "flows.prefect_server", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


started: dict[int, "subprocess.Popen[bytes]"] = {}


def named() -> str | None:
    """The URL of the server that the environment or the Prefect profile names."""
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value()


def answers(url: str) -> bool:
    """Whether a server answers at ``url``, no matter what it says."""
    return asked(url) is not None


def asked(url: str) -> int | None:
    """The status with which a server answers at ``url``; None if none does."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=ANSWER_LIMIT) as answer:
            # Prefect says true; its user interface answers any address with a page.
            return int(answer.status) if answer.read(10).strip() == b"true" else 404
    except urllib.error.HTTPError as error:
        return int(error.code)
    except (OSError, ValueError, HTTPException):
        return None


def check_named(url: str) -> None:
    """Refuse a named server that cannot be used.

    A server that wants to know who asks (401, 403) is left to Prefect, which tells it.

    Raises:
        InputError: none answers, it is no API of Prefect, or it fails.
    """
    status = asked(url)
    if status is None:
        raise InputError(
            f"No Prefect server answers at {url}: start it, or unset PREFECT_API_URL (or the "
            "profile's) for a temporary one."
        )
    if status == 404:
        api = f"{url.rstrip('/').removesuffix('/api')}/api"
        raise InputError(
            f"{url} is not the API of a Prefect server: set PREFECT_API_URL to "
            f"{api if api != url.rstrip('/') else 'its address, which ends with /api'}."
        )
    if status >= 500:
        raise InputError(
            f"The Prefect server at {url} fails (it answers with status {status}): look at its "
            "log, or unset PREFECT_API_URL (or the profile's) for a temporary one."
        )


@contextmanager
def running() -> Iterator[None]:
    """Run the block against the run's Prefect server.

    Raises:
        InputError: the server did not start, or the named one cannot be used.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if url := named():
        check_named(url)
        used.append(url)
        yield
        return
    start()
    url, ended = address(), threading.Event()
    used.append(url)
    keeper = threading.Thread(target=keep, args=(url, ended), daemon=True)
    keeper.start()
    try:
        with temporary_settings({PREFECT_API_URL: url}):
            yield
    finally:
        ended.set()
        keeper.join()


def keep(url: str, ended: threading.Event) -> None:
    """Restart the server at the same address whenever it has died; Prefect waits meanwhile."""
    while not ended.wait(1):
        process = started.get(owner())
        if process and process.poll() is None:
            continue
        try:
            connect(url)
        except ConnectionRefusedError:
            launch(port_of(url))
        except OSError:
            continue


def connect(url: str) -> None:
    """Connect to a server, which works even if it is slow to answer.

    Raises:
        OSError: nothing listens there.
    """
    socket.create_connection((str(urlsplit(url).hostname), port_of(url)), timeout=10).close()


def port_of(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


used: list[str] = []  # the addresses of servers, latest last

GONE = ("ConnectError", "All connection attempts failed")


def gone(error: BaseException) -> str | None:
    """The sentence for an error that means the Prefect server went away; None for others."""
    import httpx

    cause: BaseException | None = error  # as of a task that was refused a slot
    while not isinstance(cause, httpx.TransportError):
        if cause is None:
            return None
        cause = cause.__cause__
    return (
        f"The Prefect server {named() or 'of this run'} went away and did not come back in time: "
        "start it and run again to continue from here."
    )


def lost() -> bool:
    """Whether the server that this process used is gone; a slow server is not."""
    try:
        if used:
            connect(used[-1])
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


def address() -> str:
    """Wait for the run's server and return the URL of its API."""
    file, process = address_file(owner()), started.get(owner())
    deadline = time.monotonic() + START_LIMIT
    while not file.exists():
        if time.monotonic() > deadline or (process and process.poll() is not None):
            raise InputError(
                f"The Prefect server did not start: see {LOGS / 'prefect-server.log'}, or name a "
                "running one in PREFECT_API_URL."
            )
        time.sleep(0.1)
    return file.read_text()


def share_gpus(workers: int) -> None:
    """Run at most one task tagged `gpu` for each GPU at once, if the server belongs to the run.

    A limit costs each task about two seconds on a server that keeps its state in SQLite, which
    refuses simultaneous requests; so it is set only if workers outnumber the GPUs. It is set anew
    each time, since tasks that were killed still hold their slots. A named server is left to its
    administrator.

    Args:
        workers: number of workers on this machine.
    """
    file = address_file(owner())
    if not file.exists() or file.read_text() != named():
        return
    import torch
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        with suppress(ObjectNotFound):
            client.delete_concurrency_limit_by_tag("gpu")
        if 0 < (gpus := torch.cuda.device_count()) < workers:
            client.create_concurrency_limit("gpu", gpus)


def serve(pid: int, file: Path, port: int) -> None:
    """Serve Prefect's API on a port of loopback (0: any) until the process ``pid`` ends."""
    # Like Prefect's own temporary servers: no user interface, no background services.
    os.environ |= {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        # A task that waits for a GPU asks again within a second, not after ten.
        "PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS": "0.5",
        "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "5",
    }
    import uvicorn
    from prefect.server.services.perpetual_services import get_perpetual_services
    from prefect.server.services.repossessor import monitor_expired_leases

    for service in get_perpetual_services():
        # Frees the GPU of a worker that died, after a minute, for the worker that replaces it.
        service.run_in_ephemeral |= service.function is monitor_expired_leases

    listener = socket.create_server(("127.0.0.1", port))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=5,  # seconds to wait for connections that clients left open
    )
    server = uvicorn.Server(config)

    def watch() -> None:
        while not server.started and psutil.pid_exists(pid):
            time.sleep(0.05)
        print(f"serving {url} until process {pid} ends", flush=True)
        with atomic(file) as temporary:
            temporary.write_text(url)
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait()
        server.should_exit = True

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        server.run(sockets=[listener])
    finally:
        file.unlink(missing_ok=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
