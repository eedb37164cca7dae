"""Backbones: an encoder that turns images into penultimate features, and a linear head.

One string says which: the name of a small network of `opnp.networks`, ``torchvision:resnet50``,
``timm:vit_base_patch16_224``, or ``package.module:factory``, a function of the user's that gives a
model.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from math import floor
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from opnp import heads, tensors
from opnp.decoding import INTERPOLATIONS, fit
from opnp.errors import InputError, UnavailableError
from opnp.files import digest
from opnp.networks import NETWORKS

__all__ = [
    "Backbone",
    "Classifier",
    "Preprocessing",
    "build",
    "from_spec",
    "is_factory",
    "load",
    "load_weights",
    "save",
]

DEFAULT = "DEFAULT"
"""The name of the weights that a library, or a factory, takes by itself."""


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the encoder sees it; it travels with the weights.

    Pillow scales, which antialiases always, as the evaluation transforms of torchvision and timm do
    that are given Pillow's images.

    Attributes:
        size: side of the square image in pixels.
        mode: ``L`` or ``RGB``, as in Pillow.
        mean: subtracted from pixels in [0, 1], one for each channel.
        std: divides what is left, one for each channel.
        resize: the shorter side is scaled to so many pixels, then the centre is cropped; without
            it the largest square in the centre is cropped, then scaled.
        interpolation: ``bilinear`` or ``bicubic``.

    Raises:
        InputError: one of them has no such value.
    """

    size: int
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        channels = {"L": 1, "RGB": 3}.get(self.mode)
        for name, sound, wanted in (
            ("size", is_count(self.size), "a number of pixels"),
            ("mode", channels is not None, "L or RGB"),
            ("mean", are_numbers(self.mean, channels), "a number for each channel"),
            (
                "std",
                are_numbers(self.std, channels) and min(self.std) > 0,
                "a number above 0 for each channel",
            ),
            (
                "resize",
                self.resize is None or (is_count(self.resize) and self.resize >= self.size),
                f"at least the size, {self.size}, or none",
            ),
            (
                "interpolation",
                self.interpolation in INTERPOLATIONS,
                " or ".join(INTERPOLATIONS),
            ),
        ):
            if not sound:
                value = getattr(self, name)
                raise InputError(f"The preprocessing's {name} must be {wanted}, not {value!r}.")

    @classmethod
    def measured(
        cls,
        pixels: NDArray[np.uint8],
        resize: int | None = None,
        interpolation: str = "bilinear",
    ) -> Self:
        """Mean and standard deviation of the training images, uint8 (N, H, W, C)."""
        scaled = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64) / 255
        return cls(
            size=pixels.shape[1],
            mode="L" if pixels.shape[-1] == 1 else "RGB",
            mean=tuple(round(float(value), 6) for value in scaled.mean(axis=0)),
            std=tuple(round(float(value), 6) for value in scaled.std(axis=0)),
            resize=resize,
            interpolation=interpolation,
        )

    @classmethod
    def stated(cls, values: Mapping[str, Any] | Path) -> Self:
        """As `as_json` has it, or a file of JSON.

        Raises:
            InputError: the file is missing or no JSON, or a value is absent, unknown or unsound.
        """
        where = "The preprocessing"
        if isinstance(values, Path):
            where = f"The preprocessing in {values}"
            try:
                values = json.loads(values.read_text())
            except (OSError, ValueError) as error:
                raise InputError(f"{where} cannot be read ({error}): state it there.") from None
        names = {each.name for each in fields(cls)}
        needed = {"size", "mode", "mean", "std"}
        if not isinstance(values, Mapping) or not needed <= set(values) <= names:
            raise InputError(
                f"{where} must state {', '.join(sorted(needed))}, and may state "
                f"{' and '.join(sorted(names - needed))}, and nothing else."
            )
        listed: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in values.items()
        }
        return cls(**listed)

    def as_json(self) -> dict[str, Any]:
        """By name, without what is as it is by default."""
        values = ((each.name, getattr(self, each.name), each.default) for each in fields(self))
        return {name: value for name, value, default in values if value != default}

    @property
    def channels(self) -> int:
        return len(self.mean)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """An image of any size and mode, scaled and cropped, uint8 (H, W, C)."""
        fitted = fit(image, self.size, self.mode, self.resize, self.interpolation)
        return np.array(fitted).reshape(self.size, self.size, self.channels)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images in [0, 1], float32 (N, C, H, W).

        Raises:
            InputError: they are of another size, or have other channels.
        """
        wanted = (self.channels, self.size, self.size)
        if tuple(images.shape[1:]) != wanted:
            raise InputError(
                f"The images are of shape {tuple(images.shape[1:])}, and the backbone wants "
                f"{wanted}: prepare them with its own preprocessing."
            )
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images - mean) / std


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def are_numbers(values: object, count: int | None) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(v, int | float) and np.isfinite(v) for v in values)
    )


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


@dataclass(frozen=True)
class Weights:
    """Trained weights, and what is known of them.

    Attributes:
        state: tensors by the names that the model has for them; none if a file has them.
        preprocessing: of the images they were trained for.
        classes: their names.
        options: what the model must be built with.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    classes: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)


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
    """A model as encoder and head; see `opnp.heads`.

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
    """The backbone that `save` wrote, if it is what the caller says.

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
    """Refuse a file that does not say what its weights are of, as `save` does."""
    spec = stated.get("spec")
    if (
        set(stated) != {"preprocessing", "classes", "spec"}
        or not isinstance(stated["classes"], list)
        or not isinstance(spec, dict)
        or not isinstance(spec.get("name"), str)
    ):
        raise InputError(
            f"{path} holds weights, but not what they are of: run `python -m flows.train` again."
        )


