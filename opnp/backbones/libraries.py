"""Models and published weights of torchvision and timm, and models of the user's own factories."""

import inspect
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from math import floor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opnp.backbones import specs
from opnp.backbones.networks import NETWORKS
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError, UnavailableError, did_you_mean, first_line
from opnp.runtime.files import digest

__all__: list[str] = []

logger = logging.getLogger(__name__)

DEFAULT = "DEFAULT"
"""The name of the weights that a library or a factory uses when none are named."""

RESERVED = {
    "cache_dir", "checkpoint_path", "model_name", "pretrained", "pretrained_cfg",
    "pretrained_cfg_overlay", "weights", "weights_backbone",
}  # fmt: skip
"""Options of the libraries that say where weights come from, which no file may decide."""

AUXILIARY = {"inception_v3": "AuxLogits", "googlenet": "aux1"}
"""An auxiliary head of the models that may be built without it; both also normalize their input
once more if they are built with ``transform_input``, as their published weights want it."""


@dataclass(frozen=True)
class Weights:
    """Published weights, and what is known of them.

    Attributes:
        state: tensors by their names in the model; empty if they are in the user's file.
        preprocessing: of the images they were trained for; None if unknown.
        classes: names of the classes; None if unknown.
        published: whether these are the weights that the library publishes.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    classes: list[str] | None = None
    published: bool = False


def architecture(
    name: str, channels: int, size: int, classes: int | None, options: Mapping[str, Any]
) -> nn.Module:
    """An untrained model of a library, or whatever a factory returns, in float32 on the CPU.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME`` or ``package.module:factory``.
        channels: channels of the images.
        size: side of the images in pixels.
        classes: number of classes; None for the model's default.
        options: more arguments of the library's function or of the factory.

    Raises:
        InputError: there is no such model or factory, or it refuses the options.
        UnavailableError: the library is not installed.
    """
    library, _, model = name.partition(":")
    if library not in ("torchvision", "timm"):
        return of_factory(name, classes, options)
    for key, value in options.items():
        if key in RESERVED or not is_plain(value, strings=library == "timm"):
            words = ", or a word" if library == "timm" else ""
            raise InputError(
                f"{name} does not take the option {key}={value!r}: options of a library's model "
                f"are numbers, true or false, or lists of them{words}, and never name weights.",
                "backbone",
            )
    if classes is not None:
        options = {"num_classes": classes, **options}
    if library == "timm":
        timm = timm_with(model)
        options = {"in_chans": channels, **options}
        if timm.get_pretrained_cfg(model).fixed_input_size:
            options = {"img_size": size, **options}
        return called(name, timm.create_model, {"model_name": model, "pretrained": False} | options)
    if channels != 3:
        raise InputError(f"{name} takes images of 3 channels (mode RGB), not {channels}.")
    if model.startswith("vit_"):
        options = {"image_size": size, **options}
    if model in AUXILIARY:  # their own initialization takes a minute
        options = {"init_weights": False, **options}
    return called(name, torchvision_model(model), {"weights": None, **options})


def is_plain(value: object, strings: bool) -> bool:
    """Whether an option of a library's model is of a kind that can only set a hyperparameter."""
    if isinstance(value, list):
        return all(is_plain(each, strings) for each in value)
    if isinstance(value, str):
        return strings and re.fullmatch(r"\w+", value) is not None
    return value is None or isinstance(value, int | float)


def assumed(
    name: str, state: Iterable[str], options: Mapping[str, Any], where: str | None
) -> dict[str, Any]:
    """Options with which a model's published weights are used, and which no file of weights states.

    Args:
        name: the model.
        state: names of its weights.
        options: what the user states, which is left as it is.
        where: the file of the weights, if it is not known to be the published one: then a warning
            says what is assumed.

    Returns:
        The options, these included.
    """
    library, _, model = name.partition(":")
    if library != "torchvision" or model not in AUXILIARY:
        return dict(options)
    auxiliary = any(AUXILIARY[model] in key.split(".") for key in state)
    found = {"transform_input": True, "aux_logits": auxiliary, **options}
    if where is not None and "transform_input" not in options:
        logger.warning(
            "%s does not say whether its %s normalizes images once more (transform_input). It is "
            "built to do so, as torchvision builds it for its published weights. If it was trained "
            "without, name the model %s.",
            where,
            model,
            specs.write(name, **{**options, "transform_input": False}),
        )
    return found


def of_factory(spec: str, classes: int | None, options: Mapping[str, Any]) -> nn.Module:
    """The model that a user's factory returns, given the number of classes if it takes one."""
    factory = factory_of(spec)
    try:
        taken = list(inspect.signature(factory).parameters)
    except ValueError:  # some that are written in C have no signature
        taken = []
    if "num_classes" in taken and classes is not None:
        options = {"num_classes": classes, **options}
    model = called(spec, factory, options)
    if empty := next((key for key, each in model.state_dict().items() if each.is_meta), None):
        raise InputError(f"{spec} returns a model without data: `{empty}` is a meta tensor.")
    return model.to("cpu", torch.float32)


def called(spec: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> nn.Module:
    """The model that a function makes.

    Raises:
        InputError: it refuses the options, or does not return a `torch.nn.Module`.
    """
    try:
        model = factory(**options)
    except Exception as error:  # a user's code may raise anything
        raise InputError(f"{spec} cannot be built ({reason(error)}).", "backbone") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} returns {type(model).__name__}, not a torch.nn.Module.")
    return model


def reason(error: Exception) -> str:
    """What an error says, with its type where this says more."""
    told = first_line(error)
    ordinary = isinstance(error, ImportError | TypeError | ValueError)
    name = type(error).__name__
    return told if ordinary or told == name else f"{name}: {told}"


