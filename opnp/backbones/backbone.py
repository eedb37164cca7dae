"""Backbones: an encoder that turns images into penultimate features, and a linear head.

One string says which: the name of a small network of `opnp.backbones.networks`,
``torchvision:resnet50``, ``timm:vit_base_patch16_224``, or ``package.module:factory``, a function
of the user's that gives a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from opnp.backbones import heads
from opnp.backbones.checkpoints import file_of, load_state, read_weights
from opnp.backbones.libraries import DEFAULT, architecture, called, is_factory, weights_of
from opnp.backbones.networks import NETWORKS
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError
from opnp.runtime import tensors

__all__ = ["Backbone", "Classifier", "build", "from_spec", "load_backbone", "save_backbone"]


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
        classifier: its encoder and its head.
        preprocessing: of the images it takes.
        classes: names of the K classes, in the order of the logits.
        spec: ``name``, the string that `build` makes it of, and options.
    """

    classifier: Classifier
    preprocessing: Preprocessing
    classes: list[str]
    spec: dict[str, Any]


def build(name: str, channels: int, classes: int, size: int = 32, **options: Any) -> Classifier:
    """An untrained classifier; but a factory's, which comes as the factory makes it.

    Args:
        name: see the module.
        channels: of the images, 1 or 3.
        classes: K, at least 2.
        size: side of the images in pixels.
        options: of a small network ``width``, where L = 4 × width, and ``depth``, the blocks in
            each of three stages; of others what the library's model or the factory takes.

    Raises:
        InputError: there is no such backbone, fewer than 2 classes, the images are too small, or
            the model has no linear head.
        UnavailableError: the library is not installed.
    """
    if classes < 2:
        raise InputError(
            f"A classifier needs at least 2 classes, not {classes}: hold out fewer (data.held_out)."
        )
    if name not in NETWORKS:
        model = architecture(name, channels, size, classes, options)
        return divided(model, name, channels, size, classes)
    if name != "resnet" and size < 8:
        raise InputError(
            f"The backbone {name!r} needs images of at least 8 pixels, not {size}: set "
            "data.image_size, or train.backbone to resnet."
        )
    options = {"width": 32, **options}
    encoder = called(name, partial(NETWORKS[name], channels, size), options)
    return Classifier(encoder, nn.Linear(4 * options["width"], classes))


def divided(
    model: nn.Module, spec: str, channels: int, size: int, classes: int | None
) -> Classifier:
    """A model as encoder and head; see `opnp.backbones.heads`.

    Raises:
        InputError: it has no linear head, or another number of classes.
    """
    encoder, head = heads.split(model, probe(channels, size))
    if classes not in (None, head.out_features):
        raise InputError(f"{spec} has {head.out_features} classes, not {classes}: take those.")
    return Classifier(encoder, head)


