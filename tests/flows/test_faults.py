"""Runs that are killed, stopped, or lose a server, a lock or the disk: nothing is lost, no file is
half, and what is made in the end has the same bits."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pyarrow as pa
import pytest
from filelock import FileLock

from flows import dvc_repo, prefect_server, workers
from flows import process as program
from flows.features import features
from flows.sensitivity import sensitivity
from opnp.errors import InputError
from opnp.pipeline import parameters, stages
from opnp.pipeline.results import Run
from opnp.runtime.files import atomic, digest
from tests.conftest import HERE, ROOT, run_program, set_parameters
from tests.flows.test_pipeline import contents

Call = Callable[[Any], str]

# Many small shards of few images, and a search of seconds.
MANY: dict[str, Any] = {
    "features.shard_size": 32,
    "search.proxies": ["blobs", "phase"],
    "search.weights_low": [0],
    "search.weights_high": [0, 2],
    "search.neurons_low": [0, 10],
    "search.neurons_high": [0, 5],
    "search.bootstrap": 20,
    "evaluate.detectors": ["energy", "opnp"],
    "evaluate.bootstrap": 20,
}
LIMIT = 300.0  # seconds for whatever is waited for, on a machine that may be busy
# What a flow imports when it runs, which takes seconds in each process that has not yet.
LAZY = ["pandas", "torch._dynamo", "prefect.flow_engine", "prefect.task_engine"]
RESULTS = (HERE.sensitivity, HERE.clips, HERE.mask)


def shards() -> dict[Path, tuple[int, int]]:
    """Every shard and every sum of one that is there, with its inode and its time."""
    found = {}
    for path in Path("artifacts").glob("*/**/[0-9]*.[as]*"):
        status = path.stat()
        found[path] = (status.st_ino, status.st_mtime_ns)
    return found


def halves() -> list[Path]:
    return [*Path("artifacts").rglob("*.part")]


def wait_until(done: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start(*words: str, **env: str) -> "subprocess.Popen[str]":
    """A program of the pipeline, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(run: "subprocess.Popen[str]", shards: int) -> None:
    """Wait until a run in progress has written this many shards of features."""
    wait_until(lambda: made(HERE.features) >= shards or run.poll() is not None)
    assert run.poll() is None, run.communicate()


def divide(workspace: Path) -> None:
    """Take away a workspace's features, which are to come in many small shards."""
    set_parameters(workspace, MANY)
    for name in ("features", "sensitivity"):
        shutil.rmtree(workspace / "artifacts" / name)


@pytest.fixture
def many(workspace: Path) -> Path:
    """The workspace without features, which are to come in many small shards."""
    divide(workspace)
    return workspace


@pytest.fixture(scope="session")
def expected(finished: Path, common: Path) -> dict[Path, str]:
    """The digests of what an uninterrupted run in that workspace makes."""
    folder, file = common / "undisturbed", common / "undisturbed.json"
    with FileLock(common / "undisturbed.lock"), pytest.MonkeyPatch.context() as patch:
        if not file.exists():
            shutil.copytree(finished, folder, symlinks=True)
            divide(folder)
            patch.chdir(folder)
            file.write_text(json.dumps({str(path): of for path, of in finish().items()}))
    return {Path(path): of for path, of in json.loads(file.read_text()).items()}


def finish() -> dict[Path, str]:
    """Run what is left, as plain functions, and give the digests of the results."""
    chosen = parameters.load()
    for stage in (stages.features, stages.sensitivity, stages.search):
        stage.run(HERE, chosen)
    assert not halves()
    return {path: digest(path) for path in (*shards(), *RESULTS)}


