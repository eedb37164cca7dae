"""A detector of the user's own in a real comparison, and detectors added to the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from opnp.errors import InputError
from opnp.pipeline import parameters, records, stages
from opnp.pipeline.results import Run
from opnp.runtime.files import read_json
from tests.conftest import HERE, ROOT, set_parameters

# A detector in a module of the user's own: the distance to the nearest of a few class centres.
MODULE = '''
"""Distances to class centres."""

import numpy as np
import torch
from pytorch_ood.api import FeaturesDetector, LogitsDetector


class Centres(FeaturesDetector):
    requires_fit = True
    hyperparameter_space = {"power": list(np.arange(1, 4)), "norm": ["l1", "l2"]}

    def __init__(self, head):
        self.head, self.power, self.norm = head, 1, "l2"

    def predict(self, x):
        raise NotImplementedError

    def fit_features(self, x, y):
        self.centres = torch.stack([x[y == label].mean(dim=0) for label in y.unique()])
        return self

    def predict_features(self, x):
        p = {"l1": 1.0, "l2": 2.0}[self.norm]
        return torch.cdist(x, self.centres, p=p).amin(dim=1) ** int(self.power)


class Margin(LogitsDetector):
    def predict_logits(self, logits):
        first, second = logits.topk(2, dim=1).values.unbind(dim=1)
        return second - first


def centres(model):
    return Centres(model.head)


def margin(model):
    return Margin()


def number(model):
    return model.temperature
'''
OWN = ["own_distances:centres", "opnp+own_distances:centres", "own_distances:margin"]


@pytest.fixture
def run(searched_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the small run in the current folder, with the user's module beside it."""
    folder = tmp_path / "workspace"
    shutil.copytree(searched_run, folder)
    (folder / "own_distances.py").write_text(MODULE)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def evaluated(folder: Path, detectors: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    set_parameters(folder, {"evaluate.detectors": detectors})
    chosen = parameters.load()
    metrics = stages.evaluate.run(HERE, chosen)
    stages.report.run(HERE, chosen)
    evaluation: dict[str, Any] = read_json(HERE.evaluation)
    return metrics["detectors"], evaluation


def test_a_detector_of_ones_own_is_tuned_compared_and_shown_as_any_other(run: Path) -> None:
    names = ["energy", "knn", *OWN, "opnp"]
    metrics, evaluation = evaluated(run, names)
    assert evaluation["unavailable"] == {}
    assert list(metrics) == list(evaluation["trials"]) == names
    alone, combined, margin = (evaluation["hyperparameters"][name] for name in OWN)
    assert set(alone) == {"power", "norm"}
    assert type(alone["power"]) is int  # numpy's numbers become plain ones
    assert {"power", "norm", "weights_low", "neuron_sensitivity"} <= set(combined)
    assert margin == {}
    assert [evaluation["trials"][name] for name in OWN] == [4, 6, 1]
    assert set(evaluation["pruned"]) == {"opnp+own_distances:centres", "opnp"}
    assert metrics["own_distances:centres"]["mean"]["auroc"] > 60

    # The scores are those of the class itself on the features that were cached.
    import own_distances  # type: ignore[import-not-found]

    chosen = parameters.load()
    of = Run(HERE, chosen)
    (h, labels), (test, _) = of.features("train"), of.features("test")
    by_hand = own_distances.Centres(None).set_hyperparameters(**alone).fit_features(h, labels)
    scores = pq.read_table(HERE.scores, filters=[("set", "==", "test")])
    found = torch.tensor(scores["own_distances:centres"].to_numpy())
    torch.testing.assert_close(found, by_hand.predict_features(test).double())

    text, page = HERE.comparison_text.read_text(), HERE.report.read_text()
    for shown in ("own_distances:centres", "OPNP+own_distances:centres", "own_distances:margin"):
        assert any(f"{before}{shown}" in text for before in ("\n| ", " detector: "))
        assert f'<th scope="row">{shown}' in page
    children = records.detector_records(of)
    assert children["own_distances:centres"]["parameters"]["norm"] == alone["norm"]
    assert children["own_distances:centres"]["metrics"]["trials"] == 4


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("own_distances:centre", "the detector own_distances:centre does not exist: name a"),
        ("opnp+nowhere:centres", "the detector nowhere:centres cannot be imported .No module"),
        ("own_distances:__doc__", "the detector own_distances:__doc__ is not a function"),
        ("own-distances:centres", "the detector 'own-distances:centres' is not of the form"),
    ],
)
def test_a_wrong_name_is_refused_with_the_parameters(run: Path, name: str, sentence: str) -> None:
    set_parameters(run, {"evaluate.detectors": ["energy", name]})
    with pytest.raises(
        InputError, match=f"^params.yaml: `evaluate.detectors`: {sentence}"
    ) as refused:
        parameters.load()
    assert "\n" not in str(refused.value)


def test_what_is_not_a_detector_is_refused_before_anything_is_tuned(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("opnp.detectors.tuning.tune", forbidden)
    set_parameters(run, {"evaluate.detectors": ["energy", "own_distances:number"]})
    with pytest.raises(InputError, match="own_distances:number is of the type float"):
        stages.evaluate.run(HERE, parameters.load())


def added(text: str, before: str, line: str) -> str:
    """The text with a line put in front of another, which it holds once."""
    assert text.count(before) == 1
    return text.replace(before, line + before)


def test_a_detector_is_added_in_two_places_and_one_of_our_own_in_three(run: Path) -> None:
    """A copy of the package with one of each, which compares them on a real run."""
    package = run / "changed" / "opnp"
    shutil.copytree(ROOT / "opnp", package, ignore=shutil.ignore_patterns("__pycache__"))
    names, zoo = package / "detectors" / "names.py", package / "detectors" / "zoo.py"
    # One of pytorch-ood: its row, its maker.
    row = '        Row("entropy", "Entropy", "logits"),\n'
    names.write_text(added(names.read_text(), '        Row("maxlogit"', row))
    makers = added(zoo.read_text(), '    "maxlogit":', '    "entropy": lambda m: Entropy(None),\n')
    zoo.write_text(added(makers, "    EnergyBased,\n", "    Entropy,\n"))
    # One of our own: its row, its file; the third place is its test, which this is.
    row = '        Row("centres", "Centres", "features", "opnp.detectors.centres"),\n'
    names.write_text(added(names.read_text(), '        Row("odin"', row))
    maker = 'MAKERS = {"centres": lambda m: Centres(m.head)}\n'
    (package / "detectors" / "centres.py").write_text(f"{MODULE}\n\n{maker}")

    wanted = ["energy", "entropy", "opnp+entropy", "centres", "opnp+centres"]
    set_parameters(run, {"evaluate.detectors": wanted})
    code = (
        "import opnp; from opnp.pipeline import parameters, stages; print(opnp.__file__); "
        "from pathlib import Path; from opnp.workspace import Workspace; "
        "stages.evaluate.run(Workspace(Path.cwd()), parameters.load())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=run,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(package / "__init__.py")
    evaluation = json.loads(HERE.evaluation.read_text())
    assert evaluation["unavailable"] == {}
    assert list(evaluation["trials"]) == wanted
    assert set(evaluation["hyperparameters"]["centres"]) == {"power", "norm"}
    text = HERE.comparison_text.read_text()
    assert all(f"\n| {name}" in text for name in ("Entropy", "Centres"))
    assert all(name in text for name in ("OPNP+Entropy", "OPNP+Centres"))
