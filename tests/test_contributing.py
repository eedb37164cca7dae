"""The recipes of CONTRIBUTING.md, followed in a copy of the package."""

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_program, set_parameters

TRY = """
import torch
from pathlib import Path

import opnp
from opnp.detectors.base import Samples, TrainedModel
from opnp.detectors.names import DETECTORS, detector_name
from opnp.detectors.tuning import tune
from opnp.pipeline import parameters

assert Path(opnp.__file__).is_relative_to(Path.cwd()), opnp.__file__
torch.manual_seed(0)
head = torch.nn.Linear(8, 3)
h = torch.rand(60, 8)
train = Samples(h, torch.arange(60) % 3)
for name in parameters.load(Path("params.yaml")).evaluate.detectors:
    found = tune(
        name, TrainedModel(head), train, train, {"far": Samples(3 * h)}, budget=2, seed=0
    )
    assert found.score(train).shape == (60,)
    print(detector_name(name))
"""


def recipe(title: str) -> str:
    """The section of a recipe."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text.partition(f"### {title}\n")[2].partition("\n##")[0]


def lines(text: str) -> list[str]:
    """The lines of code of a recipe, which end with a comma."""
    return re.findall(r"`([^`]+,)`", text)


def put_before(path: Path, mark: str, text: str) -> None:
    """Insert text before the only line that begins with ``mark``."""
    lines = path.read_text().splitlines(keepends=True)
    [place] = [number for number, line in enumerate(lines) if line.strip().startswith(mark)]
    lines.insert(place, f"{text}\n")
    path.write_text("".join(lines))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package and its parameters."""
    shutil.copytree(ROOT / "opnp", tmp_path / "opnp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "params.yaml", tmp_path)
    return tmp_path


def test_the_recipes_of_detectors(copy: Path) -> None:
    rooms = copy / "opnp" / "detectors"
    name, maker, row = lines(recipe("A detector of pytorch-ood"))
    put_before(rooms / "zoo.py", "EnergyBased,", name)
    put_before(rooms / "zoo.py", '"msp":', maker)
    put_before(rooms / "names.py", 'Row("msp"', row)

    # A detector of our own stands in a file of its own: here NERO, under another key.
    [row] = lines(recipe("A detector of our own"))
    nero = (rooms / "nero.py").read_text()
    (rooms / "mine.py").write_text(nero.replace('{"nero": ', '{"mine": '))
    put_before(rooms / "names.py", 'Row("msp"', row.replace("KEY", "mine").replace("Name", "Mine"))

    set_parameters(copy, {"evaluate.detectors": ["entropy", "opnp+entropy", "mine"]})
    (copy / "try.py").write_text(TRY)
    done = run_program("python", "try.py", cwd=copy, env={"PYTHONPATH": str(copy)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Entropy", "OPNP+Entropy", "Mine"]
