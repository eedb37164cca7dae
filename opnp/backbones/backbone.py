"""Backbones: an encoder that turns images into penultimate features, and a linear head.

One string says which, see `opnp.backbones.specs`: the name of a small network of
`opnp.backbones.networks`, ``torchvision:resnet50``, ``timm:vit_base_patch16_224``, or
``package.module:factory``, a function of the user's that returns a model.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opnp.backbones import heads, specs
from opnp.backbones.checkpoints import file_of, read_weights
from opnp.backbones.libraries import DEFAULT, architecture, assumed, called, weights_of
from opnp.backbones.matching import align, check_tensors, load_state
from opnp.backbones.networks import NETWORKS
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError
from opnp.runtime import tensors

__all__ = [
    "Backbone",
    "Classifier",
    "build",
    "check",
    "from_spec",
    "load_backbone",
    "save_backbone",
]


class Classifier(nn.Module):
    """A classifier as this project sees it: logits = head(encoder(images))."""

    def __init__(self, encoder: nn.Module, head: nn.Linear):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(images))
        return logits


@dataclass(frozen=True)
class Backbone:
    """A classifier and all that is needed to use it.

    Attributes:
        classifier: the encoder and the head.
        preprocessing: turns an image into the classifier's input.
        classes: names of the K classes, in the order of the logits.
        spec: ``name``, from which `build` makes the classifier, and its options.
    """

    classifier: Classifier
    preprocessing: Preprocessing
    classes: list[str]
    spec: dict[str, Any]


def check(backbone: Backbone, weights: str = "The weights of the model") -> None:
    """Refuse a backbone that could not be used, or not be loaded once it is saved.

    Args:
        backbone: whose classes and tensors are checked.
        weights: names its weights in errors, such as "The weights in FILE".

    Raises:
        InputError: the model has fewer than 2 classes; names of classes are missing, empty or
            given twice; or a tensor is sparse, without data or not finite.
    """
    count, names = backbone.classifier.head.out_features, backbone.classes
    check_count(count)
    if len(names) != count:
        raise InputError(f"The model has {count} classes, but {len(names)} are named.", "classes")
    place: dict[str, int] = {}
    for label, name in enumerate(names):
        if not name.strip():
            raise InputError(f"The name of class {label} is empty.", "classes")
        if place.setdefault(name, label) < label:
            raise InputError(f"Classes {place[name]} and {label} are both {name!r}.", "classes")
    check_tensors(backbone.classifier, weights)


def check_count(classes: int) -> None:
    """Refuse a number of classes for which there is nothing to classify."""
    if classes < 2:
        raise InputError(
            f"A classifier needs at least 2 classes, with a logit each, not {classes}. Where one "
            "logit f tells two classes apart, the logits 0 and f are the same classifier."
        )


def build(name: str, channels: int, classes: int, size: int = 32, **options: Any) -> Classifier:
    """An untrained classifier, except that a factory's model comes as the factory makes it.

    Args:
        name: of the model, see `opnp.backbones.specs`, without options.
        channels: channels of the images, 1 or 3.
        classes: K, at least 2.
        size: side of the images in pixels.
        options: ``width`` and ``depth`` of a small network, where L = 4 × width and depth is the
            number of blocks in each of three stages; of others, what the library's model or the
            factory takes.

    Raises:
        InputError: there is no such backbone, there are fewer than 2 classes, the images are too
            small, or the model has no linear head.
        UnavailableError: the library is not installed.
    """
    check_count(classes)
    if name not in NETWORKS:
        model = architecture(name, channels, size, classes, options)
        return divided(model, name, channels, size, classes)
    if name != "resnet" and size < 8:
        raise InputError(
            f"The backbone {name!r} needs images of at least 8 × 8 pixels, not {size} × {size}; "
            "'resnet' takes any."
        )
    options = {"width": 32, **options}
    encoder = called(name, partial(NETWORKS[name], channels, size), options)
    return Classifier(encoder, nn.Linear(4 * options["width"], classes))


def divided(
    model: nn.Module, name: str, channels: int, size: int, classes: int | None
) -> Classifier:
    """A model as encoder and head; see `opnp.backbones.heads`.

    Raises:
        InputError: it has no linear head, or another number of classes.
    """
    encoder, head = heads.split(model, probe(channels, size))
    check_count(head.out_features)
    if classes not in (None, head.out_features):
        raise InputError(f"{name} has {head.out_features} classes, not {classes}.", "classes")
    return Classifier(encoder, head)


def probe(channels: int, size: int) -> Tensor:
    """Two normalized images of noise, (2, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, size, size, generator=generator)


