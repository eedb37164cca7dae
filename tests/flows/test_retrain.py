"""Retraining: what is promoted, what is rejected, and what leaves the champion untouched."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import opnp
from flows import dvc_repo, monitor, retrain
from opnp.deployment import champion
from opnp.deployment.detector import SavedDetector
from opnp.deployment.detector import load as load_detector
from opnp.errors import InputError
from opnp.pipeline import parameters, stages
from opnp.pipeline.parameters import Parameters
from opnp.tracking import registry
from tests.conftest import HERE, ROOT, new_workspace, run_program, set_parameters
from tests.flows.test_pipeline import SMALLEST
from tests.helpers import own_model


@pytest.fixture(scope="module")
def place(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with parameters, fetched images, and a frozen evaluation set."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copy2(ROOT / "params.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stages.fetch.run(HERE, parameters.load())
        champion.freeze(HERE, folder / "frozen")
    return folder


@pytest.fixture(scope="module")
def good(detector_folder: Path, place: Path) -> SavedDetector:
    """The user's detector, its classes named as the digits' are."""
    found = opnp.load(detector_folder, trust=own_model.SPEC)
    classes = champion.frozen(place / "frozen").classes
    return replace(found, backbone=replace(found.backbone, classes=classes))


def disturbed(detector: SavedDetector, noise: float) -> SavedDetector:
    """The same, its encoder's last layer disturbed by noise of so many standard deviations."""
    backbone = copy.deepcopy(detector.backbone)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in backbone.classifier.encoder.parameters():
            scale = noise * float(weight.std())
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return replace(detector, backbone=backbone)


