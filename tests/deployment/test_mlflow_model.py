"""A detector in MLflow: registered, promoted, rolled back, and served over HTTP on loopback."""

import base64
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import packages_distributions
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from opnp.cli import app
from opnp.deployment import bundle, http, mlflow_model
from opnp.deployment.detector import SavedDetector
from opnp.deployment.detector import load as load_detector
from opnp.errors import InputError
from opnp.tracking import registry
from tests.conftest import HERE, run_program
from tests.helpers import own_model

SPEC = own_model.SPEC
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
NO_URI = {"MLFLOW_TRACKING_URI": "", "MLFLOW_EXPERIMENT_NAME": ""}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def registered(
    own: Path, detector_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A workspace with a champion and, of another seed of the bootstrap, its successor."""
    folder = tmp_path_factory.mktemp("registered")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NO_URI.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        shutil.copytree(own, folder, dirs_exist_ok=True)
        first = load_detector(detector_folder, trust=SPEC)
        made = {**first.made, "seed": 1}
        SavedDetector(
            first.backbone, first.mask, first.candidate, first.sensitivity, first.threshold, made
        ).save("second")
        yield folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(words: list[str], cwd: Path, port: int) -> Iterator[str]:
    """A server on loopback, once it answers; stopped with what it started."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (cwd / "server.log").open("wb") as log:
        server = subprocess.Popen(
            words,
            cwd=cwd,
            env={**os.environ, **NO_URI, "PATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        late = time.monotonic() + 300
        while True:
            try:
                urlopen(f"{address}/ping", timeout=5).close()
                break
            except (URLError, ConnectionError):
                assert server.poll() is None, (cwd / "server.log").read_text()
                assert time.monotonic() < late, (cwd / "server.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(server.pid, 15)
        server.wait(30)


def ask(address: str, body: Any, headers: dict[str, str] = JSON) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(f"{address}/invocations", data, headers), timeout=60) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.loads(error.read())


def rows(*images: bytes) -> dict[str, Any]:
    return {"dataframe_records": [{"image": base64.b64encode(i).decode()} for i in images]}


def absurd() -> bytes:
    """A whole PNG header that states 60,000 × 60,000 pixels, and no pixels."""
    file = BytesIO()
    Image.new("L", (8, 8)).save(file, "png")
    head = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + file.getvalue()[24:29]
    return file.getvalue()[:12] + head + zlib.crc32(head).to_bytes(4, "big") + file.getvalue()[33:]


def test_champions_follow_and_return(registered: Path, detector_folder: Path) -> None:
    assert registry.champion(HERE, SPEC) is None
    with pytest.raises(InputError, match="no challenger"):
        registry.promote(HERE)
    with pytest.raises(InputError, match="no champion to roll back"):
        registry.rollback(HERE)
    first = registry.register(HERE, detector_folder, trust=SPEC, metrics={"mean/fpr95": 12.5})
    assert registry.register(HERE, detector_folder, trust=SPEC) == first  # once
    assert registry.champion(HERE, SPEC) is None
    assert registry.promote(HERE) == first == registry.promote(HERE, first)
    with pytest.raises(InputError, match="did not replace another"):
        registry.rollback(HERE)
    second = registry.register(HERE, "second", trust=SPEC)
    assert second != first
    assert registry.promote(HERE) == second
    found = registry.champion(HERE, SPEC)
    assert found is not None
    assert found.digest == load_detector("second", trust=SPEC).digest
    with pytest.raises(InputError, match="wants to run the code of network:Network"):
        registry.champion(HERE)
    with pytest.raises(InputError, match="refused"):
        registry.promote(HERE, "7")
    assert registry.rollback(HERE) == first
    found = registry.champion(HERE, SPEC)
    assert found is not None
    assert found.digest == load_detector(detector_folder, trust=SPEC).digest

    client = registry.registry(HERE)
    version = client.get_model_version("opnp", first)
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    shown = {metric.key: metric.value for metric in model.metrics}
    assert shown["mean/fpr95"] == 12.5
    assert shown["detector/accuracy"] > 90
    assert model.params["backbone"] == SPEC
    assert model.source_run_id
    assert client.get_run(model.source_run_id).info.status == "FINISHED"


def test_what_is_logged(registered: Path) -> None:
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model(registry.served(HERE, "champion")[1])
    files = sorted(Path("images/others").iterdir())[:3]
    found = model.predict(pd.DataFrame({"image": [file.read_bytes() for file in files]}))
    detector = registry.champion(HERE, SPEC)
    assert detector is not None
    expected = detector.score(files)
    assert found["score"].tolist() == pytest.approx(expected.score.tolist(), abs=1e-5)
    assert found["is_ood"].tolist() == expected.is_ood.tolist()
    assert found["predicted"].tolist() == expected.predicted
    assert len(model.predict(model.input_example)) == 1
    uri = registry.served(HERE, "champion")[1]
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path="got"))
    lines = (folder / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z-]+==[\w.+]+", line) for line in lines), lines
    assert (folder / "code" / "network.py").is_file()
    assert (folder / "code" / "opnp" / "__init__.py").is_file()
    assert not [path for path in folder.rglob("*") if path.suffix in {".pkl", ".pickle", ".pyc"}]


IMPORTS = """
import ast, sys
import opnp.deployment.mlflow_model

for name in [name for name in sys.modules if name.split(".")[0] == "opnp"]:
    with open(sys.modules[name].__file__) as file:
        for node in ast.walk(ast.parse(file.read())):
            if isinstance(node, ast.Import):
                print(*(alias.name.split(".")[0] for alias in node.names))
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                print(node.module.split(".")[0])
"""


def test_the_requirements_name_what_the_code_imports(tmp_path: Path) -> None:
    done = run_program("python", "-c", IMPORTS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split()) - sys.stdlib_module_names - {"opnp"}
    distributions = packages_distributions()
    named = {"mlflow", *mlflow_model.REQUIREMENTS, "timm"}  # timm where the model is of timm
    lacking = {name for name in imported if not named & set(distributions[name])}
    assert not lacking
    assert {"mlflow", "torch", "pydantic"} <= imported


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"images": 0}, "`images`: input should be greater than 0 (it is 0)."),
        ({"bytes": "20 MB"}, "`bytes`: input should be a valid integer (it is '20 MB')."),
        ({"pixel": 9}, "there is no parameter `pixel`; did you mean `pixels`?"),
    ],
)
def test_faulty_limits_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"model_config: {said}")):
        mlflow_model._load_pyfunc("no folder is read", config)


