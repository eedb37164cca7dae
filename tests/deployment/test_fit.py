"""Fitting to a user's model: what is chosen, what is kept, what is refused."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from opnp.backbones import encoding
from opnp.data import images
from opnp.data.families import DECIDING
from opnp.data.images import Images
from opnp.deployment import fit as fitting
from opnp.deployment.detector import SavedDetector
from opnp.deployment.settings import FitSettings
from opnp.errors import InputError
from opnp.pruning.clipping import clip_threshold
from opnp.pruning.energy import bias_of
from opnp.pruning.sensitivity import measure
from tests.helpers import own_model


@pytest.fixture
def fit(own: Path, tmp_path: Path) -> Callable[..., SavedDetector]:
    """Fit to the first images of each class, with a small search; shards of 32 images."""

    def run(
        train: Images | None = None,
        validation: Images | None = None,
        settings: FitSettings = own_model.QUICK,
        name: str = "features",
    ) -> SavedDetector:
        return fitting.fit(
            own_model.backbone(own),
            train or some(own / "images" / "train", 40),
            validation or some(own / "images" / "validation", 20),
            tmp_path / name,
            settings,
        )

    return run


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SHARD", 32)


def counted(patch: pytest.MonkeyPatch, stop: int | None = None) -> list[nn.Module]:
    """The encoder's runs from now on; Ctrl-C comes at the one after ``stop``."""
    runs: list[nn.Module] = []

    def encode(encoder: nn.Module, batches: Iterable[Tensor], device: torch.device) -> Tensor:
        if len(runs) == stop:
            raise KeyboardInterrupt
        runs.append(encoder)
        return encoding.encode(encoder, batches, device)

    patch.setattr(fitting, "encode", encode)
    return runs


def changed_settings(**values: Any) -> FitSettings:
    """The small search, with some of its settings changed."""
    return FitSettings(**(own_model.QUICK.model_dump() | values))


def some(folder: Path, count: int) -> Images:
    """So many of the images, evenly spaced over the classes."""
    found = images.find(folder)
    rows = [row * len(found) // count for row in range(count)]
    return found.select(rows)


def test_the_sensitivity_is_that_of_all_images(
    own: Path, fit: Callable[..., SavedDetector]
) -> None:
    """Streamed through shards of 32, as of all 40 at once."""
    detector, train = fit(), some(own / "images" / "train", 40)
    backbone = own_model.backbone(own)
    pixels = np.stack(
        [each for b in train.batches(backbone.preprocessing, range(40), 40) for each in b.pixels]
    )
    normalized = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.3) / 0.4
    h, head = backbone.classifier.encoder(normalized), backbone.classifier.head
    candidate = detector.candidate
    if candidate.clip is not None:
        assert candidate.clip == pytest.approx(clip_threshold(h, 90), abs=1e-5)
    [expected] = measure(h, head.weight, bias_of(head), [candidate.temperature], [candidate.clip])
    torch.testing.assert_close(detector.sensitivity.weights, expected.weights, atol=1e-6, rtol=1e-4)
    assert detector.sensitivity.count == 40
    assert detector.made["train"] == {"source": str(own / "images" / "train"), "images": 40}


def test_it_is_the_best_mask_within_noise(fit: Callable[..., SavedDetector]) -> None:
    found = fit().made["search"]
    assert found["candidates"] == 2 * 2 * 3 * 2 * 2
    assert found["fpr95"] <= found["unpruned"]["fpr95"]
    assert found["accuracy"] >= found["unpruned"]["accuracy"] - 1
    assert found["proxies"] == list(DECIDING)