def probe(channels: int, size: int) -> Tensor:
    """Two normalized images of noise, (2, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, size, size, generator=generator)


def from_spec(
    spec: str,
    weights: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    classes: int | Sequence[str] | None = None,
    **options: Any,
) -> Backbone:
    """A trained classifier.

    Args:
        spec: see the module.
        weights: a local file (.safetensors; .pt or .pth, never unpickling code); or the library's
            name for its own, such as ``IMAGENET1K_V2`` (torchvision) or ``a1_in1k`` (timm), which
            it downloads; without it, those it takes by itself. A factory's model keeps its own.
        preprocessing: of the images, if it is not what the weights state.
        classes: how many, or their names, if the weights do not say.
        options: more arguments of the model: ``width`` and ``depth`` of a small network, what the
            library's function takes (numbers), or what the factory takes.

    Raises:
        InputError: there is no such model, the weights are missing, damaged or of another model,
            what they want of images is unknown, or the model has no linear head.
        UnavailableError: the weights cannot be downloaded now, or the library is not installed.
    """
    file = file_of(weights)
    state: dict[str, Tensor] = {}
    if file is not None:
        state, stated = read_weights(file)
        if stated:
            return restored(file, state, stated, spec, preprocessing, classes, options)
    published = weights_of(spec, file, DEFAULT if weights is None else str(weights))
    state, options = state or published.state, published.options | options
    preprocessing = preprocessing or published.preprocessing
    where = str(file or f"of {spec}")
    if preprocessing is None:
        raise InputError(
            f"What the weights {where} want of images is not known: state the preprocessing they "
            "were trained with."
        )
    names = list(classes) if isinstance(classes, Sequence) else None
    if published.classes and classes in (None, len(published.classes)):
        names = published.classes
    count = len(names) if names else cast(int | None, classes)
    shape = (preprocessing.channels, preprocessing.size)
    if spec in NETWORKS:
        count = count or len(state.get("head.weight", ()))
        classifier = build(spec, shape[0], count, size=shape[1], **options)
        load_state(classifier, state, where)
    else:
        model = architecture(spec, *shape, count, options)
        if state and count is None:  # as many as the file has
            head = heads.find(model, probe(*shape))
            model = architecture(
                spec, *shape, len(state.get(f"{head}.weight", ())) or None, options
            )
        if state:
            load_state(model, state, where)
        classifier = divided(model, spec, *shape, count)
    names = names or [str(index) for index in range(classifier.head.out_features)]
    return Backbone(finished(classifier), preprocessing, names, {"name": spec, **options})


def restored(
    path: Path,
    state: dict[str, Tensor],
    stated: dict[str, Any],
    spec: str,
    preprocessing: Preprocessing | None,
    classes: int | Sequence[str] | None,
    options: dict[str, Any],
) -> Backbone:
    """The backbone that `save_backbone` wrote, if it is what the caller says.

    Raises:
        InputError: it is another, or has other classes or another preprocessing.
    """
    check_stated(path, stated)
    own = Preprocessing.stated(stated["preprocessing"])
    names: list[str] = stated["classes"]
    wanted: dict[str, Any] = {"name": spec, **options}
    for what, theirs, ours in (
        ("backbone", {key: stated["spec"].get(key) for key in wanted}, wanted),
        ("preprocessing", own, preprocessing),
        ("number of classes", len(names), classes if isinstance(classes, int) else None),
        ("classes", names, list(classes) if isinstance(classes, Sequence) else None),
    ):
        if ours not in (None, theirs):
            raise InputError(f"{path} is of the {what} {theirs}, not {ours}: state what it is of.")
    model = build(channels=own.channels, classes=len(names), size=own.size, **stated["spec"])
    load_state(model, state, path)
    return Backbone(finished(model), own, names, stated["spec"])


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
    """In evaluation mode, and not to be trained."""
    return model.eval().requires_grad_(False)


def save_backbone(path: Path, backbone: Backbone) -> None:
    """Write weights and all that is needed to use them as one safetensors file, atomically."""
    metadata = {
        "preprocessing": backbone.preprocessing.as_json(),
        "classes": backbone.classes,
        "spec": backbone.spec,
    }
    tensors.save(path, backbone.classifier.state_dict(), metadata)


def load_backbone(path: Path, factory: str | None = None) -> Backbone:
    """Read what `save_backbone` wrote, in evaluation mode.

    A file never chooses the code that runs: if it names a factory, that must be the one its reader
    names.

    Args:
        path: the file.
        factory: the ``package.module:factory`` that may be imported and called.

    Raises:
        InputError: the file is missing or damaged, or names a factory that the caller does not.
    """
    state, metadata = tensors.load(path, "stage:train")
    check_stated(path, metadata)
    name = metadata["spec"]["name"]
    if is_factory(name) and name != factory:
        raise InputError(
            f"{path} wants to run the code of {name}: name it yourself (train.backbone), if you "
            "trust it."
        )
    return restored(path, state, metadata, name, None, None, {})