def finished(model: Classifier) -> Classifier:
    """In evaluation mode, and not to be trained."""
    return model.eval().requires_grad_(False)


# Libraries


def architecture(
    spec: str, channels: int, size: int, classes: int | None, options: Mapping[str, Any]
) -> nn.Module:
    """A model of a library, untrained, or of a factory, with its own number of classes if none."""
    library, _, name = spec.partition(":")
    if library not in ("torchvision", "timm"):
        factory = factory_of(spec)
        try:
            taken = list(inspect.signature(factory).parameters)
        except ValueError:  # as some that are written in C have none
            taken = []
        if "num_classes" in taken and classes is not None:
            options = {"num_classes": classes, **options}
        return called(spec, factory, options)
    if unsafe := [key for key, value in options.items() if not isinstance(value, int | float)]:
        raise InputError(f"{spec}: the option {unsafe[0]} must be a number, or true or false.")
    if classes is not None:
        options = {"num_classes": classes, **options}
    if library == "timm":
        timm = timm_with(name)
        options = {"in_chans": channels, **options}
        if timm.get_pretrained_cfg(name).fixed_input_size:
            options = {"img_size": size, **options}
        options = {"model_name": name, "pretrained": False, **options}
        return called(spec, timm.create_model, options)
    if channels != 3:
        raise InputError(f"{spec} wants images of 3 channels, not {channels}: take the mode RGB.")
    if name.startswith("vit_"):
        options = {"image_size": size, **options}
    if name in ("inception_v3", "googlenet"):  # whose own initialization takes a minute
        options = {"init_weights": False, **options}
    return called(spec, torchvision_model(name), {"weights": None, **options})


def called(spec: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> nn.Module:
    """The model that a function makes.

    Raises:
        InputError: it refuses the options, or gives no `torch.nn.Module`.
    """
    try:
        model = factory(**options)
    except (TypeError, ValueError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{spec} cannot be made ({reason}): correct its options.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} gives {type(model).__name__}, no torch.nn.Module: correct it.")
    return model


def factory_of(spec: str) -> Callable[..., Any]:
    """The function that ``package.module:factory`` names."""
    place, colon, name = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in [*place.split("."), name]):
        raise InputError(
            f"There is no backbone {spec!r}: set train.backbone to one of {', '.join(NETWORKS)}, "
            "torchvision:NAME, timm:NAME or package.module:factory."
        )
    try:
        factory = getattr(import_module(place), name)
    except ImportError as error:
        raise InputError(f"{spec} cannot be imported ({error}): install or correct it.") from error
    except AttributeError:
        raise InputError(f"The module {place} has no {name!r}: correct {spec}.") from None
    if not callable(factory):
        raise InputError(f"{spec} is no function: name one that gives the model.")
    return factory


def is_factory(spec: str) -> bool:
    """Whether a spec names code of the user's."""
    return spec not in NETWORKS and spec.partition(":")[0] not in ("torchvision", "timm")


