"""Who computes the shards makes no difference to them, nor does a worker that dies over one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.concurrency import services
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

import opnp
from flows import workers
from opnp.errors import InputError
from opnp.pipeline import parameters, stages
from opnp.pipeline.parameters import Engine, Parameters
from opnp.workspace import Workspace
from tests.conftest import HERE, ROOT
from tests.flows.test_pipeline import contents

# Made again in the tests below; all other shards stay.
LOST = ("train", "test", "ood/letters", "proxies/phase")

# Runs at the start of every process that finds it on its path. The first process that has computed
# a certain shard keeps it until it is killed; every file that is written is noted, with the process
# and how often that has loaded the backbone.
WATCH = """
import os, sys, threading
from contextlib import contextmanager

from opnp.runtime import files

FOLDER = os.path.dirname(__file__)
atomic = files.atomic


@contextmanager
def watched(path):
    if str(path).endswith("train/00001.arrow"):
        try:
            with open(f"{FOLDER}/held", "x") as file:
                file.write(f"{os.getpid()}\\n")
            threading.Event().wait()
        except FileExistsError:
            pass
    with atomic(path) as temporary:
        yield temporary
    loads = sys.modules["opnp.pipeline.results.backbone"].on_device.cache_info().misses
    with open(f"{FOLDER}/written", "a") as file:
        file.write(f"{os.getpid()} {loads} {path}\\n")


files.atomic = watched
"""


def until(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """Wait until ``condition`` gives something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)
    return found


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `WATCH`, which processes that are started from now on obey."""
    folder = tmp_path / "watch"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCH)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    return folder


@contextmanager
def killed_in_mid_shard(watch: Path) -> Iterator[list[int]]:
    """Kill the process that holds a shard as soon as there is one; its number is in the list."""
    killed: list[int] = []

    def kill() -> None:
        held = watch / "held"
        killed.append(int(until(lambda: held.exists() and held.read_text())))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    yield killed
    killer.join()


def lose_shards() -> set[str]:
    """Remove some shards of features; their paths."""
    lost = [path for split in LOST for path in Path(f"artifacts/features/{split}").glob("*.arrow")]
    for path in lost:
        path.unlink()
    assert len(lost) == 8
    return {str(path) for path in lost}


def chosen(**settings: Any) -> Parameters:
    """The parameters of the workspace with this engine."""
    return parameters.load().model_copy(update={"engine": Engine(**settings)})


def check_written(watch: Path, lost: set[str], processes: int) -> None:
    """Every lost shard was written once and no other, by processes that loaded one backbone."""
    lines = [line.split() for line in (watch / "written").read_text().splitlines()]
    shards = [path for _, _, path in lines if path.endswith(".arrow")]
    assert sorted(shards) == sorted(lost)
    assert len({process for process, _, _ in lines}) <= processes
    assert {loads for _, loads, path in lines if path.endswith(".arrow")} == {"1"}


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Dask scheduler, which may be slow on a machine that is busy."""
    monkeypatch.setattr(workers, "ANSWER_LIMIT", 120.0)
    file = tmp_path / "scheduler.json"
    words = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    with started("scheduler", *words, log=tmp_path / "scheduler.log"):
        yield json.loads(until(lambda: file.exists() and file.read_text()))["address"]


