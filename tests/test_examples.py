"""The examples run as they stand, and give what they say."""

import importlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pyarrow.parquet as pq
import pytest

from tests.test_docs import commands as console
from tests.test_docs import opnp as opnp_program
from tests.test_docs import python

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Let the examples import one another, as they do when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which `own_model` made a detector, and how well it did."""
    folder = tmp_path_factory.mktemp("example")
    return folder, example("own_model").main(folder)


def test_own_model(made: tuple[Path, dict[str, Any]]) -> None:
    folder, result = made
    assert (folder / "detector" / "detector.json").is_file()
    assert result["id"]["accuracy"] > 95
    assert result["id"]["flagged"] < 15
    assert set(result["ood"]) == set(example("digits").OOD)
    assert result["ood"]["noise"]["flagged"] > 50


def test_getting_started(
    made: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(made[0], tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    setup, enter, cd, fit, *commands = console("getting-started.md")
    assert (setup, enter) == (["make", "setup"], ["source", ".venv/bin/activate"])
    assert (cd, fit) == (["cd", "examples"], ["python", "own_model.py", "first"])
    assert [words[1] for words in commands] == ["show", "score", "evaluate"]
    for words in commands:
        assert opnp_program(words, monkeypatch) == 0, words
        assert capsys.readouterr().out
    assert pq.read_table("scores.parquet").num_rows == 400
    [block] = python("getting-started.md")
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["scores"].shape == (100,)


def test_combining(capsys: pytest.CaptureFixture[str]) -> None:
    combining = example("combining")
    found = combining.main()
    assert list(found) == [*combining.NAMES, "opnp+energy&vim"]
    assert all(0 <= value < 90 for value in found.values())
    assert found["energy"] != found["opnp+energy"], "nothing was pruned"
    assert "weights_high" in capsys.readouterr().out


def test_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(EXAMPLES / "search.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # What was printed elsewhere would go stale, and make every run a change.
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    names: dict[str, Any] = {}
    for cell in cells:
        exec(cell.source, names)
    assert len(names["found"].trials) == 2 * 320
    assert names["best"].mean_fpr95 < names["unpruned"].mean_fpr95
    assert set(names["fpr95"]) == {"energy", "OPNP"}
    assert names["fpr95"]["energy"] != names["fpr95"]["OPNP"]


@pytest.mark.slow
def test_serving(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # which the example sets: put back afterwards
    folder = tmp_path / "example"
    shutil.copytree(made[0], folder)
    answer = example("serving").main(folder)
    assert len(answer) == 1 + len(example("digits").OOD)
    assert set(answer[0]) == {"score", "is_ood", "predicted"}
    described = json.loads((folder / "detector" / "detector.json").read_text())
    for row in answer:
        assert row["is_ood"] == (row["score"] > described["threshold"]["value"])
    assert answer[-1]["is_ood"]


def test_the_page_names_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text()
    named = set(re.findall(r"\]\(([\w.]+)\)", page))
    assert named == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    for script in re.findall(r"\$ python examples/(\S+)", page):
        assert (EXAMPLES / script).is_file()