@pytest.mark.parametrize("loader", ["opnp.deployment.mlflow_model", "opnp.serving"])
def test_a_model_loads_with_its_own_code(
    loader: str, own: Path, detector_folder: Path, tmp_path: Path
) -> None:
    """Also one that names the loader of version 0.1."""
    model = tmp_path / "model"
    mlflow_model.save(detector_folder, model, SPEC)
    card = model / "MLmodel"
    assert card.read_text().count("loader_module: opnp.deployment.mlflow_model\n") == 1
    card.write_text(card.read_text().replace("opnp.deployment.mlflow_model", loader))
    code = (
        "import sys; from mlflow import pyfunc; model = pyfunc.load_model(sys.argv[1]);"
        "found = model.predict(model.input_example); print(len(found), *found.columns);"
        "import opnp; print(opnp.__file__)"
    )
    done = run_program("python", "-c", code, str(model), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    columns, file = done.stdout.splitlines()
    assert columns == "1 score is_ood predicted"
    assert file == str(model / "code" / "opnp" / "__init__.py")


@pytest.mark.slow
def test_mlflow_serves_it(registered: Path, detector_folder: Path) -> None:
    registry.promote(HERE, registry.register(HERE, detector_folder, trust=SPEC))
    port, files = free_port(), sorted((registered / "images" / "others").iterdir())[:2]
    command = f"mlflow models serve -m models:/opnp@champion --env-manager local -p {port}"
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{registered / 'mlflow.db'}"}
    words = ["env", *(f"{key}={value}" for key, value in store.items()), *shlex.split(command)]
    images = [file.read_bytes() for file in files]
    with started(words, registered, port) as address:
        status, good = ask(address, rows(*images))
        assert status == 200, good
        assert [set(row) for row in good["predictions"]] == [{"score", "is_ood", "predicted"}] * 2
        for body, said in (
            (rows(b"no image"), "image 0 is not a whole image"),
            (rows(images[0], images[1][:60]), "image 1 is not a whole image"),
            (rows(absurd()), "pixels"),
            (rows(*images[:1] * 65), "65 images, more than the 64 allowed"),
            (rows(b"x" * 20_000_001), "20000001 bytes, more than the 20000000"),
            ({"dataframe_records": [{"picture": "x"}]}, "image"),
            ({"dataframe_records": []}, ""),
            (b"{", "valid JSON"),
            ([], "exactly one of the input fields"),
        ):
            status, bad = ask(address, body)
            assert status == 400, bad
            assert said in bad["message"]
        assert ask(address, rows(*images)) == (200, good)  # it lives on


HEAD = b"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def check_limits(address: str, port: int, image: bytes) -> None:
    """The server refuses requests of more than 100,000 bytes, and goes on serving."""
    status, good = ask(address, rows(image))
    assert status == 200, good
    for size in (100_001, 30_000_000):  # urllib sends all of it before it reads
        status, bad = ask(address, b" " * size)
        assert (status, bad["message"]) == (413, "A request may hold at most 100000 bytes.")
    with socket.create_connection(("127.0.0.1", port)) as wire:  # of no stated length
        chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
        wire.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk * 4)
        assert wire.recv(1000).startswith(b"HTTP/1.1 413")
    assert ask(address, rows(image)) == (200, good)