def torchvision_model(name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    offered = models.list_models(module=models)
    if name not in offered:
        near = get_close_matches(name, offered, 1, cutoff=0)[0]
        raise InputError(f"torchvision has no model {name!r}; did you mean `torchvision:{near}`?")
    return models.get_model_builder(name)


def timm_with(name: str) -> Any:
    """The library timm, if it is there and has a model of that name, with or without a tag.

    Names that make timm read a configuration from elsewhere are none of a model.
    """
    try:
        import timm
    except ImportError as error:
        raise UnavailableError(
            f"timm:{name} needs the library timm ({error}): pip install 'opnp[timm]'."
        ) from None
    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        near = get_close_matches(plain, timm.list_models(), 1, cutoff=0)[0]
        raise InputError(f"timm has no model {plain!r}; did you mean `timm:{near}`?")
    tags = timm.list_pretrained(f"{plain}.*") if tag else []
    if tag and name not in tags:
        raise InputError(f"timm has no weights {tag!r} of {plain}: {offer(plain, tags)}.")
    return timm


def offer(plain: str, tags: Sequence[str]) -> str:
    return f"take one of {', '.join(tag.removeprefix(f'{plain}.') for tag in tags) or 'none'}"


def weights_of(spec: str, file: Path | None, name: str) -> Weights:
    """A library's own weights of that name; or what it says of those in a file."""
    library, _, model = spec.partition(":")
    if library == "torchvision":
        return torchvision_weights(model, file, name)
    if library == "timm":
        return timm_weights(model, file, name)
    if file is None and spec in NETWORKS:
        raise InputError(
            f"The backbone {spec!r} is trained here and comes with no weights: name a file."
        )
    if file is None and name != DEFAULT:
        raise InputError(
            f"The weights {name!r} of {spec} are no file, and a factory's have no names: name a "
            ".safetensors, .pt or .pth file, or leave the factory its own."
        )
    return Weights()


def torchvision_weights(model: str, file: Path | None, name: str) -> Weights:
    """torchvision's weights by name, or, by the hash in the address they have there, by file."""
    from torchvision import models

    offered = models.get_model_weights(torchvision_model(model))
    if file is None:
        if name not in offered.__members__:
            raise InputError(
                f"torchvision has no weights {name!r} of {model}: take one of "
                f"{', '.join(offered.__members__) or 'none'}."
            )
        entry = offered[name]
        try:
            state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise UnavailableError(
                f"The weights {name} of torchvision:{model} could not be had ({error}): download "
                f"{entry.url} where you can, and name the file."
            ) from error
    else:
        sha256, state = digest(file), {}
        named = ((re.search(r"-([0-9a-f]{8,})\.", each.url), each) for each in offered)
        entry = next((each for found, each in named if found and sha256.startswith(found[1])), None)
        if entry is None:
            return Weights()
    # The pretrained networks of these two normalize again, and the others cannot.
    options = {"transform_input": True} if model in ("inception_v3", "googlenet") else {}
    return Weights(
        state, of_torchvision(entry.transforms()), list(entry.meta["categories"]), options
    )


def of_torchvision(transforms: Any) -> Preprocessing:
    """The preprocessing that torchvision's ``ImageClassification`` does."""
    return Preprocessing(
        size=transforms.crop_size[0],
        mode="RGB",
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        resize=transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
    )


def timm_weights(model: str, file: Path | None, name: str) -> Weights:
    """timm's weights by their tag; of a file, what timm says of the tag in the model's name."""
    plain, _, tag = model.partition(".")
    timm = timm_with(model)
    if file is not None and not tag:
        return Weights()
    if file is None and name != DEFAULT:
        if tag not in ("", name):
            raise InputError(f"timm:{model} names other weights than {name}: name one of them.")
        tag = name
    tagged = f"{plain}.{tag}" if tag else plain
    timm_with(tagged)
    state: dict[str, Tensor] = {}
    if file is None:
        try:
            state = timm.create_model(tagged, pretrained=True).state_dict()
        except Exception as error:  # its hub has exceptions of many libraries
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UnavailableError(
                f"The weights of timm:{tagged} could not be had ({reason}): download them where "
                "you can, and name the file."
            ) from error
    config = timm.get_pretrained_cfg(tagged)
    return Weights(state, of_timm(config.to_dict(), tagged), timm_classes(config))


def of_timm(config: Mapping[str, Any], name: str) -> Preprocessing:
    """The preprocessing that timm's evaluation transform does.

    Raises:
        InputError: it is neither square nor a crop of the centre.
    """
    from timm.data import resolve_data_config

    data = resolve_data_config(pretrained_cfg=dict(config))
    channels, height, width = data["input_size"]
    if data["crop_mode"] != "center" or height != width:
        raise InputError(
            f"timm prepares images for {name} by a {data['crop_mode']} of {height} × {width}, not "
            "by a crop of the centre: state a preprocessing."
        )
    return Preprocessing(
        size=height,
        mode="RGB" if channels == 3 else "L",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        resize=floor(height / data["crop_pct"]),
        interpolation=data["interpolation"],
    )


def timm_classes(config: Any) -> list[str] | None:
    """Names of the classes, where timm knows the data set."""
    from timm.data import ImageNetInfo

    if config.num_classes != 1000:
        return None
    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(1000)]


