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


TRY_SETTING = """
import json
from pathlib import Path

import torch

from opnp import SearchSettings, search_masks
from opnp.pipeline import parameters
from opnp.pruning.sensitivity import measure

path = Path("params.yaml")
assert parameters.load(path).search.noise == 1
assert parameters.complete(path) == ["search.noise"]
text = path.read_text()
assert "  # Standard errors within which masks count as equally good.\\n  noise: 1\\n" in text
path.write_text(text.replace("noise: 1", "noise: -1"))
print(parameters.faults(path))
path.write_text(text.replace("noise: 1", "noise: 2"))
assert parameters.load(path).search.noise == 2

torch.manual_seed(0)
head, h = torch.nn.Linear(8, 3), torch.rand(90, 8)
measured = measure(h[:40], head.weight, head.bias)
outliers = {"far": h[60:] + 0.1 * torch.rand(30, 8)}
for noise in (0, 1000):
    found = search_masks(head, h[40:60], outliers, measured, SearchSettings(noise=noise))
    print(found.best.mean_fpr95 == found.choices["all"].lowest.mean_fpr95, found.best.pruned)
"""


def test_the_recipe_of_a_setting(copy: Path) -> None:
    """The file of parameters, the option with its help, and the call all have it."""
    field, use = re.findall(r"`(noise[: ].+)`", recipe("A setting of the search"))
    rooms = copy / "opnp" / "pruning"
    put_before(rooms / "settings.py", "bootstrap:", f"    {field}")
    search = (rooms / "search.py").read_text()
    assert search.count(use.replace("settings.noise * ", "")) == 1
    (rooms / "search.py").write_text(search.replace(use.replace("settings.noise * ", ""), use))

    (copy / "try.py").write_text(TRY_SETTING)
    env = {"PYTHONPATH": str(copy)}
    done = run_program("python", "try.py", cwd=copy, env=env)
    assert done.returncode == 0, done.stderr
    fault, exact, lenient = done.stdout.splitlines()
    assert "`search.noise`: input should be greater than or equal to 0 (it is -1)" in fault
    assert exact.startswith("True ")
    assert lenient.endswith(" 0.0"), "with any noise, nothing need be pruned"

    done = run_program("python", "-m", "opnp", "fit", "--help", cwd=copy, env=env)
    told = "--noise NUMBER Standard errors within which masks count as equally good. [default: 1]"
    assert told in " ".join(done.stdout.split())
    words = ("--out", "new", "--noise", "-1")
    done = run_program("python", "-m", "opnp", "fit", *words, cwd=copy, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --noise: input should be greater than or equal to 0")
