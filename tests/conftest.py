"""One real Prefect server for the whole session, and one real run of the default pipeline."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings
from ruamel.yaml import YAML

from opnp.workspace import Workspace

# Commands in the background ignore SIGINT, and so would the programs that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Small products on more threads than cores take many times longer than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]

HERE = Workspace(Path())
"""The workspace of tests that run in it; its paths are relative, and so the same in any of them."""

# What a clone holds that a run needs; the rest of a workspace is made by running.
WORKSPACE = (
    "opnp", "flows", "params.yaml", "dvc.yaml", "data.dvc", "prefect.yaml", ".dvc/config",
    ".gitignore",
)  # fmt: skip

# What would take long and is nothing that most tests ask about; those that do set it.
QUICK: dict[str, Any] = {
    "search.clip": [None, 90],
    "search.temperature": [1.0],
    "search.bootstrap": 100,
    "evaluate.detectors": [
        "energy", "clip", "opp", "onp", "opnp", "opnp+react", "opnp+knn", "opnp&knn", "msp",
        "maxlogit", "react", "dice", "knn",
    ],
    "evaluate.budget": 4,
    "evaluate.bootstrap": 100,
}  # fmt: skip

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    """Give the test run a Prefect database of its own: other runs at once would make it wait."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        home = TemporaryDirectory(prefix="opnp-prefect-", ignore_cleanup_errors=True)
        os.environ["PREFECT_HOME"] = home.name
        config.add_cleanup(home.cleanup)


def set_parameters(folder: Path, values: dict[str, Any]) -> None:
    """Change some of a workspace's parameters, named as `SECTION.KEY`, and leave all else."""
    path, yaml = folder / "params.yaml", YAML()
    document = yaml.load(path.read_text())
    for name, value in values.items():
        *sections, key = name.split(".")
        section = document
        for each in sections:
            section = section[each]
        assert key in section, name
        section[key] = value
    with path.open("w") as file:
        yaml.dump(document, file)


def new_workspace(folder: Path, values: dict[str, Any] | None = None) -> Path:
    """A git and DVC workspace as a fresh clone would be, with one commit.

    Args:
        folder: where.
        values: parameters that differ from those of the repository.
    """
    for name in WORKSPACE:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    set_parameters(folder, values or {})
    for words in (
        ("init", "--quiet"),
        ("config", "user.name", "OPNP tests"),
        ("config", "user.email", "tests@localhost"),
        ("add", "--all"),
        ("commit", "--quiet", "--message", "workspace"),
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def run_program(
    *words: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment the tests run in, and keep what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, "PATH": path, "COLUMNS": "200", **(env or {})},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(autouse=True)
def log() -> None:
    """Undo what a program in an earlier test has done to the library's logger."""
    logger = logging.getLogger("opnp")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of one test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def prefect_api(common: Path) -> Iterator[str]:
    """The URL of the test run's Prefect server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    file = common / "prefect.address"
    with FileLock(common / "prefect.lock"):
        if not file.exists():
            whole_run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
            words = [sys.executable, "-m", "flows.prefect_server", str(whole_run), str(file), "0"]
            with (common / "prefect.log").open("w") as log:
                server = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
            while not file.exists():
                assert server.poll() is None, (common / "prefect.log").read_text()
                time.sleep(0.1)
    with temporary_settings({PREFECT_API_URL: file.read_text()}):
        yield file.read_text()


@pytest.fixture(scope="session")
def finished(common: Path, prefect_api: str) -> Path:
    """A workspace in which ``python -m flows.pipeline`` has run: the default, but for `QUICK`."""
    folder = common / "finished"
    output = folder / "logs" / "output.txt"
    with FileLock(common / "finished.lock"):
        if not output.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            done = run_program(
                "python",
                "-m",
                "flows.pipeline",
                cwd=new_workspace(folder, QUICK),
                env={"PREFECT_API_URL": prefect_api},
            )
            assert done.returncode == 0, done.stdout + done.stderr
            output.write_text(done.stdout)
    return folder


@pytest.fixture
def workspace(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished workspace to change at will; the test runs in it."""
    folder = tmp_path / "workspace"
    shutil.copytree(finished, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """Run a flow as its command would, expecting it to fail; the one sentence it ends with."""
    from flows.process import command

    def run(flow: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["command"])
        with pytest.raises(SystemExit) as stop:
            command(flow.__name__)
        assert isinstance(stop.value.code, str)  # which makes the exit code 1
        assert stop.value.code.startswith("error: ")
        return stop.value.code

    return run


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's trained model and images, see `tests.own_model`; its module can be imported."""
    from tests.helpers import own_model  # torch, which not all tests want

    folder = own_model.make(tmp_path_factory.mktemp("own"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="session")
def detector_folder(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector fitted to it, with a small search; not to be changed."""
    from tests.helpers import own_model

    return own_model.fitted(own, tmp_path_factory.mktemp("fitted") / "detector")