def run_flow(folder: Path, url: str, name: str) -> None:
    """Run a flow in a workspace against a server, wherever this process is."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    os.chdir(folder)
    flow = {"features": features, "sensitivity": sensitivity}[name]
    with temporary_settings({PREFECT_API_URL: url}):
        workers.run(flow, HERE, parameters.load())


def made(folder: Path) -> int:
    return len([*folder.rglob("[0-9]*.[as]*")])


@pytest.mark.slow
def test_twenty_kills_cost_no_whole_shard_and_no_bit(
    expected: dict[Path, str], many: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are killed 14 times and sensitivity 6 times at random moments, with -9."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # which the server of forks does not inherit else
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.flows.test_faults", *LAZY])
    drawn, kept = random.Random(0), shards()
    for name, kills in (("features", 14), ("sensitivity", 6)):
        folder = Path("artifacts") / name
        total = len([path for path in expected if path.is_relative_to(folder)])
        for left in range(kills, 0, -1):
            before = made(folder)
            aim = before + drawn.randint(0, (total - before - 4) // (left + 1))
            process = context.Process(target=run_flow, args=(many, prefect_api, name))
            process.start()
            wait_until(lambda: made(folder) > aim or not process.is_alive())  # noqa: B023
            time.sleep(drawn.uniform(0, 0.02))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            found = shards()
            assert {path: found.get(path) for path in kept} == kept
            kept = found
        run_flow(many, prefect_api, name)
        found = shards()
        assert {path: found.get(path) for path in kept} == kept
        kept = found
    assert finish() == expected
    assert shards() == kept


@pytest.mark.slow
def test_signals_end_runs_in_a_sentence_and_the_next_goes_on(
    expected: dict[Path, str], many: Path, prefect_api: str
) -> None:
    kept = shards()
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        run = start("flows.features", PREFECT_API_URL=prefect_api)
        wait_for(run, len(kept) + 1)
        children = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(number)
        _, errors = run.communicate(timeout=LIMIT)
        assert run.returncode == code
        assert errors.splitlines()[-1] == "interrupted: run again to go on"
        assert "Traceback" not in errors
        assert not psutil.wait_procs(children, timeout=LIMIT)[1]
        assert not halves()
        found = shards()
        assert {path: found.get(path) for path in kept} == kept
        kept = found
    assert len(kept) < len(stages.features.plan(HERE, parameters.load()))
    assert finish() == expected
    assert {path: shards().get(path) for path in kept} == kept


def flip(path: Path) -> None:
    """Turn one bit of a file's last number, or text, as a disk may do."""
    data = bytearray(path.read_bytes())
    data[-1 if path.suffix == ".safetensors" else 3000] ^= 1
    path.write_bytes(data)


def relabel(path: Path, key: bytes, value: bytes) -> None:
    """Make a shard, whole as it is, say that it was made with something else."""
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    assert key in table.schema.metadata
    told = {**table.schema.metadata, key: value}
    with pa.ipc.new_file(path, table.schema.with_metadata(told)) as writer:
        writer.write_table(table.replace_schema_metadata(told))


