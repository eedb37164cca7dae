"""What the stages have written is read in one place, and without what made it."""

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from opnp.backbones import backbone
from opnp.errors import InputError
from opnp.pipeline import parameters, stages
from opnp.pipeline.detector import from_run
from opnp.pipeline.results import Run
from opnp.pipeline.results import backbone as results_backbone
from opnp.pipeline.results.times import add_times, read_times
from opnp.runtime import devices
from opnp.workspace import Workspace


def run_in(folder: Path) -> Run:
    workspace = Workspace(folder)
    return Run(workspace, parameters.load(workspace.parameters))


def test_no_backbone_is_loaded_and_no_device_taken_to_read_what_was_computed(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError

    for module in (backbone, results_backbone):
        monkeypatch.setattr(module, "load_backbone", forbidden)
    monkeypatch.setattr(results_backbone, "on_device", forbidden)
    monkeypatch.setattr(devices, "device", forbidden)
    monkeypatch.setattr(nn.Module, "__init__", forbidden)
    monkeypatch.setattr(torch.Tensor, "to", forbidden)
    run = run_in(finished)
    for split in ("train", "validation", "test", *run.outlier_splits.values()):
        h, labels = run.features(split)
        assert len(h) == len(labels) > 0
        assert len(run.feature_shards(split)) > 0
    assert run.images("proxies/phase", 5).shape == run.images("test", 5).shape == (5, 1, 8, 8)
    assert run.sensitivities[0].count == len(run.features("train")[0])
    assert run.search["backbone"] == run.training.record["sha256"] == run.backbone_stated.sha256
    assert run.mask.weights.shape == run.sensitivities[0].weights.shape
    assert run.trials.num_rows == run.search["candidates"]
    assert set(run.metrics["detectors"]) == set(run.intervals["detectors"]) == set(run.scores)
    assert set(run.roc) == {"fpr", *run.evaluation["ranks"]}


def test_only_features_of_this_backbone_are_read(workspace: Path) -> None:
    path = Workspace(workspace).backbone
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match="was made with another backbone") as refused:
        run_in(workspace).features("test")
    assert refused.value.about == "stage:features"
    path.unlink()
    with pytest.raises(InputError, match="is missing") as refused:
        run_in(workspace).features("test")
    assert refused.value.about == "stage:train"


def test_search_run_again_leaves_the_times_and_the_report(workspace: Path) -> None:
    run = run_in(workspace)
    before = read_times(run.workspace)
    assert {"tune", "fit", "score"} == set(before["knn"]) == set(before["opnp"])
    stages.search.run(run.workspace, run.parameters)
    after = read_times(run.workspace)
    assert after["knn"] == before["knn"]
    assert after["opnp"]["score"] == before["opnp"]["score"]
    assert after["opnp"]["tune"] != before["opnp"]["tune"]
    page = stages.report.run(run.workspace, run.parameters).read_text()
    assert "ms per 1,000" in page


@pytest.mark.parametrize("found", ["", "{", "[1]", '{"knn": 1}', '{"knn": {"fit": "x"}}'])
def test_times_that_cannot_be_read_were_not_measured(tmp_path: Path, found: str) -> None:
    workspace = Workspace(tmp_path)
    workspace.logs.mkdir()
    workspace.times.write_text(found)
    assert read_times(workspace) == {}
    add_times(workspace, {"knn": {"fit": 1.0}})
    add_times(workspace, {"knn": {"score": 2.0}, "msp": {"fit": 0.0}})
    assert read_times(workspace) == {"knn": {"fit": 1.0, "score": 2.0}, "msp": {"fit": 0.0}}


def test_a_detector_of_a_run_is_made_from_any_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = from_run(run_in(finished)).save(tmp_path / "detector")
    assert made.describe()["made"]["by"] == "the pipeline"
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]