def check_mistakes(address: str, image: bytes) -> None:
    """What the client did wrong is told as such."""
    encoded = base64.b64encode(image).decode()
    plain = json.dumps(rows(image)).encode()
    for headers, status in (({"content-type": ""}, 415), ({"content-type": "text/plain"}, 415)):
        assert ask(address, plain, headers)[0] == status
    for body, said in (
        (b"[" * 9_000 + b"]" * 9_000, "nested too deeply"),
        (b"[" * 40_000 + b"]" * 40_000, "more than 20000 values"),
        (b'{"inputs": ' + b"9" * 50_000 + b"}", "not valid JSON"),
        (plain.replace(encoded.encode(), encoded[:20].encode() + b"\\n"), "not base64"),
        (plain.replace(encoded.encode(), b"-_-_"), "not base64"),
        (rows(b""), "has no bytes"),
        (b"", "not valid JSON"),
    ):
        status, bad = ask(address, body)
        assert (status, said in bad["message"]) == (400, True), bad


def check_slow_clients(address: str, port: int, image: bytes) -> None:
    """Clients that send nothing more are sent away, and others are answered meanwhile."""
    beginnings = [b"", HEAD, HEAD + b"content-length: 1000\r\n\r\n{"] * 7
    wires = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in beginnings]
    for wire, beginning in zip(wires, beginnings, strict=True):
        wire.sendall(beginning)
    assert ask(address, rows(image))[0] == 200
    for wire in wires:
        with wire:
            assert wire.recv(1000).startswith(b"HTTP/1.1 408")
            while wire.recv(1000):
                pass


def version_at(address: str, image: bytes) -> str:
    """The version that the header of an answer names."""
    body = json.dumps(rows(image)).encode()
    with urlopen(Request(f"{address}/invocations", body, JSON), timeout=60) as answer:
        return str(answer.headers["opnp-version"])


def run_line(line: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Run a command of the page: the program's in this process, which has MLflow already."""
    if not line.startswith("opnp "):
        done = run_program("bash", "-c", line, cwd=folder)
        assert done.returncode == 0, (line, done.stderr)
        assert "predicted" in done.stdout
        return
    patch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code, (line, stop.value.code)


def test_the_page(registered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command on it, in its order, and its Python, while the server that it starts runs."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree("second", "detector", dirs_exist_ok=True)
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.S)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    (serving,) = [line for line in lines if line.startswith("opnp serve")]
    before = lines[: lines.index(serving)]
    after = lines[lines.index(serving) + 1 :]
    assert len(before) >= 2
    assert len(after) >= 2
    for line in before:
        run_line(line, registered, monkeypatch)
    port = free_port()
    words = shlex.split(serving.replace("5000 ", f"{port} ").replace("50000000", "100000"))
    (python,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    image = next((registered / "images" / "others").iterdir()).read_bytes()
    with started(words, registered, port) as address:
        check_limits(address, port, image)
        check_mistakes(address, image)
        check_slow_clients(address, port, image)
        served = version_at(address, image)
        assert served == registry.served(HERE, "champion")[0]
        for line in after:
            run_line(line.replace("5000", str(port)), registered, monkeypatch)
        names: dict[str, Any] = {}
        exec(python.replace("5000", str(port)), names)
        assert names["answer"]["predictions"][0]["predicted"] in own_model.CLASSES
        late, now = time.monotonic() + 300, registry.served(HERE, "champion")[0]
        assert now != served  # the page has rolled back
        while version_at(address, image) != now:
            assert time.monotonic() < late, (registered / "server.log").read_text()
            time.sleep(0.5)


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1, port {port} "):
            http.serve(lambda: ("1", "models:/none"), "127.0.0.1", port, 1000)
    with pytest.raises(InputError, match=r"cannot listen on 203\.0\.113\.7"):
        http.serve(lambda: ("1", "models:/none"), "203.0.113.7", port, 1000)


def test_the_users_modules_and_their_libraries_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "maker_one.py": "import os, torch\nfrom blocks_one import Body",
        "blocks_one/__init__.py": "from . import parts",
        "blocks_one/parts.py": "def late():\n    import shapes_one, timm.layers",
        "shapes_one.py": "import maker_one, not_installed_anywhere",
        "other_one.py": "import rich",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    own, libraries = bundle.needs("maker_one")
    assert {path.relative_to(tmp_path).as_posix() for path in own} == {
        "maker_one.py", "blocks_one", "shapes_one.py",
    }  # fmt: skip
    assert libraries == {"torch", "timm"}


def test_local_builds_are_required_by_their_public_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bundle, "version", lambda name: "2.15.0+cu128")
    assert bundle.pin("torch") == "torch==2.15.0"


@pytest.mark.slow
def test_what_cannot_be_loaded_alone_is_not_registered(
    own: Path, detector_folder: Path, tmp_path: Path
) -> None:
    """Neither with a library that is not required, nor without the user's own code."""
    bundle_of = tmp_path / "model"
    mlflow_model.save(detector_folder, bundle_of, SPEC)
    code = bundle_of / "code" / "network.py"
    code.write_text("import timm\n" + (own / "network.py").read_text())
    with pytest.raises(InputError, match="No module named 'timm'"):
        bundle.check(bundle_of, mlflow_model.REQUIREMENTS, [own / "network.py"])
    bundle.check(bundle_of, [*mlflow_model.REQUIREMENTS, "timm"], [own / "network.py"])
    code.unlink()
    with pytest.raises(InputError, match="No module named 'network'"):
        bundle.check(bundle_of, mlflow_model.REQUIREMENTS, [own / "network.py"])
