"""Who computes the shards of a flow: threads, processes, or the workers of a Dask cluster.

What is computed does not depend on it. Only flows whose work is divided into shards use such
workers; the others work in this process, and fetch in threads of it: its sources are folders and
the network of this machine.
"""

import hashlib
import os
import platform
import tempfile
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import opnp
from flows import prefect_server
from opnp.errors import InputError
from opnp.pipeline.parameters import Engine, Parameters
from opnp.workspace import Workspace

__all__ = ["run", "task_runner"]

SHARDED = ("features", "sensitivity")
ATTEMPTS = 3  # at a flow whose processes die
ANSWER_LIMIT = 5.0  # seconds for a Dask scheduler to answer

# What runs is what was there when this process started, whatever lies there now: a worker that
# outlives a change of the code would write shards of the old code under the name of the new.
SOURCES = sorted(
    path
    for folder in (Path(opnp.__file__).parent, Path(__file__).parent)
    for path in folder.rglob("*.py")
)
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:12]


def run(flow: Any, workspace: Workspace, parameters: Parameters, **chosen: Any) -> None:
    """Run a stage's flow on the workers that the parameters ask for.

    A flow whose processes die goes on with new ones: shards that are whole stay.

    Args:
        flow: the flow.
        workspace: of the run.
        parameters: of the run.
        chosen: more parameters of the flow.

    Raises:
        InputError: see `task_runner`; or workers die again and again.
    """
    settings = parameters.engine
    if flow.name not in SHARDED:
        flow.with_options(task_runner=threads(settings))(workspace, parameters, **chosen)
        return
    sharded = flow.with_options(task_runner=task_runner(workspace, settings))
    for attempt in range(1, ATTEMPTS + 1):
        prefect_server.share_gpus(count(settings))
        try:
            sharded(workspace, parameters, **chosen)
            return
        except BrokenProcessPool:
            if attempt == ATTEMPTS:
                raise InputError(
                    f"Processes of {flow.name} died {ATTEMPTS} times, perhaps for lack of memory: "
                    "lower engine.workers or features.batch_size."
                ) from None
            print(f"{flow.name}: a process died; what it had not finished is done again")
        except Exception as error:
            if type(error).__name__ != "KilledWorker":  # of Dask, which may not be installed
                raise
            raise InputError(
                f"Dask gave up {flow.name}: {error.allowed_failures + 1} workers died over the "  # type: ignore[attr-defined]
                "same shard, perhaps for lack of memory: see their logs, or lower "
                "features.batch_size."
            ) from error


def task_runner(workspace: Workspace, settings: Engine) -> Any:
    """The Prefect task runner of these settings.

    Args:
        workspace: of the run, which workers must reach unless they exchange files in a storage.
        settings: of the engine.

    Raises:
        InputError: Dask is not installed, its scheduler does not answer, or its workers cannot do
            this run's work.
    """
    if settings.runner == "threads":
        return threads(settings)
    if settings.runner == "processes":
        from prefect.task_runners import ProcessPoolTaskRunner

        return ProcessPoolTaskRunner(count(settings), [forwarding()])
    try:
        import prefect_dask.task_runners
    except ImportError:
        raise InputError(
            "engine.runner is dask, which is not installed: pip install 'opnp[dask]'."
        ) from None
    if settings.scheduler is None:
        cluster = {
            "n_workers": count(settings),
            "threads_per_worker": 1,
            "memory_limit": None,  # else each gets a core's share of the memory, and dies beyond it
            "dashboard_address": "127.0.0.1:0",
        }
        return prefect_dask.task_runners.DaskTaskRunner(cluster_kwargs=cluster)
    check_cluster(workspace, settings)
    return prefect_dask.task_runners.DaskTaskRunner(
        address=settings.scheduler, client_kwargs={"timeout": ANSWER_LIMIT}
    )


def forwarding() -> Any:
    """What makes the thread that forwards the reports of processes know the run's server.

    It begins without the settings of the thread that starts it, and would start another server.
    """
    from prefect.context import SettingsContext, get_settings_context

    now = get_settings_context()
    profile, settings = now.profile, now.settings

    def enter() -> Any:
        SettingsContext(profile=profile, settings=settings).__enter__()
        return lambda kind, message: (kind, message)

    return enter


def threads(settings: Engine) -> Any:
    from prefect.task_runners import ThreadPoolTaskRunner

    return ThreadPoolTaskRunner(max_workers=count(settings))


def count(settings: Engine) -> int:
    """How many workers of this machine there are."""
    import torch

    return settings.workers or torch.cuda.device_count() or os.cpu_count() or 1


def check_cluster(workspace: Workspace, settings: Engine) -> None:
    """See that a Dask cluster is there, and that its workers can do this run's work.

    Raises:
        InputError: they cannot; the sentence says why.
    """
    from distributed import Client
    from prefect.settings import PREFECT_API_URL

    address = str(settings.scheduler)
    api = PREFECT_API_URL.value()
    if api and is_here(api) and not is_here(address):
        raise InputError(
            f"The workers of {address} cannot reach the Prefect server of this run, {api}: name "
            "one that they reach in PREFECT_API_URL, or use a scheduler on this machine."
        )
    try:
        client = Client(address, timeout=ANSWER_LIMIT, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"No Dask scheduler answers at engine.scheduler {address} ({reason}): start it, or "
            "correct the address."
        ) from None
    with client, tempfile.NamedTemporaryFile(dir=workspace.root, prefix=".opnp-") as mark:
        found = client.run(installed, mark.name, on_error="return")
        mine = installed(mark.name)
        if settings.storage is not None:
            mine.pop(FOLDER)
        if not found:
            print(f"engine: {address} has no workers yet; the run waits for one", flush=True)
    for worker, its in found.items():
        if isinstance(its, Exception):
            raise InputError(
                f"Dask worker {worker} cannot run opnp ({type(its).__name__}: {its}): install "
                f"opnp {opnp.__version__} where it runs."
            )
        for what, value in mine.items():
            if its[what] == value:
                continue
            if what == FOLDER:
                raise InputError(
                    f"Dask worker {worker} does not see the folder {workspace.root}: start it on a "
                    "machine that does, or name a place in engine.storage."
                )
            raise InputError(
                f"Dask worker {worker} has {what} {its[what]} where this run has {value}: give "
                "both the same, and start the worker again."
            )


FOLDER = "folder"


def installed(mark: str) -> dict[str, str]:
    """What this process runs, and whether it sees the file ``mark``."""
    versions = {name: metadata.version(name).split("+")[0] for name in ("torch", "prefect")}
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "opnp": opnp.__version__,
        "the code of opnp": CODE,
        **versions,
        FOLDER: str(Path(mark).exists()),
    }


def is_here(url: str) -> bool:
    """Whether a URL is of this machine's loopback."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