def test_a_fit_that_was_stopped_goes_on(
    own: Path, fit: Callable[..., SavedDetector], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No whole shard is made twice, and the detector is the same."""
    whole = fit(name="whole")
    with monkeypatch.context() as patch:
        made = counted(patch, stop=3)
        with pytest.raises(KeyboardInterrupt):
            fit()
    again = counted(monkeypatch)
    resumed = fit()
    # Two shards of training images, one of validation, and a family of proxies each.
    assert len(made) == 3
    assert len(again) == 12
    assert resumed.threshold == whole.threshold
    assert torch.equal(resumed.mask.weights, whole.mask.weights)
    assert torch.equal(resumed.sensitivity.weights, whole.sensitivity.weights)


@pytest.mark.parametrize(
    "what", ["damaged", "another image", "another model", "another option", "another seed"]
)
def test_shards_of_something_else_are_made_again(
    what: str,
    own: Path,
    fit: Callable[..., SavedDetector],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied = shutil.copytree(own / "images" / "train", tmp_path / "train")
    train, settings = some(copied, 40), own_model.QUICK
    fit(train)
    expected = 0
    if what == "damaged":
        shard = tmp_path / "features" / "train" / "00001.arrow"
        data = bytearray(shard.read_bytes())
        data[-3] ^= 1
        shard.write_bytes(data)
        expected = 1
    elif what == "another image":
        shutil.copy(train.paths[1], train.paths[0])
        expected = 1
    elif what == "another model":
        monkeypatch.setattr(own_model, "backbone", lambda folder: changed(folder))
        expected = 2 + 1 + 12
    elif what == "another option":  # which may change what the same weights compute
        spec = {**original(own).spec, "slope": 0.1}
        monkeypatch.setattr(own_model, "backbone", lambda f: replace(original(f), spec=spec))
        expected = 2 + 1 + 12
    else:
        settings = changed_settings(seed=1)
        expected = 12
    again = counted(monkeypatch)
    fit(train, settings=settings)
    assert len(again) == expected


original = own_model.backbone


def changed(folder: Path) -> Any:
    backbone = original(folder)
    with torch.no_grad():
        next(backbone.classifier.parameters()).mul_(1.5)
    return backbone


def test_validation_without_labels(
    own: Path, fit: Callable[..., SavedDetector], tmp_path: Path
) -> None:
    """Agreement with the unpruned model stands in for accuracy: it agrees with itself."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in some(own / "images" / "validation", 20).paths:
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    detector = fit(validation=images.find(flat))
    assert detector.made["validation"]["labels"] == "none: agreement with the unpruned model"
    assert detector.made["search"]["unpruned"]["accuracy"] == 100
    assert fit().made["validation"]["labels"] == "given"


def test_folders_of_other_classes(
    own: Path, fit: Callable[..., SavedDetector], tmp_path: Path
) -> None:
    copied = shutil.copytree(own / "images" / "validation", tmp_path / "validation")
    (copied / "six").rename(copied / "seven")
    with pytest.raises(InputError, match=r"of some of the model's classes, but also .*'seven'"):
        fit(validation=images.find(copied))


def test_unreadable_images_up_to_a_limit(
    own: Path, fit: Callable[..., SavedDetector], tmp_path: Path
) -> None:
    copied = shutil.copytree(own / "images" / "train", tmp_path / "train")
    train = some(copied, 40)
    for path in train.paths[:2]:
        path.write_bytes(path.read_bytes()[:40])
    detector = fit(train)
    assert detector.sensitivity.count == 38
    assert [
        path.name in told
        for path, told in zip(train.paths, detector.made["unreadable"], strict=False)
    ] == [True] * 2
    strict = changed_settings(clip=(None,), max_unreadable=1)
    with pytest.raises(InputError, match="2 images cannot be read, more than the 1"):
        fit(train, settings=strict)
    for path in train.paths:
        path.write_bytes(b"none")
    lenient = changed_settings(clip=(None,), max_unreadable=100)
    with pytest.raises(InputError, match=r"No image of .*train can be read"):
        fit(train, settings=lenient)


def test_the_search_may_see_fewer_images_than_the_threshold(
    fit: Callable[..., SavedDetector],
) -> None:
    detector = fit(settings=changed_settings(clip=(None,), search_images=8))
    assert detector.made["search"]["images"] == 8
    assert detector.threshold.samples == 20


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"accept": 0.0}, "accept"),
        ({"accept": 101.0}, "accept"),
        (
            {"proxies": ("jigsaw",)},
            "no proxy 'jigsaw'; did you mean jigsaw-7, jigsaw-4 or jig",
        ),
        ({"proxies": ()}, "proxies"),
        ({"clip": (None, 0)}, "clip.1"),
        ({"clip": (90,)}, "`clip` must begin with no clipping"),
        ({"temperature": (0.0,)}, "temperature.0"),
        ({"weights_low": (60,), "weights_high": (50,)}, "together prune 100 % or more"),
        ({"search_images": 0}, "search_images"),
        ({"searched_images": 8}, "searched_images"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FitSettings(**values)


def test_what_is_found_where(own: Path, tmp_path: Path) -> None:
    found = images.find(own / "images" / "validation")
    labels = found.labels(own_model.CLASSES)
    assert labels is not None
    assert [own_model.CLASSES[label] for label in labels] == [p.parent.name for p in found.paths]
    assert images.find(own / "images" / "others").labels(own_model.CLASSES) is None
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="holds no image"):
        images.find(tmp_path)
    with pytest.raises(InputError, match="neither a file nor a folder"):
        images.find(tmp_path / "absent")