# Files


def file_of(weights: str | Path | None) -> Path | None:
    """The file that is meant, unless it is the name of a library's weights."""
    if weights is None:
        return None
    path = Path(weights)
    named = isinstance(weights, Path) or path.suffix in (".safetensors", ".pt", ".pth")
    return path if named or len(path.parts) > 1 or path.is_file() else None


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict, also one wrapped as ``state_dict`` or ``model`` or named ``module.…``.

    Returns:
        Tensors by name, and what `save` stated beside them: ``preprocessing``, ``classes`` and
        ``spec``; nothing for a file of another origin.

    Raises:
        InputError: the file is missing, damaged or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Checkpoint {path} is missing: correct train.checkpoint.")
    state: Any = {}
    metadata: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        state, metadata = tensors.load(path, "replace the checkpoint")
    elif path.suffix in (".pt", ".pth"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises almost anything on a damaged file
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"Checkpoint {path} cannot be read ({reason}): replace it.") from None
        for wrapper in ("state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                if any(isinstance(each, Tensor) for each in state.values()):
                    break
                state = state[wrapper]
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise InputError(f"Checkpoint {path} holds no state dict: save `model.state_dict()`.")
    else:
        raise InputError(f"Checkpoint {path} is neither .safetensors, .pt nor .pth: convert it.")
    if state and all(name.startswith("module.") for name in state):  # as DataParallel names them
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state, metadata


def load_weights(model: nn.Module, path: Path) -> dict[str, Any]:
    """Load a checkpoint (.safetensors; .pt or .pth, never unpickling code) into ``model``.

    Returns:
        What `save` stated beside the weights; nothing for a file of another origin.

    Raises:
        InputError: the file is missing, damaged, of another format or for another model.
    """
    state, metadata = read_weights(path)
    load_state(model, state, path)
    return metadata


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path | str) -> None:
    """Load weights by name, and refuse those whose names or shapes are not the model's."""
    # torchvision's oldest files of DenseNets are from when a module's name could have a dot.
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
    state = {old.sub(r"\1\2", name): tensor for name, tensor in state.items()}
    expected = model.state_dict()
    for name in [*expected, *(key for key in state if key not in expected)]:
        theirs, ours = (tuple(s[name].shape) if name in s else None for s in (state, expected))
        if theirs != ours:
            raise InputError(
                f"Checkpoint {path} is for another model: `{name}` is "
                f"{'absent' if theirs is None else theirs} there and "
                f"{'absent' if ours is None else ours} here; set train.backbone, "
                "width and depth, and the classes, to what it was trained with."
            )
    model.load_state_dict(state)


def save(path: Path, backbone: Backbone) -> None:
    """Write weights and all that is needed to use them as one safetensors file, atomically."""
    metadata = {
        "preprocessing": backbone.preprocessing.as_json(),
        "classes": backbone.classes,
        "spec": backbone.spec,
    }
    tensors.save(path, backbone.classifier.state_dict(), metadata)


def load(path: Path, factory: str | None = None) -> Backbone:
    """Read what `save` wrote, in evaluation mode.

    A file never chooses the code that runs: if it names a factory, that must be the one its reader
    names.

    Args:
        path: the file.
        factory: the ``package.module:factory`` that may be imported and called.

    Raises:
        InputError: the file is missing or damaged, or names a factory that the caller does not.
    """
    state, metadata = tensors.load(path, "run `python -m flows.train` again")
    check_stated(path, metadata)
    name = metadata["spec"]["name"]
    if is_factory(name) and name != factory:
        raise InputError(
            f"{path} wants to run the code of {name}: name it yourself (train.backbone), if you "
            "trust it."
        )
    return restored(path, state, metadata, name, None, None, {})
