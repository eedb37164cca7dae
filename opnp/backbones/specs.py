"""Specs: the strings that name a model, with options if need be.

    resnet                                          a small network of `opnp.backbones.networks`
    torchvision:resnet50                            a model of torchvision
    timm:vit_base_patch16_224.augreg_in1k           a model of timm, with or without a tag
    package.module:factory                          a function of the user's that returns a model
    torchvision:inception_v3?transform_input=false  any of them, with options of that model

Options are written as in a URL, ``?name=value&name=value``. A value is read as JSON (``3``,
``0.5``, ``true``, ``null``, ``[112,112]``); what is not JSON is a string.
"""

import json
from typing import Any
from urllib.parse import quote, unquote

from opnp.backbones.networks import NETWORKS
from opnp.errors import InputError

__all__ = ["is_factory", "parse", "trusts", "write"]

PLAIN = "[]{},:.\"'+- "  # characters that need no escape in a value


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """The model's name and its options.

    Raises:
        InputError: an option has no name or no value, or is given twice.
    """
    name, _, query = spec.partition("?")
    options: dict[str, Any] = {}
    for pair in query.split("&") if query else []:
        key, _, text = map(unquote, pair.partition("="))
        if not key.isidentifier() or not text:
            raise InputError(f"The option {pair!r} of {spec} is not of the form NAME=VALUE.")
        if key in options:
            raise InputError(f"The option {key} of {spec} is given twice.")
        options[key] = value_of(text)
    return name, options


def value_of(text: str) -> Any:
    def refuse(constant: str) -> Any:  # NaN and Infinity, which JSON does not have
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        return text


def write(name: str, **options: Any) -> str:
    """The spec that `parse` reads as this name and these options."""
    query = "&".join(f"{key}={quote(text_of(value), PLAIN)}" for key, value in options.items())
    return f"{name}?{query}" if query else name


def text_of(value: Any) -> str:
    """A string as it is, unless it would be read as something else; any other value as JSON."""
    if isinstance(value, str) and value and value_of(value) == value:
        return value
    return json.dumps(value, separators=(",", ":"))


def is_factory(spec: str) -> bool:
    """Whether a spec names code of the user's."""
    return names_code(parse(spec)[0])


def names_code(name: str) -> bool:
    return name not in NETWORKS and name.partition(":")[0] not in ("torchvision", "timm")


def trusts(name: str, factory: str | None) -> bool:
    """Whether a model may be built for a reader who trusts the code of one factory, or of none.

    Args:
        name: the model, as a file states it, which may be anything.
        factory: the spec of the factory that the reader names.
    """
    return not names_code(name) or (factory is not None and parse(factory)[0] == name)