def test_foreign_and_damaged_shards_are_refused_by_name_and_made_again(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By their own stage alone, which leaves the others as they are."""
    before, chosen = contents(workspace), parameters.load()
    half = chosen.features.model_copy(update={"dtype": "float16"})
    by_half = chosen.model_copy(update={"features": half})
    plan = {str(shard.path(HERE.features)): shard for shard in stages.features.plan(HERE, chosen)}
    where = str(HERE.features)
    search, flipped = stages.search.run, "is damaged (its checksum differs)"
    for name, later, spoil, said in (
        ("train/00001", stages.sensitivity.run, flip, flipped),
        ("validation/00000", search, flip, flipped),
        ("proxies/phase/00000", search, flip, flipped),
        ("ood/letters/00001", lambda *of: Run(*of).features("ood/letters"), flip, flipped),
        (
            "train/00001",
            stages.sensitivity.run,
            lambda path: relabel(path, b"preprocessing", b"{}"),
            "was made with another preprocessing",
        ),
        (
            "validation/00000",
            search,
            lambda path: relabel(path, b"backbone", b"another"),
            "was made with another backbone",
        ),
        (
            "train/00000",
            stages.sensitivity.run,
            lambda path: stages.features.compute(HERE, by_half, plan[str(path)]),
            "was made with another dtype",
        ),
    ):
        path = Path(f"{where}/{name}.arrow")
        kept = shards()
        spoil(path)
        with pytest.raises(InputError, match=re.escape(f"Shard {path} {said}.")) as refused:
            later(HERE, chosen)
        assert refused.value.about == "stage:features"
        caplog.clear()
        stages.features.run(HERE, chosen)
        assert (f"{path} is damaged and is made again" in caplog.text) == (spoil is flip)
        found = shards()
        assert {each for each in found if found[each] != kept[each]} == {path}
        assert contents(workspace) == before


def test_sums_and_weights_with_a_flipped_bit_are_never_used(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, kept, chosen = contents(workspace), shards(), parameters.load()
    sums = HERE.sensitivity.parent / "shards/00001.safetensors"
    flip(sums)
    with pytest.raises(InputError, match=f"{sums} is damaged"):
        stages.sensitivity.finish(HERE, stages.sensitivity.plan(HERE, chosen))
    stages.sensitivity.run(HERE, chosen)
    assert f"{sums} is damaged and is made again" in caplog.text
    found = shards()
    assert {each for each in found if found[each] != kept[each]} == {sums}
    assert contents(workspace) == before
    for path, later, stage in (
        (HERE.sensitivity, ("search", "report"), "sensitivity"),
        (HERE.mask, ("report",), "search"),
        (HERE.backbone, ("features",), "train"),
    ):
        whole = path.read_bytes()
        flip(path)
        sentence = f"{path} is damaged (its checksum differs)."
        for each in later:
            with pytest.raises(InputError, match=re.escape(sentence)) as refused:
                getattr(stages, each).run(HERE, chosen)
            assert refused.value.about == f"stage:{stage}"
        path.write_bytes(whole)
    assert contents(workspace) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_ends_in_the_same_sentence(
    workspace: Path, number: signal.Signals
) -> None:
    """They take seconds, and begin before the command has taken the workspace."""
    before = contents(workspace)
    run = start("flows.pipeline", PYTHONVERBOSE="1")
    assert run.stderr
    for line in run.stderr:
        if line.startswith("import 'torch._C'"):  # in the midst of them
            break
    run.send_signal(number)
    *_, last = run.communicate(timeout=LIMIT)[1].splitlines()
    assert run.returncode == 128 + number
    assert last == "interrupted: run again to go on"
    assert not program.LOCK.exists() or program.LOCK.read_text() == ""
    assert contents(workspace) == before


def test_a_second_run_names_the_first_and_a_dead_one_holds_nothing(
    workspace: Path, call: Call
) -> None:
    words = "import time; from flows.process import alone\nwith alone(): print(1); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-uc", words], stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"1\n"
    before = shards()
    message = call(features)
    assert message.startswith(f"error: Process {holder.pid} (python")
    assert "is at work in this workspace" in message
    assert ", since 20" in message
    assert shards() == before
    holder.kill()
    holder.wait()
    assert str(holder.pid) in program.LOCK.read_text()  # a dead name is left
    with program.alone():
        assert json.loads(program.LOCK.read_text())["pid"] == os.getpid()
    assert program.LOCK.read_text() == ""


@pytest.mark.slow
def test_of_two_pipelines_at_once_the_second_ends_and_the_first_finishes(
    many: Path, prefect_api: str
) -> None:
    """And `dvc repro` too; the first is halted meanwhile, so that they come in the midst of it."""
    trials = digest(HERE.trials)
    first = start("flows.pipeline", PREFECT_API_URL=prefect_api)
    wait_for(first, 5)
    first.send_signal(signal.SIGSTOP)
    before = contents(many)
    for words in (("python", "-m", "flows.pipeline"), ("dvc", "repro")):
        second = run_program(*words, cwd=many, env={"PREFECT_API_URL": prefect_api})
        assert second.returncode
        assert f"error: Process {first.pid} (python" in second.stderr
        assert "-m flows.pipeline, since 20" in second.stderr
        assert "Traceback" not in second.stderr
        assert contents(many) == before
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=LIMIT)
    assert first.returncode == 0, errors
    assert digest(HERE.trials) != trials  # of a smaller search
    assert run_program("dvc", "status", "--json", cwd=many).stdout.strip() == "{}"
    found = contents(many)
    for stage in (stages.features, stages.sensitivity, stages.search):
        stage.run(HERE, parameters.load())
    assert contents(many) == found


def test_a_number_used_again_is_not_taken_for_the_holder(workspace: Path) -> None:
    created = psutil.Process().create_time()
    for since, named in ((created - 1, False), (created + 1, True)):
        held = {"pid": os.getpid(), "command": "python", "since": since}
        program.LOCK.write_text(json.dumps(held))
        assert bool(program.holder()) == named


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder])
    if made.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_told_and_a_run_goes_on_after_room_was_made(
    expected: dict[Path, str], many: Path, small_disk: Path, call: Call
) -> None:
    HERE.features.symlink_to(small_disk)
    message = call(features)
    assert re.search(r"No space is left for .*artifacts/features/", message)
    assert "free some and run again" in message
    kept = {path: digest(path) for path in small_disk.rglob("*.arrow")}
    assert kept
    assert not [*small_disk.rglob("*.part")]
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    assert finish() == expected
    assert {path: digest(path) for path in kept} == kept


@pytest.mark.slow
def test_a_full_disk_of_the_cache_is_told_and_what_was_made_is_recorded_later(
    workspace: Path, small_disk: Path
) -> None:
    before = contents(workspace)
    cache = workspace / ".dvc/cache"
    shutil.rmtree(cache)
    cache.symlink_to(small_disk)
    # By a process of its own, since DVC says why on the standard streams that it began with.
    recording = (
        "from pathlib import Path; from flows import dvc_repo; "
        "from opnp.workspace import Workspace; dvc_repo.record(Workspace(Path()), 'features')"
    )
    done = run_program("python", "-c", recording, cwd=workspace)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr + done.stdout
    assert "DVC's cache could not take all outputs of features" in done.stderr
    assert dvc_repo.changed(HERE, "features")
    assert contents(workspace) == before
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    dvc_repo.record(HERE, "features")
    assert not dvc_repo.changed(HERE, "features")
    shutil.rmtree(HERE.features)
    done = run_program("dvc", "checkout", "features", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert contents(workspace) == before


@pytest.mark.parametrize("library", ["arrow", "parquet", "safetensors", "text"])
def test_every_library_tells_of_a_full_disk(small_disk: Path, library: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import save_file

    table = pa.table({"a": torch.rand(200_000).numpy()})
    path = small_disk / "file"

    def write(at: Path) -> None:
        if library == "arrow":
            with pa.ipc.new_file(at, table.schema) as writer:
                writer.write_table(table)
        elif library == "parquet":
            pq.write_table(table, at)
        elif library == "safetensors":
            save_file({"a": torch.zeros(200_000)}, at)
        else:
            at.write_text("x" * 10**6)

    with pytest.raises(InputError, match=f"No space is left for {path}"), atomic(path) as part:
        write(part)
    assert not [*small_disk.iterdir()]


@pytest.mark.slow
def test_a_server_that_was_killed_is_started_again(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own: at the same address, while the run goes on."""
    run = start("flows.features")
    wait_for(run, 5)
    [served] = [
        process
        for process in psutil.Process(run.pid).children()
        if "flows.prefect_server" in process.cmdline()
    ]
    served.kill()
    _, errors = run.communicate(timeout=LIMIT)
    assert run.returncode == 0, errors
    assert made(HERE.features) == len(stages.features.plan(HERE, parameters.load()))
    log = (prefect_server.LOGS / "prefect-server.log").read_text()
    addresses = [line for line in log.splitlines() if line.startswith("serving http")]
    assert len(addresses) == 2
    assert addresses[0] == addresses[1]


@pytest.fixture
def named_server(
    tmp_path: Path,
) -> Iterator[Callable[[int], tuple[str, "subprocess.Popen[bytes]"]]]:
    """Start a Prefect server on a port, 0 for any; its address and its process."""
    begun: list[subprocess.Popen[bytes]] = []

    def start_server(port: int = 0) -> tuple[str, "subprocess.Popen[bytes]"]:
        file = tmp_path / f"{len(begun)}.address"
        words = [
            sys.executable,
            "-m",
            "flows.prefect_server",
            str(os.getpid()),
            str(file),
            str(port),
        ]
        begun.append(subprocess.Popen(words, cwd=ROOT))
        wait_until(lambda: file.exists() or begun[-1].poll() is not None)
        return file.read_text(), begun[-1]

    yield start_server
    for process in begun:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_named_server_that_goes_away_in_mid_run(
    expected: dict[Path, str], many: Path, named_server: Any, comes_back: bool
) -> None:
    """One that comes back is waited for; else the run ends, and the next goes on."""
    url, served = named_server()
    retries = "6" if comes_back else "1"
    run = start("flows.features", PREFECT_API_URL=url, PREFECT_CLIENT_MAX_RETRIES=retries)
    wait_for(run, 5)
    served.kill()
    served.wait()
    kept = shards()
    if comes_back:
        again, _ = named_server(urlsplit(url).port)
        assert again == url
    _, errors = run.communicate(timeout=LIMIT)
    assert "Traceback" not in errors, errors
    if comes_back:
        assert run.returncode == 0, errors
        assert made(HERE.features) == len(stages.features.plan(HERE, parameters.load()))
    else:
        assert run.returncode == 1
        assert errors.splitlines()[-1].startswith(f"error: The Prefect server {url} went away")
        assert not halves()
    assert finish() == expected
    assert {path: shards().get(path) for path in kept} == kept
