"""A backbone that could not be loaded again is refused when it is made, not when it is loaded."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opnp.backbones import Backbone, Preprocessing, from_spec, load_backbone, save_backbone
from opnp.data import images
from opnp.deployment import fit
from opnp.errors import InputError
from tests.helpers import own_model

SMALL = Preprocessing(8, "RGB", (0.5,) * 3, (0.2,) * 3)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("opnp"), "propagate", True)
    return tmp_path


class Net(nn.Module):
    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU())
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(x))
        return logits


class Projected(Net):
    """Features go through a matrix that is drawn when the model is made, and is saved nowhere."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.drawn = torch.randn(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(x) @ self.drawn)
        return logits


class Hidden(Projected):
    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        drawn = self.drawn
        del self.drawn
        self.register_buffer("drawn", drawn, persistent=False)


class Kept(Projected):
    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        drawn = self.drawn
        del self.drawn
        self.register_buffer("drawn", drawn)


class Tied(Net):
    """A layer that is the same twice."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.second(self.first(self.body(x))))
        return logits


def half() -> nn.Module:
    return Net().half()


def double() -> nn.Module:
    return Net().double()


def meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


def overflowing() -> nn.Module:
    """Finite weights whose logits are not."""
    net = Net()
    nn.init.constant_(net.fc.weight, 3e38)
    return net


def failing() -> nn.Module:
    raise RuntimeError("no licence\nfor this")


def spec(what: Callable[..., nn.Module]) -> str:
    return f"{__name__}:{what.__name__}"


def made(what: Callable[..., nn.Module] = Net, classes: Any = None, **options: Any) -> Backbone:
    torch.manual_seed(0)
    return from_spec(spec(what), preprocessing=SMALL, classes=classes, **options)


def probe() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("what", [Net, Kept, Tied, half, double])
def test_what_is_made_is_saved_and_loaded(what: Callable[..., nn.Module]) -> None:
    backbone = made(what)
    save_backbone(Path("saved.safetensors"), backbone)
    again = load_backbone(Path("saved.safetensors"), spec(what))
    assert torch.equal(again.classifier(probe()), backbone.classifier(probe()))
    assert backbone.classifier.head.weight.dtype == torch.float32
    assert (again.classes, again.spec) == (backbone.classes, backbone.spec)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (Projected, "computes something else each time it is built, though its weights are the sa"),
        (Hidden, "computes something else each time it is built"),
        (meta, r"returns a model without data: `body\.1\.weight` is a meta tensor"),
        (overflowing, "The model Net returns NaN or infinite logits for images of noise"),
        (failing, r"failing cannot be built \(RuntimeError: no licence\)"),
    ],
)
def test_a_factory_of_no_use_is_refused(what: Callable[..., nn.Module], said: str) -> None:
    with pytest.raises(InputError, match=said):
        made(what)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (1, "at least 2 classes, with a logit each, not 1"),
        (0, "at least 2 classes, with a logit each, not 0"),
        (["cat"], "at least 2 classes, with a logit each, not 1"),
        ([], "No class is named, though the names of classes are given"),
        (["a", "b", "a", "c"], "Classes 0 and 2 are both 'a'"),
        (["a", "b", " ", "c"], "The name of class 2 is empty"),
        (["a", "b", "c", ""], "The name of class 3 is empty"),
        ("classes.txt", "must be a number or a list of names, not 'classes.txt'"),
    ],
)
def test_classes_that_are_not_any_are_refused(classes: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        made(classes=classes)


def test_a_model_of_one_logit_is_refused() -> None:
    net = Net(num_classes=1)
    torch.save(net.state_dict(), "one.pt")
    with pytest.raises(InputError, match=r"at least 2 classes.*the logits 0 and f are the same"):
        from_spec(spec(Net), "one.pt", SMALL)


@pytest.mark.parametrize(
    "classes",
    [("a", "b", "c", "d"), np.array(["a", "b", "c", "d"]), (each for each in "abcd"), [1, 2, 3, 4]],
)
def test_names_of_classes_become_a_list_of_strings(classes: Any) -> None:
    backbone = made(classes=classes)
    assert backbone.classes in (["a", "b", "c", "d"], ["1", "2", "3", "4"])
    assert all(type(name) is str for name in backbone.classes)
    assert made(classes=np.int64(4)).classes == ["0", "1", "2", "3"]


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}, np.float32(1)])
def test_options_that_no_file_holds_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match="options must be values of JSON"):
        made(width=value)


def changed(backbone: Backbone, change: Callable[[Tensor], Tensor]) -> Backbone:
    weight = backbone.classifier.head.weight
    backbone.classifier.head.weight = nn.Parameter(change(weight), requires_grad=False)
    return backbone


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda b: replace(b, classes=["a"] * 4), "Classes 0 and 1 are both 'a'"),
        (lambda b: replace(b, classes=["a"]), "has 4 classes, but 1 are named"),
        (lambda b: changed(b, lambda w: w * float("nan")), r"NaN or infinite values: `head\.weig"),
        (lambda b: changed(b, lambda w: w * float("inf")), "NaN or infinite values"),
        (lambda b: changed(b, lambda w: w.to_sparse()), r"that are sparse: `head\.weight`"),
        (lambda b: changed(b, lambda w: w.to("meta")), "without data"),
    ],
)
def test_a_backbone_of_no_use_is_not_saved(bad: Callable[[Backbone], Backbone], said: str) -> None:
    backbone = bad(made())
    with pytest.raises(InputError, match=said):
        save_backbone(Path("saved.safetensors"), backbone)
    assert not Path("saved.safetensors").exists()


def test_a_buffer_may_be_infinite() -> None:
    """As a mask of attention is."""
    backbone = made()
    mask = torch.full((2, 2), -float("inf"))
    backbone.classifier.encoder.register_buffer("mask", mask)
    save_backbone(Path("saved.safetensors"), backbone)
    mask[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinite values: `encoder\.mask`"):
        save_backbone(Path("saved.safetensors"), backbone)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0)),
        ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
        ((0.485, 0.456, 103.53), (0.2, 0.2, 0.2)),
        ((-127.5, -127.5, -127.5), (0.5, 0.5, 0.5)),
    ],
)
def test_a_preprocessing_of_pixels_up_to_255_is_refused(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    values = {"size": 8, "mode": "RGB", "mean": list(mean), "std": list(std)}
    Path("prep.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"pixels in \[0, 1\]: divide it by 255"):
        Preprocessing.stated(Path("prep.json"))
    Preprocessing.stated(values | {"mean": [0, 0.5, 1], "std": [1, 1 / 255, 0.5]})


def test_a_fit_refuses_a_backbone_that_could_not_be_loaded_again(own: Path) -> None:
    backbone = replace(own_model.backbone(own), classes=["zero"] * 7)
    train, validation = (images.find(own / "images" / part) for part in ("train", "validation"))
    with pytest.raises(InputError, match="Classes 0 and 1 are both 'zero'"):
        fit.fit(backbone, train, validation, Path("features"), own_model.QUICK)
    assert not Path("features").exists()


@pytest.mark.parametrize("what", ["order", "untrained", "nothing"])
def test_a_fit_warns_where_the_accuracy_is_near_chance(
    what: str, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = own_model.backbone(own)
    if what == "order":
        backbone = replace(backbone, classes=[*own_model.CLASSES[1:], own_model.CLASSES[0]])
    elif what == "untrained":
        torch.manual_seed(0)
        backbone.classifier.head.reset_parameters()
    train, validation = (images.find(own / "images" / part) for part in ("train", "validation"))
    settings = own_model.QUICK
    fit.fit(backbone, train, validation, Path("features"), settings)
    told = " ".join(record.getMessage() for record in caplog.records)
    if what == "nothing":
        assert "order of the logits" not in told
    elif what == "order":
        assert "would be for 9" in told
        assert "are the names of the classes in the order of the logits?" in told
    else:
        assert "near chance for 7 classes" in told
        assert "preprocessing" in told
