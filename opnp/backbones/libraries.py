"""Models and published weights of torchvision and timm, and models of the user's own factories."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from math import floor
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opnp.backbones.networks import NETWORKS
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError, UnavailableError
from opnp.runtime.files import digest

__all__ = ["is_factory"]


DEFAULT = "DEFAULT"
"""The name of the weights that a library, or a factory, takes by itself."""


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
