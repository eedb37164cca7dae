"""Options that several commands share, and options made from settings."""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from opnp.errors import InputError
from opnp.runtime.settings import Settings, sentences

__all__ = ["AsJson", "BatchSize", "Detector", "Device", "Trust", "option", "takes"]

Detector = Annotated[Path, typer.Option(help="Folder of a detector made by `opnp fit`.")]
Trust = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FACTORY", help="Allow the detector to run this code, which makes its model."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu or cuda.", show_default="the GPU if there is one, otherwise the CPU"),
]
BatchSize = Annotated[
    int, typer.Option(help="How many images go through the model at once.", min=1)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

S = TypeVar("S", bound=Settings)


def takes(model: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of ``model``, in place of its parameter ``settings``.

    Lists are written with commas, and ``none`` stands for no value. The options' help and defaults
    are those of the fields. ``settings`` holds what was given, checked; its ``model_fields_set``
    names the options that were given.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == "settings":
                parameters += [parameter_of(*each) for each in model.model_fields.items()]
            else:
                parameters.append(parameter)

        @wraps(command)
        def run(**given: Any) -> None:
            stated = {name: given.pop(name) for name in model.model_fields}
            words = {name: word for name, word in stated.items() if word is not None}
            command(**given, settings=settings_of(model, words))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def option(name: str) -> str:
    """The option that sets a field."""
    return f"--{name.replace('_', '-')}"


def parameter_of(name: str, field: FieldInfo) -> inspect.Parameter:
    """The parameter of a command that Typer makes the option of a field from."""
    about = (field.description or "").replace("null", "none")
    text = f"{about} [default: {written(field.get_default())}]"
    if leaves(field.annotation) == {bool}:
        kind: Any = Annotated[bool | None, typer.Option(help=text)]
    else:
        kind = Annotated[str | None, typer.Option(help=text, metavar=metavar(field.annotation))]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def metavar(annotation: Any) -> str:
    """What an option's help shows in place of its value."""
    if sequence_in(annotation) is not None:
        return f"{'NAME' if str in leaves(annotation) else 'NUMBER'},…"
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return "NAME" if str in leaves(annotation) else "NUMBER"


def settings_of(model: type[S], words: dict[str, Any]) -> S:
    """Settings from what stands after the options.

    Raises:
        InputError: a value is invalid; the sentence names its option.
    """
    fields = model.model_fields
    values = {name: parsed(word, fields[name].annotation) for name, word in words.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(sentences(error, model, lambda path: option(path[0]))[0]) from None


def parsed(word: Any, annotation: Any) -> Any:
    """What a word means to a field of a type; what it cannot mean is left for the field to refuse.

    >>> parsed("none,80,9.5", Sequence[float | None])
    [None, 80, 9.5]
    """
    if not isinstance(word, str):
        return word
    kinds, sequence = leaves(annotation), sequence_in(annotation)
    if word == "none" and NoneType in (kinds if sequence is None else get_args(annotation)):
        return None
    if sequence is not None:
        [element] = get_args(sequence)
        return [parsed(part.strip(), element) for part in word.split(",")]
    if str in kinds:
        return word
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            pass
    return word


def sequence_in(annotation: Any) -> Any:
    """The type of the sequence that a field takes, alone or among others; None if it takes none."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Sequence:
        return annotation
    if origin is Annotated:
        return sequence_in(inner[0])
    if origin is Union or origin is UnionType:
        return next((each for each in map(sequence_in, inner) if each is not None), None)
    return None


def leaves(annotation: Any) -> set[Any]:
    """The plain types that a field takes, those of its elements if it takes several."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(each) for each in inner}
    if origin is Annotated or origin is Sequence:
        return leaves(inner[0])
    if origin is Union or origin is UnionType:
        return {leaf for each in inner for leaf in leaves(each)}
    return {annotation}


def written(value: Any) -> str:
    """A value as it is written after an option."""
    if isinstance(value, tuple):
        return ",".join(map(written, value))
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
