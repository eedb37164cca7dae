"""Files exchanged through storage: on disk, in memory, and on a real S3 server over HTTP."""

import io
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opnp.backbones.shards import Shard
from opnp.data import imagesets
from opnp.errors import InputError, UnavailableError
from opnp.pipeline import parameters
from opnp.pipeline.parameters import Parameters
from opnp.runtime.files import digest
from opnp.runtime.storage import Storage
from tests.conftest import HERE, run_program, set_parameters

ROOT_KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of an S3 server on a free port of loopback, which this environment names."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sys.executable).parent / "moto_server"
    process = subprocess.Popen(
        [program, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/moto-api/", timeout=10).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            **ROOT_KEYS,
            "AWS_ENDPOINT_URL_S3": url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        yield url
    process.terminate()
    process.wait()


@pytest.fixture
def bucket(server: str, request: pytest.FixtureRequest) -> str:
    """The URL of an empty bucket on the S3 server."""
    import s3fs

    name = f"bucket-{abs(hash(request.node.name))}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture(params=["file", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return Storage(f"{request.getfixturevalue('bucket')}/runs")
    return Storage(
        {"file": f"file://{tmp_path}/storage", "memory": f"memory://{tmp_path}"}[request.param]
    )


def objects(storage: Storage) -> dict[str, int]:
    """Every object by name, with its size."""
    found = storage.system.find(storage.root, detail=True)
    return {name.removeprefix(storage.root).lstrip("/"): of["size"] for name, of in found.items()}


def damage(storage: Storage, sha256: str) -> None:
    """Change a byte of a file."""
    data = bytearray(storage.read(f"files/{sha256}"))
    data[len(data) // 2] ^= 1
    storage.write(f"files/{sha256}", bytes(data))


def test_a_file_comes_back_under_its_digest(storage: Storage, tmp_path: Path) -> None:
    storage.check()
    here, there = tmp_path / "here", tmp_path / "folder" / "there"
    here.write_bytes(bytes(range(256)) * 1000)
    sha256 = storage.put(here)
    assert sha256 == digest(here)
    assert storage.put(here, sha256) == sha256
    storage.get(sha256, there)
    assert there.read_bytes() == here.read_bytes()
    there.write_bytes(b"other")
    storage.get(sha256, there)
    assert there.read_bytes() == here.read_bytes()
    assert objects(storage).keys() == {"README.txt", f"files/{sha256}"}
    with storage.open(sha256) as file:
        assert file.seek(-1, io.SEEK_END) == 255_999
        assert file.read() == b"\xff"
        assert file.read() == b""
        file.seek(256)
        assert file.read(3) == b"\x00\x01\x02"


def test_a_result_is_found_by_all_it_is_made_from(storage: Storage) -> None:
    origin = {"backbone": "a", "settings": [{"clip": None}], "rows": "0-10"}
    assert storage.result(origin) is None
    storage.record(origin, "0" * 64)
    assert storage.result(dict(reversed(origin.items()))) == "0" * 64
    for other in ({"rows": "0-11"}, {"backbone": "b"}, {"settings": [{"clip": 80}]}):
        assert storage.result(origin | other) is None
    [name] = objects(storage)
    storage.write(name, b"\xffnothing")
    assert storage.result(origin) is None


def test_what_is_damaged_or_missing_is_told(storage: Storage, tmp_path: Path) -> None:
    path, copy = tmp_path / "file", tmp_path / "copy"
    path.write_bytes(b"contents")
    sha256 = storage.put(path)
    damage(storage, sha256)
    with pytest.raises(InputError, match=f"{sha256} is damaged"):
        storage.get(sha256, copy)
    assert not copy.exists()
    assert storage.put(path, replace=True) == sha256
    storage.get(sha256, copy)
    storage.write(f"files/{sha256}", b"cont")  # as a program would leave it that died
    storage.put(path)
    assert storage.read(f"files/{sha256}") == b"contents"
    for read in (lambda: storage.get("1" * 64, copy), lambda: storage.open("1" * 64)):
        with pytest.raises(InputError, match="1111 is missing in the storage"):
            read()
    with pytest.raises(InputError, match="does not have its recorded SHA-256"):
        storage.put(path, "1" * 64)
    with pytest.raises(InputError, match="nowhere is missing"):
        storage.put(tmp_path / "nowhere")


@given(data=st.binary(max_size=500), at=st.integers(0, 600), count=st.integers(0, 600))
def test_any_part_of_any_file_is_read(data: bytes, at: int, count: int) -> None:
    storage = Storage("memory://parts")
    storage.write("files/x", data)
    file = storage.open("x")
    file.seek(at)
    assert file.read(count) == data[at : at + count]
    assert file.tell() == at + len(data[at : at + count])


def test_an_upload_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, path = Storage(f"file://{tmp_path}/storage"), tmp_path / "file"
    path.write_bytes(b"contents")

    def breaks_off(source: str, target: str) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:3])
        assert storage.size(f"files/{digest(path)}") is None
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(storage.system, "put_file", breaks_off)
        with pytest.raises(UnavailableError, match=r"Storage file://.*gone"):
            storage.put(path)
    assert objects(storage) == {}
    storage.put(path)
    assert objects(storage) == {f"files/{digest(path)}": 8}


def test_half_an_upload_to_s3_is_never_seen(bucket: str, tmp_path: Path) -> None:
    """A program is killed in the middle of it."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(101 << 20)  # in three parts
    name, storage = f"files/{digest(path)}", Storage(bucket)
    code = (
        "import sys; from pathlib import Path; from opnp.runtime.storage import Storage\n"
        "Storage(sys.argv[1]).put(Path(sys.argv[2]))"
    )
    program = subprocess.Popen([sys.executable, "-c", code, bucket, str(path)])
    asked = {"Bucket": storage.root}
    while not storage.system.call_s3("list_multipart_uploads", **asked).get("Uploads"):
        assert program.poll() is None
        assert storage.size(name) is None
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert storage.size(name) is None
    storage.put(path)
    storage.get(digest(path), tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(path)


def test_of_a_parquet_file_only_the_rows_asked_for_are_fetched(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "images.parquet"
    images = rng.integers(0, 256, (4100, 8, 8), np.uint8)
    examples = ((Image.fromarray(image), row % 10) for row, image in enumerate(images))
    names = [str(number) for number in range(10)]
    imagesets.write(path, "train", "noise", examples, 8, "L", names)  # in five row groups
    storage = Storage(bucket)
    sha256 = storage.put(path)
    received, real = [], storage.system.cat_file

    def counted(*args: Any, **more: Any) -> bytes:
        data: bytes = real(*args, **more)
        received.append(len(data))
        return data

    monkeypatch.setattr(storage.system, "cat_file", counted)
    pixels, labels = imagesets.read(storage.open(sha256), "L", 8, 2100, 2200)
    assert (pixels[..., 0] == images[2100:2200]).all()
    assert (labels == np.arange(2100, 2200) % 10).all()
    assert 0 < sum(received) < path.stat().st_size / 3
    whole, _ = imagesets.read(storage.open(sha256), "L", 8)
    assert (whole[..., 0] == images).all()

    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    storage.write("files/damaged", bytes(damaged))
    with pytest.raises(InputError, match=r"s3://.*damaged is damaged .*CRC"):
        imagesets.read(storage.open("damaged"), "L", 8)


def test_a_storage_that_goes_away_while_a_file_is_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, path = Storage(f"memory://{tmp_path}"), tmp_path / "images.parquet"
    imagesets.write(path, "train", "grey", [(Image.new("L", (8, 8)), 0)], 8, "L", ["0"])
    file = storage.open(storage.put(path))

    def gone(*args: Any, **more: Any) -> bytes:
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(storage.system, "cat_file", gone)
    with pytest.raises(UnavailableError, match=r"could not be reached .*the line is dead"):
        imagesets.read(file, "L", 8)


def test_a_storage_that_cannot_be_used_is_refused_in_one_sentence(
    server: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    Storage(bucket).check()
    with pytest.raises(InputError, match=r"s3://no-such-bucket/.* is missing"):
        Storage("s3://no-such-bucket").check()
    with pytest.raises(InputError, match="Storage nothing://x cannot be opened"):
        Storage("nothing://x")

    def authorize_after(count: str) -> None:
        """From then on the server asks who calls."""
        url, plain = f"{server}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, count.encode(), plain)).close()

    authorize_after("0")
    try:
        with pytest.raises(InputError, match=r"Storage s3://.* denies access") as refused:
            Storage(bucket).check()
        assert not isinstance(refused.value, UnavailableError)
    finally:
        authorize_after("inf")
    for name in ROOT_KEYS:
        monkeypatch.delenv(name)
    S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match=r"Storage s3://.*[Cc]redentials"):
        Storage(bucket).check()
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", nobody)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UnavailableError, match=r"Storage s3://.* could not be reached"):
        Storage(bucket).check()
    monkeypatch.undo()
    S3FileSystem.clear_instance_cache()


def test_threads_share_no_storage(tmp_path: Path) -> None:
    shutil.copy2(HERE.parameters, tmp_path)
    set_parameters(tmp_path, {"engine.storage": "s3://bucket/folder"})
    with pytest.raises(
        InputError, match=r"engine.*threads share one: set `engine.runner` to processes"
    ):
        parameters.load(tmp_path / "params.yaml")


def without_gitignore(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".gitignore"
    }


@pytest.mark.slow
def test_workers_without_a_shared_disk_make_the_same_bits(
    workspace: Path, bucket: str, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, each in a folder of its own, which reach each other by S3 only."""
    from flows import workers
    from flows.stages import features, sensitivity, shard
    from opnp.pipeline import stages

    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    families = ["blobs", "phase"]
    for folder in (HERE.features / "proxies").iterdir():
        if folder.name not in families:
            shutil.rmtree(folder)
    made = [HERE.features, HERE.sensitivity.parent]
    expected = [without_gitignore(folder) for folder in made]
    for folder in made:
        shutil.rmtree(folder)
    engine = {"runner": "processes", "workers": 2, "storage": f"{bucket}/workers"}
    changed = {f"engine.{name}": value for name, value in engine.items()}
    set_parameters(workspace, {"search.proxies": families, **changed})
    chosen, storage = parameters.load(), Storage(f"{bucket}/workers")
    for flow in (features, sensitivity):
        workers.run(flow, HERE, chosen)
    assert [without_gitignore(folder) for folder in made] == expected
    assert not list(workspace.rglob("*.part"))
    there = objects(storage)
    sets = {entry.sha256 for entry in imagesets.read_manifest(HERE.data).sets.values()}
    wanted = sets | {digest(path) for path in Path("artifacts").glob("features/**/*.arrow")}
    assert {f"files/{sha256}" for sha256 in wanted} <= there.keys()

    # From here on this process is the worker, in a folder of its own too.
    from flows import transfer

    plan = stages.features.plan(HERE, chosen)
    parts = [plan[0], next(each for each in plan if each.split.startswith("proxies/"))]
    [inputs, _] = transfer.put(HERE, chosen, [stages.features.needed(HERE, p) for p in parts])
    [train, *_] = stages.sensitivity.plan(HERE, chosen)
    [common] = transfer.put(HERE, chosen, [stages.sensitivity.needed(HERE, train)])
    assert objects(storage) == there

    def computed(part: Shard, chosen: Parameters = chosen) -> tuple[bool, str]:
        return shard.fn("features", HERE, chosen, part, inputs)

    files = [stages.features.made(HERE, part) for part in parts]
    sums = stages.sensitivity.made(HERE, train)
    for part, file in zip(parts, files, strict=True):
        assert computed(part) == (False, digest(file))
    assert shard.fn("sensitivity", HERE, chosen, train, common) == (False, digest(sums))
    assert objects(storage) == there

    # What was damaged or deleted is made again, of the same bits; what is of other parameters, too.
    before = [digest(file) for file in files]
    damage(storage, before[0])
    damage(storage, digest(sums))
    storage.system.rm_file(f"{storage.root}/files/{before[1]}")
    for part, sha256 in zip(parts, before, strict=True):
        assert computed(part) == (True, sha256)
        assert computed(part) == (False, sha256)
    assert shard.fn("sensitivity", HERE, chosen, train, common) == (True, digest(sums))
    assert objects(storage) == there
    files[0].unlink()
    assert list(transfer.bring(chosen, files[:1], [(False, before[0])])) == [False]
    assert digest(files[0]) == before[0]
    set_parameters(workspace, {"features.dtype": "float16"})
    anew, other = computed(plan[0], parameters.load())
    assert anew
    assert other != before[0]
    assert objects(storage).keys() > there.keys()

    # A storage whose images are gone says so; nothing is computed from what is not there.
    storage.system.rm(f"{storage.root}/results", recursive=True)
    images = imagesets.read_manifest(HERE.data).sets[plan[0].split].sha256
    storage.system.rm_file(f"{storage.root}/files/{images}")
    with pytest.raises(InputError, match=f"{images} is missing"):
        computed(plan[0])


def test_a_run_is_refused_before_any_work(
    workspace: Path, server: str, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.pipeline import pipeline

    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    storage = {"engine.runner": "processes", "engine.storage": "s3://no-such-bucket"}
    set_parameters(workspace, {"seed": 1, **storage})
    before = {path: path.stat().st_mtime_ns for path in workspace.glob("artifacts/**/*.*")}
    with pytest.raises(InputError, match=r"s3://no-such-bucket/.* is missing"):
        pipeline(HERE)
    assert {path: path.stat().st_mtime_ns for path in workspace.glob("artifacts/**/*.*")} == before


def test_dvc_pushes_to_and_pulls_from_s3(workspace: Path, bucket: str, tmp_path: Path) -> None:
    def run(*words: str, cwd: Path = workspace) -> None:
        done = run_program(*words, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr

    run("dvc", "remote", "add", "--default", "origin", f"{bucket}/dvc")
    run("dvc", "push")
    run("git", "add", "--all")
    run("git", "commit", "--quiet", "--message", "run")
    clone = tmp_path / "clone"
    run("git", "clone", "--quiet", str(workspace), str(clone))
    assert not (clone / "data").exists()
    run("dvc", "pull", cwd=clone)
    for folder in ("data", "artifacts"):
        assert without_gitignore(clone / folder) == without_gitignore(workspace / folder)