@contextmanager
def started(
    *words: str, log: Path, folder: Path | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A Dask command in a folder, else the current one, ended with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *words], cwd=folder, stdout=output, stderr=output
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def worker(scheduler: str, name: str, log: Path, folder: Path | None = None) -> Any:
    words = ("--nworkers", "1", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--name", name)
    return started("worker", scheduler, *words, "--memory-limit", "0", log=log, folder=folder)


def wait_for_workers(scheduler: str, number: int) -> None:
    from distributed import Client

    with Client(scheduler, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        client.wait_for_workers(number, timeout=300)


@pytest.mark.slow
def test_dask_goes_on_when_a_worker_is_killed_in_mid_shard(
    workspace: Path, prefect_api: str, scheduler: str, watch: Path, tmp_path: Path
) -> None:
    """And makes the same bits as threads, which have made what was there before."""
    from flows.features import features
    from flows.sensitivity import sensitivity

    before, lost = contents(workspace), lose_shards()
    asked = chosen(runner="dask", scheduler=scheduler)
    with (
        worker(scheduler, "a", tmp_path / "a.log") as a,
        worker(scheduler, "b", tmp_path / "b.log") as b,
    ):
        wait_for_workers(scheduler, 2)
        with killed_in_mid_shard(watch) as killed:
            workers.run(features, HERE, asked)
        assert set(killed) < {a.pid, b.pid}
        shutil.rmtree("artifacts/sensitivity")
        workers.run(sensitivity, HERE, asked)
    assert contents(workspace) == before
    check_written(watch, lost, processes=2)


@pytest.mark.slow
def test_processes_go_on_when_one_is_killed_in_mid_shard(
    workspace: Path, prefect_api: str, watch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a new pool, and make the same bits as threads."""
    from flows.features import features

    before, lost = contents(workspace), lose_shards()
    with killed_in_mid_shard(watch) as killed:
        workers.run(features, HERE, chosen(runner="processes", workers=1))
    assert len(killed) == 1
    assert capsys.readouterr().out.count("features: a process died") == 1
    assert contents(workspace) == before
    check_written(watch, lost, processes=2)


@pytest.mark.slow
def test_a_dask_cluster_of_this_machine_lasts_as_long_as_the_flow(prefect_api: str) -> None:
    @task
    def where() -> tuple[int, str]:
        return os.getpid(), str(Path.cwd())

    @flow
    def places() -> set[tuple[int, str]]:
        return {future.result() for future in [where.submit(), where.submit()]}

    runner = workers.task_runner(HERE, Engine(runner="dask", workers=1))
    ((process, folder),) = places.with_options(task_runner=runner)()
    assert process != os.getpid()
    assert folder == str(Path.cwd())
    until(lambda: not Path(f"/proc/{process}").exists())


def test_no_more_shards_at_once_than_the_tag_has_slots(
    workspace: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server lends the tag `gpu` once; two threads that want it take turns."""
    from flows.sensitivity import sensitivity

    before, shard, spans = contents(workspace), stages.sensitivity.compute, []
    shutil.rmtree("artifacts/sensitivity")

    def timed(*arguments: Any) -> bool:
        start = time.monotonic()
        computed = shard(*arguments)
        spans.append((start, time.monotonic(), threading.get_ident()))
        return computed

    monkeypatch.setattr(stages.sensitivity, "compute", timed)
    with get_client(sync_client=True) as client:
        client.create_concurrency_limit("gpu", 1)
        services._no_limits_cache.clear()  # of the flows before: it is kept for seconds
        try:
            workers.run(sensitivity, HERE, chosen(workers=2))
        finally:
            client.delete_concurrency_limit_by_tag("gpu")
    assert contents(workspace) == before
    assert len(spans) == 3
    assert len({thread for _, _, thread in spans}) == 2
    for (_, end, _), (start, _, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        assert end <= start


def test_workers_are_stated_or_counted() -> None:
    stated = workers.task_runner(HERE, Engine(workers=3))
    assert isinstance(stated, ThreadPoolTaskRunner)
    assert stated._max_workers == 3
    assert workers.task_runner(HERE, Engine())._max_workers >= 1
    processes = workers.task_runner(HERE, Engine(runner="processes", workers=2))
    assert isinstance(processes, ProcessPoolTaskRunner)
    assert processes._max_workers == 2


def test_dask_is_asked_for_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with pytest.raises(InputError, match=r"pip install 'opnp\[dask\]'"):
        workers.task_runner(HERE, Engine(runner="dask"))


def test_a_scheduler_that_does_not_answer_is_refused_in_seconds() -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"engine\.scheduler tcp://127\.0\.0\.1:9 "):
        workers.task_runner(HERE, Engine(runner="dask", scheduler="tcp://127.0.0.1:9"))
    assert time.monotonic() - start < 20


def test_workers_elsewhere_need_a_server_that_they_reach(prefect_api: str) -> None:
    with pytest.raises(InputError, match=r"192\.0\.2\.1:8786 cannot reach .* in PREFECT_API_URL"):
        workers.task_runner(HERE, Engine(runner="dask", scheduler="tcp://192.0.2.1:8786"))


def test_workers_with_another_opnp_or_without_the_workspace_are_refused(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    for name in ("opnp", "flows"):
        for source in (*(ROOT / name).rglob("*.py"), *(ROOT / name).rglob("*.pyi")):
            target = other / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source.read_text().replace(opnp.__version__, "0.0.1"))
    settings = Engine(runner="dask", scheduler=scheduler)
    with worker(scheduler, "other", tmp_path / "other.log", other):  # which it imports from
        wait_for_workers(scheduler, 1)
        with pytest.raises(InputError, match=rf"has opnp 0\.0\.1 .* has {opnp.__version__}:"):
            workers.task_runner(HERE, settings)
    monkeypatch.chdir(tmp_path)
    with worker(scheduler, "astray", tmp_path / "astray.log", ROOT):
        wait_for_workers(scheduler, 1)
        workers.task_runner(Workspace(tmp_path), settings)
        unseen = Workspace(Path("/proc/self/cwd"))  # which is another folder to each process
        with pytest.raises(InputError, match=r"does not see the folder .*engine\.storage"):
            workers.task_runner(unseen, settings)
        elsewhere = settings.model_copy(update={"storage": "memory://shards"})
        workers.task_runner(unseen, elsewhere)