def from_spec(
    spec: str,
    weights: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    classes: int | Iterable[str] | None = None,
    **options: Any,
) -> Backbone:
    """A trained classifier.

    A model of a library is built as the library builds it for its published weights. Where a
    setting matters that no file of weights holds, a warning says what was assumed.

    Args:
        spec: the model, see `opnp.backbones.specs`.
        weights: a local file, ``FILE`` or ``FILE#KEY``, see `opnp.backbones.checkpoints`; or the
            library's name for its own, such as ``IMAGENET1K_V2`` (torchvision) or ``a1_in1k``
            (timm), which it downloads; None for those it uses by default. A factory's model keeps
            the weights that the factory gives it.
        preprocessing: of the images, unless the weights state it.
        classes: their number or their names, unless the weights state them.
        options: more options of the model, beside those in the spec; values that JSON has.

    Raises:
        InputError: there is no such model; the weights are missing, damaged or do not fit it; the
            preprocessing is unknown; the model has no linear head; or see `check`.
        UnavailableError: the weights cannot be downloaded, or the library is not installed.
    """
    name, stated_options = specs.parse(spec)
    options = as_json(stated_options | options)
    count, names = numbered(classes)
    if weights == "":
        raise InputError("The name of the weights is empty.", "weights")
    file = file_of(weights)
    state: Mapping[str, Tensor] = {}
    if file is not None and weights is not None:
        state, stated = read_weights(weights)
        if stated:
            return restored(file, state, stated, name, preprocessing, count, names, options)
    known = weights_of(name, file, DEFAULT if weights is None else str(weights))
    what = f"The weights in {file}" if file else f"The weights of {spec}"
    state = state or known.state
    preprocessing = preprocessing or known.preprocessing
    if preprocessing is None:
        raise InputError(
            f"{what} do not state the preprocessing of the images they were trained with.",
            "preprocessing",
        )
    shape = (preprocessing.channels, preprocessing.size)
    if state:
        options = assumed(name, state, options, None if known.published else str(file))
        if count is None and known.published and known.classes:
            count = len(known.classes)
        count = count or classes_of(name, shape, state, options)
    if name in NETWORKS:
        if count is None:
            raise InputError(f"{what} have no `head.weight` of {name!r}.", "weights")
        classifier = build(name, shape[0], count, size=shape[1], **options)
        load_state(classifier, state, what)
    else:
        model = architecture(name, *shape, count, options)
        if state:
            load_state(model, state, what)
            check_tensors(model, what)
        classifier = divided(model, name, *shape, count)
    count = classifier.head.out_features
    if names is None and known.classes is not None and len(known.classes) == count:
        names = known.classes
    names = names or [str(label) for label in range(count)]
    backbone = Backbone(finished(classifier), preprocessing, names, {"name": name, **options})
    check(backbone, what)
    if specs.is_factory(name):
        check_rebuilt(backbone)
    return backbone


def check_rebuilt(backbone: Backbone) -> None:
    """Refuse a factory whose models differ although their weights are the same.

    Raises:
        InputError: built again, the model gives other logits.
    """
    model, own = backbone.classifier, backbone.preprocessing
    name, shape = backbone.spec["name"], (own.channels, own.size)
    again = build(channels=shape[0], classes=len(backbone.classes), size=shape[1], **backbone.spec)
    load_state(again, model.state_dict(), f"The weights of {name}")
    images = probe(*shape)
    with torch.no_grad():
        if not heads.close(finished(again)(images), model(images)):
            raise InputError(
                f"{name} returns a model that computes something else each time it is built, "
                "though its weights are the same: keep what it draws at random, or reads from "
                "elsewhere, as a parameter or a buffer."
            )


