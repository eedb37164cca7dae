"""Detectors as folders: what they hold, what they say, and what is refused."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import opnp
from opnp import OPNP, SavedDetector
from opnp.data import images
from opnp.deployment import score as scoring
from opnp.deployment.folder import FILES, digest_of
from opnp.deployment.threshold import Threshold
from opnp.errors import InputError
from opnp.runtime.files import digest
from tests.helpers import own_model


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> SavedDetector:
    return opnp.load(detector_folder, trust=own_model.SPEC)


def paths(own: Path, part: str) -> list[Path]:
    return images.find(own / "images" / part).paths


def pixels(files: list[Path]) -> torch.Tensor:
    """As a user would read them."""
    stacked = np.stack([np.asarray(Image.open(path)) for path in files])
    return torch.from_numpy(stacked)[:, None].float() / 255


def test_it_scores_as_the_pruned_model(own: Path, detector: SavedDetector) -> None:
    """By another way: OPNP, the detector of pytorch-ood, on features the user computes."""
    files = paths(own, "others")[:50]
    model = own_model.backbone(own).classifier
    candidate = detector.candidate
    same = OPNP.from_mask(None, model.head, detector.mask, candidate.temperature)
    h = model.encoder((pixels(files) - 0.3) / 0.4)
    seen = h if candidate.clip is None else h.clamp(max=candidate.clip)
    expected = same.predict_features(seen)
    assert detector.mask.pruned > 0
    found = detector.score(files, batch_size=7)
    np.testing.assert_allclose(found.score, expected, atol=1e-5)
    np.testing.assert_allclose(detector.predict(pixels(files)).score, expected, atol=1e-5)
    np.testing.assert_array_equal(found.is_ood, found.score > detector.threshold.value)
    assert found.predicted == [own_model.CLASSES[label] for label in found.label]
    assert detector.score([Image.open(files[0])]).score[0] == pytest.approx(found.score[0])


def test_it_tells_what_the_model_has_not_learnt(own: Path, detector: SavedDetector) -> None:
    inside, outside = (detector.score(paths(own, part)) for part in ("test", "others"))
    assert inside.is_ood.mean() < 0.12
    assert outside.is_ood.mean() > 0.4
    named = [path.parent.name for path in paths(own, "test")]
    assert np.mean([a == b for a, b in zip(named, inside.predicted, strict=True)]) > 0.95


def test_the_threshold_accepts_its_share(own: Path, detector: SavedDetector) -> None:
    threshold, scores = detector.threshold, detector.score(paths(own, "validation"))
    assert threshold.accept == 95
    assert threshold.samples == len(scores)
    assert 0 <= (~scores.is_ood).mean() - 0.95 < 1 / len(scores) + 1e-9
    assert threshold.low is not None
    assert threshold.high is not None
    assert threshold.low < threshold.value < threshold.high


def one_to(n: int) -> torch.Tensor:
    """The scores 1 … n in random order: a score is its own rank."""
    return 1.0 + torch.randperm(n, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("accept", "value"), [(95, 95), (94.5, 95), (50, 50), (100, 100), (1, 1), (0.1, 1), (35, 35)]
)
def test_threshold_of_known_scores(accept: float, value: float) -> None:
    found = Threshold.of(one_to(100), accept)
    assert found.value == value
    assert found == Threshold.of(one_to(100).flip(0), accept)
    above = np.array([value, value + 0.5, np.nan], np.float32)
    assert found.is_ood(above).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("n", "accept", "low", "high"),
    [
        # 100 tosses of a coin: P(Y ≤ 39) = 1.8 %, P(Y ≤ 40) = 2.8 %; P(Y > 60) = 1.8 %.
        (100, 50, 40, 61),
        # 5 of 100 are expected above: P(≥ 11) = 1.1 %, P(≥ 10) = 2.8 %, P(0) = 0.6 %.
        (100, 95, 90, 100),
        (10, 50, 2, 9),  # P(Y ≤ 1) = 11/1024, P(Y ≤ 2) = 56/1024, and the same above
        (72, 95, 64, 72),  # P(none above) = 0.95**72 = 2.49 %
        (71, 95, 63, None),  # 2.62 %
        (4, 50, None, None),  # P(Y ≤ 0) = 1/16
        (1, 95, None, None),
        (5, 100, 5, None),
    ],
)
def test_the_interval_of_a_threshold_by_hand(
    n: int, accept: float, low: float | None, high: float | None
) -> None:
    found = Threshold.of(one_to(n), accept)
    assert (found.low, found.high) == (low, high)


def test_the_interval_of_the_threshold_covers_the_truth() -> None:
    """Ranks 184 and 197 of 200 hold the 95th percentile between them in 96.7 % of samples."""
    drawn = torch.Generator().manual_seed(0)
    found = [Threshold.of(torch.randn(200, generator=drawn)) for _ in range(400)]
    ends = [(each.low, each.high) for each in found]
    covered = np.mean([low <= 1.6449 <= high for low, high in ends if low and high])
    assert 0.94 < covered < 0.99


def test_it_holds_tensors_and_json_only(detector_folder: Path, detector: SavedDetector) -> None:
    assert {path.name for path in detector_folder.iterdir()} == {*FILES, "detector.json"}
    for name in FILES:
        assert load_file(detector_folder / name)
    about = json.loads((detector_folder / "detector.json").read_text())
    assert about["files"] == {name: digest(detector_folder / name) for name in FILES}
    assert about["preprocessing"] == {"size": 8, "mode": "L", "mean": [0.3], "std": [0.4]}
    assert about["made"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert json.loads(json.dumps(detector.describe())) == {
        key: value for key, value in about.items() if key not in ("opnp_detector", "files")
    }


def test_saving_again_gives_the_same_files(
    detector_folder: Path, detector: SavedDetector, tmp_path: Path
) -> None:
    assert detector.save(tmp_path / "again").digest == detector.digest
    for name in (*FILES, "detector.json"):
        assert digest(tmp_path / "again" / name) == digest(detector_folder / name)


def test_scoring_costs_what_classifying_costs(own: Path, detector: SavedDetector) -> None:
    """The same operations on tensors of the same shapes, and one more head."""
    plain = own_model.backbone(own).classifier
    unclipped = replace(detector, candidate=replace(detector.candidate, clip=None)).scorer

    def operations(model: torch.nn.Module, like: torch.Tensor) -> list[str]:
        graph = torch.export.export(model, (like,)).graph
        return [
            f"{node.target} {tuple(node.meta['val'].shape)}"
            for node in graph.nodes
            if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor)
        ]

    features = torch.rand(4, plain.head.in_features)
    assert operations(unclipped.pruned, features) == operations(plain.head, features)
    images = torch.rand(4, 1, 8, 8)
    classify, score = operations(plain, images), operations(unclipped, images)
    # Besides, normalization, the pruned head, and the energy of its K logits for each image.
    assert [each for each in classify if each not in score] == []
    assert len(score) - len(classify) <= 7
    count = [sum(p.numel() for p in each.parameters()) for each in (plain, unclipped)]
    assert count[1] - count[0] == sum(p.numel() for p in plain.head.parameters())


def damage_nothing(folder: Path) -> None:
    """So that the others are known to be the reason."""


def truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 1
        (folder / name).write_bytes(data)

    return damage


def edit(key: str, value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "detector.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return damage


def edit_and_sign(key: str, value: object) -> Callable[[Path], None]:
    """As someone who knows how the digest is made."""

    def damage(folder: Path) -> None:
        path = folder / "detector.json"
        about = json.loads(path.read_text()) | {key: value}
        del about["digest"]
        path.write_text(json.dumps(about | {"digest": digest_of(about)}))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        *((truncate(name), f"{name} is damaged") for name in FILES),
        *((flip(name), f"{name} is damaged") for name in FILES),
        *((lambda folder, n=name: (folder / n).unlink(), f"{name} is missing") for name in FILES),
        (truncate("detector.json"), "is not valid JSON"),
        (lambda folder: (folder / "detector.json").unlink(), "is not a detector"),
        (shutil.rmtree, "is not a detector"),
        (edit("threshold", {"value": 1e9}), "has been changed since it was written"),
        (edit("opnp_detector", 1), "does not describe a detector of format 2"),
        (edit_and_sign("threshold", {"value": 1e9}), r"`threshold\.accept` is missing"),
        (edit_and_sign("threshold", None), "`threshold`: "),
        (edit_and_sign("score", {"clip": None, "temperature": "1"}), r"`score\.temperature`: "),
        (edit_and_sign("mask", {}), r"`mask\.weights_low` is missing"),
        (edit_and_sign("classes", ["a"] * 7), "does not match the other files"),
        (edit_and_sign("files", None), "`files`: "),
        (edit_and_sign("model", {"name": "resnet"}), "wants to run the code of network:Network"),
    ],
)
def test_a_damaged_folder_is_refused(
    damage: Callable[[Path], object], said: str, detector_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(detector_folder, tmp_path / "detector")
    opnp.load(folder, trust=own_model.SPEC)
    damage(folder)
    with pytest.raises(InputError, match=said) as error:
        opnp.load(folder, trust=own_model.SPEC if "wants to run" not in said else None)
    assert "\n" not in str(error.value)


def test_files_of_another_detector_are_refused(
    own: Path, detector: SavedDetector, tmp_path: Path
) -> None:
    """Even with the right digests: the pruned head is not that of the mask."""
    other = replace(detector, mask=replace(detector.mask, weights=~detector.mask.weights))
    other.save(tmp_path / "other")
    detector.save(tmp_path / "detector")
    shutil.copy(tmp_path / "other" / "mask.safetensors", tmp_path / "detector")
    about = json.loads((tmp_path / "detector" / "detector.json").read_text())
    files = about["files"] | {"mask.safetensors": digest(tmp_path / "other" / "mask.safetensors")}
    edit_and_sign("files", files)(tmp_path / "detector")
    with pytest.raises(InputError, match="not its model's head, pruned"):
        opnp.load(tmp_path / "detector", trust=own_model.SPEC)


@pytest.mark.parametrize("trust", [None, "network:Other", "os:system"])
def test_code_runs_only_where_its_reader_names_it(
    trust: str | None, detector_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "network", raising=False)
    with pytest.raises(InputError, match="wants to run the code of network:Network"):
        opnp.load(detector_folder, trust=trust)
    assert "network" not in sys.modules


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.rand(2, 3, 8, 8), r"takes images \(N, 1, 8, 8\)"),
        (torch.rand(2, 1, 16, 16), r"takes images \(N, 1, 8, 8\)"),
        (torch.rand(1, 8, 8), r"takes images \(N, 1, 8, 8\)"),
        (torch.randn(2, 1, 8, 8), "before normalization"),
        (torch.full((2, 1, 8, 8), 200.0), "before normalization"),
        (torch.full((2, 1, 8, 8), 200, dtype=torch.uint8), "before normalization"),
        (torch.full((1, 1, 8, 8), float("nan")), "before normalization"),
    ],
)
def test_images_prepared_otherwise_are_refused(
    given: torch.Tensor, said: str, detector: SavedDetector
) -> None:
    with pytest.raises(InputError, match=said):
        detector.predict(given)


def test_images_and_features_of_any_kind(own: Path, detector: SavedDetector) -> None:
    given = pixels(paths(own, "test")[:5])
    expected = detector.predict(given).score
    for images_ in (given.double(), given.numpy(), given.numpy().astype(np.float64)):
        np.testing.assert_array_equal(detector.predict(images_).score, expected)
    np.testing.assert_allclose(detector.predict(given.half()).score, expected, atol=0.05)
    h = detector.features(given)
    for features in (h, h.double(), h.numpy(), h.tolist()):
        np.testing.assert_allclose(detector.predict_features(features).score, expected, atol=1e-5)
    with pytest.raises(InputError, match=r"Features must have shape \(N, 48\).*not \(5, 7\)"):
        detector.predict_features(h[:, :7])


def test_one_image_may_be_scored(own: Path, detector: SavedDetector) -> None:
    path = paths(own, "test")[0]
    expected = detector.score([path])
    for one in (path, str(path), Image.open(path)):
        found = detector.score(one)
        assert len(found) == 1
        assert found.score == expected.score
    assert len(detector.score(each for each in (path, path))) == 2
    with pytest.raises(InputError, match=r"not ndarray; `PIL\.Image\.fromarray` makes one"):
        detector.score([np.zeros((8, 8), np.uint8)])  # type: ignore[list-item]
    with pytest.raises(InputError, match="not int"):
        detector.score([3])  # type: ignore[list-item]


def test_scores_that_are_not_finite_are_not_evaluated(own: Path, detector: SavedDetector) -> None:
    """As nowhere else are they, since no metric is defined on them."""
    backbone = own_model.backbone(own)
    torch.nn.init.constant_(backbone.classifier.head.weight, 3e38)
    broken = replace(detector, backbone=backbone)
    inside, outside = (images.find(own / "images" / part) for part in ("test", "others"))
    first = inside.name(0)
    with pytest.raises(InputError, match=f"The score of {first} is NaN or infinite"):
        scoring.evaluate(broken, inside, {"others": outside})


def test_an_accepted_share_that_looks_like_a_fraction(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("opnp"), "propagate", True)
    for accept, warned in ((0.95, True), (95, False), (1, False)):
        caplog.clear()
        Threshold.of(torch.rand(100), accept)
        assert ["accept=0.95" in each.getMessage() for each in caplog.records] == [True] * warned


def test_images_that_are_none(detector: SavedDetector, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match=r"text\.png is not a whole image"):
        detector.score([tmp_path / "text.png"])
    with pytest.raises(InputError, match=r"absent\.png is missing"):
        detector.score([tmp_path / "absent.png"])
    with pytest.raises(InputError, match="no images to score"):
        detector.score([])


def test_a_detector_is_replaced_whole_or_not_at_all(
    detector: SavedDetector, tmp_path: Path
) -> None:
    place = tmp_path / "detector"
    detector.save(place)
    with pytest.raises(InputError, match="already holds a detector"):
        detector.save(place)
    unwritable = replace(detector, made={**detector.made, "note": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        unwritable.save(place, overwrite=True)
    assert opnp.load(place, trust=own_model.SPEC).digest == detector.digest
    noted = replace(detector, made={**detector.made, "note": "another"})
    assert noted.save(place, overwrite=True).digest != detector.digest
    assert opnp.load(place, trust=own_model.SPEC).made["note"] == "another"
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]


def test_nothing_else_is_replaced(detector: SavedDetector, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not a detector"):
        detector.save(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="is not a detector"):
        detector.save(tmp_path / "thesis.txt", overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