def factory_of(spec: str) -> Callable[..., Any]:
    """The function that ``package.module:factory`` names.

    Raises:
        InputError: there is no such function.
    """
    place, colon, name = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in [*place.split("."), name]):
        raise InputError(
            f"There is no backbone {spec!r}; it is one of {', '.join(NETWORKS)}, torchvision:NAME, "
            "timm:NAME or package.module:factory.",
            "backbone",
        )
    try:
        module = import_module(place)
    except Exception as error:  # a user's code may raise anything
        raise InputError(f"{spec} cannot be imported ({reason(error)}).", "backbone") from error
    factory = getattr(module, name, None)
    if factory is None:
        raise InputError(f"The module {place} has no {name!r}.", "backbone")
    if not callable(factory):
        raise InputError(f"{spec} is not a function that returns a model.", "backbone")
    return factory


def torchvision_model(name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    offered = models.list_models(module=models)
    if name not in offered:
        near = did_you_mean(name, offered, "`torchvision:{}`")
        raise InputError(f"torchvision has no model {name!r}; {near}")
    return models.get_model_builder(name)


def timm_with(name: str) -> Any:
    """The library timm, if it is installed and has a model of that name, with or without a tag.

    Names that make timm read a configuration from elsewhere are refused.
    """
    try:
        import timm
    except ImportError as error:
        raise UnavailableError(
            f"timm:{name} needs the library timm ({error}): pip install 'opnp[timm]'."
        ) from None
    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        near = did_you_mean(plain, timm.list_models(), "`timm:{}`")
        raise InputError(f"timm has no model {plain!r}; {near}")
    tags = timm.list_pretrained(f"{plain}.*") if tag else []
    if tag and name not in tags:
        known = [each.removeprefix(f"{plain}.") for each in tags]
        raise InputError(
            f"timm has no weights {tag!r} of {plain}; it has {listed(known)}.", "weights"
        )
    return timm


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def weights_of(spec: str, file: Path | None, name: str) -> Weights:
    """A library's weights by name, or what the library says of those in a file.

    Args:
        spec: the model, without options.
        file: the user's file of weights.
        name: the name of the weights, where there is no file.

    Raises:
        InputError: there are no weights of that name.
        UnavailableError: they cannot be downloaded.
    """
    library, _, model = spec.partition(":")
    if library == "torchvision":
        return torchvision_weights(model, file, name)
    if library == "timm":
        return timm_weights(model, file, name)
    if file is None and spec in NETWORKS:
        raise InputError(
            f"The backbone {spec!r} has no published weights: name a file of weights.", "weights"
        )
    if file is None and name != DEFAULT:
        raise InputError(
            f"The weights {name!r} of {spec} are not a file, and a factory's weights have no "
            "names: name a file, or leave the model the weights that its factory gives it.",
            "weights",
        )
    return Weights()


def torchvision_weights(model: str, file: Path | None, name: str) -> Weights:
    """torchvision's weights by name; or those in a file, which torchvision names by their hash."""
    from torchvision import models

    offered = models.get_model_weights(torchvision_model(model))
    if file is None:
        if name not in offered.__members__:
            raise InputError(
                f"torchvision has no weights {name!r} of {model}; it has "
                f"{listed(list(offered.__members__))}.",
                "weights",
            )
        entry = offered[name]
        try:
            state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise UnavailableError(
                f"The weights {name} of torchvision:{model} cannot be downloaded "
                f"({first_line(error)}): download {entry.url} elsewhere, and name the file."
            ) from error
    else:
        sha256, state = digest(file), {}
        named = ((re.search(r"-([0-9a-f]{8,})\.", each.url), each) for each in offered)
        entry = next((each for found, each in named if found and sha256.startswith(found[1])), None)
        if entry is None:
            return Weights()
    classes = list(entry.meta["categories"])
    return Weights(state, of_torchvision(entry.transforms()), told_apart(classes), published=True)


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
    """timm's weights by their tag; for a file, what timm says of the tag in the model's name."""
    plain, _, tag = model.partition(".")
    timm = timm_with(model)
    if file is not None and not tag:
        return Weights()
    if file is None and name != DEFAULT:
        if tag not in ("", name):
            raise InputError(
                f"The model timm:{model} names the weights {tag}, not {name}.", "weights"
            )
        tag = name
    tagged = f"{plain}.{tag}" if tag else plain
    timm_with(tagged)
    state: dict[str, Tensor] = {}
    if file is None:
        try:
            state = timm.create_model(tagged, pretrained=True).state_dict()
        except Exception as error:  # its hub raises exceptions of many libraries
            raise UnavailableError(
                f"The weights of timm:{tagged} cannot be downloaded ({first_line(error)}): "
                "download them elsewhere, and name the file."
            ) from error
    config = timm.get_pretrained_cfg(tagged)
    return Weights(state, of_timm(config.to_dict(), tagged), timm_classes(config), file is None)


def of_timm(config: Mapping[str, Any], name: str) -> Preprocessing:
    """The preprocessing that timm's evaluation transform does.

    Raises:
        InputError: it is not a square crop of the centre.
    """
    from timm.data import resolve_data_config

    data = resolve_data_config(pretrained_cfg=dict(config))
    channels, height, width = data["input_size"]
    if data["crop_mode"] != "center" or height != width:
        raise InputError(
            f"timm prepares images for {name} by a {data['crop_mode']} of {height} × {width}, not "
            "by a square crop of the centre: state the preprocessing yourself.",
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
    return told_apart([info.index_to_description(index) for index in range(1000)])


def told_apart(names: Sequence[str]) -> list[str]:
    """Class names with their number added where several classes have the same: ImageNet has two
    cranes, the bird and the machine."""
    count = Counter(names)
    return [f"{name} ({i})" if count[name] > 1 else name for i, name in enumerate(names)]