@pytest.fixture
def chosen(
    place: Path, tmp_path: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> Parameters:
    """Parameters whose model is the user's, in a folder with an MLflow of its own."""
    shutil.copytree(place / "frozen", tmp_path / "frozen")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = parameters.load(place / "params.yaml")
    train = found.train.model_copy(update={"backbone": own_model.SPEC})
    settings = found.retrain.model_copy(update={"bootstrap": 200, "min_images": 20})
    return found.model_copy(update={"train": train, "retrain": settings})


def aliases() -> dict[str, str]:
    return registry.aliases_of(registry.registry(HERE), "opnp")


def registered() -> list[Any]:
    return list(registry.registry(HERE).search_model_versions("name = 'opnp'"))


def test_one_challenger_is_promoted_and_another_rejected(
    good: SavedDetector, chosen: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(retrain, "emit_event", lambda event, *_, **__: told.append(event))
    weak, worse = disturbed(good, 0.5), disturbed(good, 0.6)
    weak.save("weak")
    assert retrain.contend(HERE, Path("weak"), chosen) == "promoted"  # there is no champion
    good.save("good")
    assert retrain.contend(HERE, Path("good"), chosen) == "promoted"
    worse.save("worse")
    assert retrain.contend(HERE, Path("worse"), chosen) == "rejected"
    assert aliases() == {"champion": "2", "challenger": "3"}
    tags = registry.registry(HERE).get_model_version("opnp", "2").tags
    assert float(tags["contest.low"]) > 0
    assert float(tags["contest.fpr95"]) < float(tags["contest.champion_fpr95"])

    for name in ("weak", "good", "worse"):  # nothing twice
        assert retrain.contend(HERE, Path(name), chosen) == "unchanged"
    assert len(registered()) == 3
    assert aliases() == {"champion": "2", "challenger": "3"}
    assert told == [f"opnp.retrain.{each}" for each in ("promoted", "promoted", "rejected")]

    assert registry.rollback(HERE) == "1"
    assert (
        retrain.contend(HERE, Path("good"), chosen) == "unchanged"
    )  # what was rolled back stays so
    assert aliases()["champion"] == "1"

    frozen = Path("frozen/test.parquet")
    frozen.write_bytes(Path("frozen/ood/letters.parquet").read_bytes())
    other = disturbed(good, 0.01).save("other")
    with pytest.raises(InputError, match=r"test\.parquet is missing or not what was frozen"):
        retrain.contend(HERE, Path("other"), chosen)
    assert aliases()["champion"] == "1"
    assert other.digest


@pytest.mark.slow
def test_a_failure_leaves_the_champion_and_is_made_up_for(
    good: SavedDetector, chosen: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbed(good, 0.5).save("weak")
    retrain.contend(HERE, Path("weak"), chosen)
    good.save("good")

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError("no")

    for module, name in ((champion, "compare"), (dvc_repo, "push"), (registry, "promote")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            with pytest.raises(OSError, match="no"):
                retrain.contend(HERE, Path("good"), chosen)
        assert aliases()["champion"] == "1", name
    assert retrain.contend(HERE, Path("good"), chosen) == "promoted"
    assert aliases()["champion"] == "2"
    assert len(registered()) == 2


def test_better_but_less_accurate_is_rejected(
    good: SavedDetector, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A champion as accurate as the challenger, and one that is more so."""
    weak = disturbed(good, 0.5)
    verdict = champion.compare(good, weak, place / "frozen", resamples=200)
    assert verdict.promoted
    assert verdict.low is not None
    assert verdict.high is not None
    assert verdict.champion_fpr95 is not None
    assert verdict.low <= verdict.champion_fpr95 - verdict.fpr95 <= verdict.high
    true = champion.judged

    def less_accurate(detector: SavedDetector, *place: Any) -> Any:
        scores, accuracy = true(detector, *place)
        return scores, accuracy - (60 if detector is good else 0)

    monkeypatch.setattr(champion, "judged", less_accurate)
    assert not champion.compare(good, weak, place / "frozen", resamples=200).promoted
    assert champion.compare(good, weak, place / "frozen", 99, resamples=200).promoted


def test_the_same_detector_is_not_better(good: SavedDetector, place: Path) -> None:
    verdict = champion.compare(good, good, place / "frozen", resamples=50)
    assert (verdict.low, verdict.high, verdict.promoted) == (0, 0, False)


def test_images_that_were_trained_on_do_not_judge(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    champion.check_unseen(HERE, place / "frozen")
    shutil.copytree(place / "frozen", tmp_path / "frozen")
    shutil.copy2("data/train.parquet", tmp_path / "frozen" / "test.parquet")
    with pytest.raises(InputError, match=r"has seen what it is judged on"):
        champion.check_unseen(HERE, tmp_path / "frozen")


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"classes": ["a"], "sets": {"test": {}}}, r"`sets\.test\.sha256` is missing"),
        ({"classes": ["a"], "sets": {}}, "does not hold ID images and an OOD set"),
        ([], "manifest.json: "),
    ],
)
def test_a_manifest_of_no_evaluation_set_is_refused(
    manifest: Any, said: str, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=said):
        champion.frozen(tmp_path)


def test_another_evaluation_set_under_the_same_name_is_refused(
    good: SavedDetector, chosen: Parameters
) -> None:
    good.save("good")
    retrain.contend(HERE, Path("good"), chosen)
    with open("frozen/manifest.json", "a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="is not the evaluation set that detectors were compared"):
        retrain.check_frozen(registry.registry(HERE), Path("frozen"))


def test_monitor_counts_each_image_once(
    own: Path, good: SavedDetector, chosen: Parameters, tmp_path: Path
) -> None:
    recent = tmp_path / "recent"
    shutil.copytree(own / "images" / "test" / "six", recent)
    with pytest.raises(InputError, match="There is no champion"):
        monitor.watch(HERE, recent, chosen)
    good.save("good")
    retrain.contend(HERE, Path("good"), chosen)
    assert not monitor.watch(HERE, recent, chosen)
    assert not monitor.watch(HERE, recent, chosen)  # nothing is new
    shutil.copytree(own / "images" / "others", recent / "others")
    assert monitor.watch(HERE, recent, chosen)
    client = registry.registry(HERE)
    (run,) = client.search_runs(["1"], "tags.monitor != ''")
    history = client.get_metric_history(run.info.run_id, "images")
    counts = [len(list((own / "images" / each).iterdir())) for each in ("test/six", "others")]
    assert [(each.step, each.value) for each in history] == list(enumerate(counts))
    flagged = [m.value for m in client.get_metric_history(run.info.run_id, "flagged")]
    scores = load_detector("good", trust=own_model.SPEC).score(sorted(recent.glob("*.png")))
    assert flagged[0] == pytest.approx(100 * float(np.mean(scores.is_ood)))
    assert flagged[0] < 20 < flagged[1]


@pytest.mark.slow
def test_retraining_from_the_sources_on(
    tmp_path: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command makes a first champion; then, a better one, and one that is rejected."""
    folder = new_workspace(tmp_path, {**SMALLEST, "train.epochs": 1})
    done = run_program(
        "python", "-m", "flows.retrain", cwd=folder, env={"PREFECT_API_URL": prefect_api}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "retrain: version 1 promoted" in done.stdout
    monkeypatch.chdir(folder)
    # Which MLflow sets when it is used: put back afterwards.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    decisions = []
    for epochs in (1, 15, 2):
        set_parameters(folder, {"train.epochs": epochs})
        decisions.append(retrain.retrained(HERE))
    assert decisions == ["unchanged", "promoted", "rejected"]
    assert aliases() == {"champion": "2", "challenger": "3"}