def as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they come back from a file.

    Raises:
        InputError: one of them is not a value of JSON.
    """
    try:
        found: dict[str, Any] = json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"The model's options must be values of JSON ({error}).") from None
    return found


def numbered(classes: int | Iterable[str] | None) -> tuple[int | None, list[str] | None]:
    """The number of classes, and their names if they are given.

    Raises:
        InputError: they are neither a number from 2 on nor a list of at least 2 names.
    """
    if classes is None:
        return None, None
    if isinstance(classes, str):
        raise InputError(f"The classes must be a number or a list of names, not {classes!r}.")
    if not isinstance(classes, Iterable):
        check_count(int(classes))
        return int(classes), None
    names = [str(name) for name in classes]
    if not names:
        raise InputError("No class is named, though the names of classes are given.", "classes")
    check_count(len(names))
    return len(names), names


def classes_of(
    name: str, shape: tuple[int, int], state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> int | None:
    """The number of classes of the weights: that of their head."""
    if name in NETWORKS:
        model: nn.Module = build(name, shape[0], 2, size=shape[1], **options)
        head = "head"
    else:
        model = architecture(name, *shape, None, options)
        head = heads.find(model, probe(*shape))
    return len(align(state, model).get(f"{head}.weight", ())) or None


def restored(
    path: Path,
    state: Mapping[str, Tensor],
    stated: dict[str, Any],
    name: str,
    preprocessing: Preprocessing | None,
    count: int | None,
    names: list[str] | None,
    options: dict[str, Any],
) -> Backbone:
    """The backbone that `save_backbone` wrote, if it is what the caller says.

    Raises:
        InputError: it is another, or has other classes or another preprocessing.
    """
    check_stated(path, stated)
    own = Preprocessing.stated(stated["preprocessing"])
    classes: list[str] = stated["classes"]
    wanted: dict[str, Any] = {"name": name, **options}
    for what, theirs, ours in (
        ("backbone", {key: stated["spec"].get(key) for key in wanted}, wanted),
        ("preprocessing", own, preprocessing),
        ("number of classes", len(classes), count),
        ("classes", classes, names),
    ):
        if ours not in (None, theirs):
            raise InputError(f"{path} states the {what} {theirs}, not {ours}.", what.split()[-1])
    model = build(channels=own.channels, classes=len(classes), size=own.size, **stated["spec"])
    load_state(model, state, f"The weights in {path}")
    return Backbone(finished(model), own, classes, stated["spec"])


def check_stated(path: Path, stated: dict[str, Any]) -> None:
    """Refuse a file that does not say what its weights are of, as `save_backbone` does."""
    spec = stated.get("spec")
    if (
        set(stated) != {"preprocessing", "classes", "spec"}
        or not isinstance(stated["classes"], list)
        or not isinstance(spec, dict)
        or not isinstance(spec.get("name"), str)
    ):
        raise InputError(f"{path} holds weights, but not what they are of.", "stage:train")


def finished(model: Classifier) -> Classifier:
    """The model in evaluation mode, without gradients."""
    return model.eval().requires_grad_(False)


def save_backbone(path: Path, backbone: Backbone) -> None:
    """Write weights and all that is needed to use them as one safetensors file, atomically.

    Raises:
        InputError: see `check`.
    """
    check(backbone)
    metadata = {
        "preprocessing": backbone.preprocessing.as_json(),
        "classes": backbone.classes,
        "spec": backbone.spec,
    }
    tensors.save(path, apart(backbone.classifier.state_dict()), metadata)


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with memory of their own each, as safetensors wants them: some models use the
    same weights under two names."""
    seen: set[int] = set()
    found = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def load_backbone(path: Path, factory: str | None = None) -> Backbone:
    """Read what `save_backbone` wrote, in evaluation mode.

    A file never chooses the code that runs: if it names a factory, that must be the one its reader
    names.

    Args:
        path: the file.
        factory: the ``package.module:factory`` that may be imported and called; options after it
            are ignored, since the file states them.

    Raises:
        InputError: the file is missing or damaged, or names a factory that the caller does not.
    """
    state, metadata = tensors.load(path, "stage:train")
    check_stated(path, metadata)
    name = metadata["spec"]["name"]
    if not specs.trusts(name, factory):
        raise InputError(f"{path} wants to run the code of {name}, which is not trusted.", "trust")
    return restored(path, state, metadata, name, None, None, None, {})
