"""What all settings have in common: how they are validated, and what is said of a faulty one."""

import re
from collections.abc import Callable, Sequence
from reprlib import Repr
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from opnp.errors import InputError, did_you_mean

__all__ = [
    "Count",
    "Percentage",
    "Positive",
    "Seed",
    "Settings",
    "Several",
    "key",
    "sentences",
    "validated",
]

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)

Count = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Percentage = Annotated[float, Field(ge=0, le=100)]
Several = Annotated[Sequence[T], AfterValidator(tuple), PlainSerializer(list)]
"""Values in any sequence: settings hold a tuple, and files get a list."""

SHORT = Repr()  # of the values that a sentence repeats
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


class Settings(BaseModel):
    """Named values, each with its type, default, constraint and description in one place.

    Unknown names are refused, values are never coerced, and NaN and infinity count as faults.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True
    )


def validated(model: type[Model], values: Any, where: str, about: str | None = None) -> Model:
    """Values read from a file or given by a caller, as an instance of ``model``.

    Args:
        model: the settings.
        values: a mapping from names to values.
        where: what holds the values, such as a file's name, for the error message.
        about: what is at fault if a value is; see `opnp.errors`.

    Raises:
        InputError: a value is unknown, missing or invalid; the sentence names the first fault.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {sentences(error, model, key)[0]}", about) from None


def key(path: Sequence[str]) -> str:
    """The name of a setting in a file, in backticks: `search.clip`."""
    return f"`{'.'.join(path)}`"


def sentences(
    error: ValidationError, model: type[BaseModel], called: Callable[[Sequence[str]], str]
) -> list[str]:
    """What is wrong with some settings, one sentence for each fault.

    Args:
        error: what validating ``model`` raised.
        model: the settings, which tell the names that exist.
        called: what the user calls the setting at a path of names, such as ``("search", "clip")``:
            a key of a file, or an option. A name in backticks in a message is replaced by it.
    """
    # A name that is missing may be one that was misspelt, which is told first.
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] == "missing")
    return [sentence(fault, model, called) for fault in faults]


def sentence(fault: Any, model: type[BaseModel], called: Callable[[Sequence[str]], str]) -> str:
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        known = list(inside(model, path[:-1]).model_fields)
        near = did_you_mean(path[-1], known, called([*path[:-1], "{}"]))
        return f"there is no parameter {called(path)}; {near}"
    if fault["type"] == "missing":
        return f"{called(path)} is missing."
    message = fault["msg"].removeprefix("Value error, ")
    told = re.sub(r"`([\w.]+)`", lambda name: called([*path, *name[1].split(".")]), message)
    if told == message and path:
        told = f"{called(path)}: {message[0].lower()}{message[1:]}"
    if fault["type"] != "value_error":
        told += f" (it is {shown(fault['input'])})"
    return told if told.endswith(("?", ".")) else f"{told}."


def inside(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """The settings that lie under a path of names."""
    for name in path:
        kind: Any = model.model_fields[name].annotation
        model = next(each for each in (kind, *get_args(kind)) if isinstance(each, type))
    return model


def shown(value: Any) -> str:
    """A value as Python writes it, cut if it is long."""
    try:
        return SHORT.repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        return "a number of thousands of digits"
