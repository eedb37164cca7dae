"""The parameters of a run: `params.yaml`, validated before any work starts.

The file may leave out what has a default. A preset is such a file: it holds only what differs.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import to_jsonable_python
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError

from opnp.errors import InputError
from opnp.pipeline.sections import (
    Data,
    Energy,
    Engine,
    Evaluate,
    Features,
    Retrain,
    Search,
    Train,
)
from opnp.runtime.files import atomic
from opnp.runtime.settings import Seed, Settings, key, sentences, validated

__all__ = ["Engine", "Parameters", "Train", "complete", "faults", "load"]

WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")  # which YAML reads otherwise
WIDTH = 100  # columns of the lines that `complete` writes


class Parameters(Settings):
    """All parameters of a run: a seed, and one section for each concern."""

    seed: Seed = Field(default=0, description="Seed of training, proxies and intervals.")
    data: Data
    train: Train = Train()
    features: Features = Features()
    energy: Energy = Energy()
    search: Search = Search()
    evaluate: Evaluate = Evaluate()
    engine: Engine = Engine()
    retrain: Retrain = Retrain()

    @model_validator(mode="after")
    def consistent(self) -> Self:
        def place(source: str) -> str:
            return str(Path(source).resolve()) if Path(source).exists() else source

        used = [self.data.id, *self.data.near.values(), *self.data.far.values()]
        for name, source in self.search.outliers.items():
            if source == "held-out":
                raise ValueError(f"`search.outliers`: {name} cannot be held-out, a test set")
            if place(source) in map(place, used):
                raise ValueError(
                    f"`search.outliers`: {name} is {source}, which is a test set or the ID data: "
                    "the search must not see it"
                )
        for family in (*self.search.proxies, *self.search.reported):
            grid = int(family.removeprefix("jigsaw-")) if family.startswith("jigsaw-") else 1
            if grid > self.data.image_size:
                raise ValueError(
                    f"`search.proxies`: {family} needs images of at least {grid} pixels, and "
                    f"`data.image_size` is {self.data.image_size}"
                )
        return self


def load(path: Path = Path("params.yaml")) -> Parameters:
    """Read and validate the parameters.

    Raises:
        InputError: the file is missing or not YAML, or a parameter is unknown, missing or invalid;
            the sentence names the first fault. `faults` names all of them.
    """
    return validated(Parameters, values_of(path, text_of(path)), str(path))


def faults(path: Path = Path("params.yaml")) -> list[str]:
    """Everything that is wrong with a file of parameters, one sentence each; empty if it is valid.

    Checks that concern several parameters run once each of these is valid by itself.
    """
    try:
        Parameters.model_validate(values_of(path, text_of(path)))
    except InputError as error:
        return [str(error)]
    except ValidationError as error:
        return [f"{path}: {each}" for each in sentences(error, Parameters, key)]
    return []


def text_of(path: Path) -> str:
    try:
        return Path(path).read_text()
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing: run in the project's folder, or copy one there."
        ) from None
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from None


def values_of(path: Path, text: str) -> dict[str, Any]:
    """The values of a file of parameters, not validated.

    Raises:
        InputError: the text is not YAML, or not a mapping.
    """
    try:
        values = YAML(typ="safe", pure=True).load(text)  # as DVC reads it
    except DuplicateKeyError as error:
        name = re.search(r'duplicate key "(.*?)"', str(error.problem))
        what = f"`{name[1]}`" if name else "a key"
        line = error.problem_mark.line + 1
        raise InputError(f"{path} holds {what} twice (line {line}): keep one of them.") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply: correct it.") from None
    except Exception as error:  # besides its own errors, whatever a tag's constructor raises
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, Mapping):
        raise InputError(f"{path} holds no parameters: restore it.")
    return dict(values)


def complete(path: Path = Path("params.yaml")) -> list[str]:
    """Write the defaults of parameters that a file leaves out into it, so that DVC can track them.

    What the file holds already stays as it is, comments included.

    Returns:
        The parameters that were added, such as ``search.clip``.

    Raises:
        InputError: the file is invalid, see `load`, or a section that lacks parameters is written
            on one line.
    """
    parameters, text = load(path), text_of(path).rstrip() + "\n"
    given, added = values_of(path, text), []
    for name, field in Parameters.model_fields.items():
        value = getattr(parameters, name)
        if not isinstance(value, Settings):
            if name not in given:
                first = re.search(r"^\w", text, re.M)
                place = first.start() if first else len(text)
                made = entry(name, value, field.description or "")
                text = f"{text[:place]}{made}\n{text[place:]}"
                added.append(name)
            continue
        if name not in given:
            text += f"\n{comment(introduction(type(value)))}{name}:\n"
        lacking = [each for each in type(value).model_fields if each not in given.get(name, {})]
        text = with_entries(text, name, value, lacking)
        added += [f"{name}.{each}" for each in lacking]
    if not added:
        return []
    if keys(values_of(path, text)) != keys(given) | {*added}:
        raise InputError(f"{path} leaves out {added[0]}: write each section over several lines.")
    with atomic(Path(path)) as temporary:
        temporary.write_text(text)
    return added


def keys(values: Mapping[str, Any]) -> set[str]:
    """The parameters that are named, such as ``search.clip``."""
    return {
        each
        for name, value in values.items()
        for each in ([f"{name}.{field}" for field in value] if isinstance(value, dict) else [name])
    }


def with_entries(text: str, section: str, value: Settings, names: Sequence[str]) -> str:
    """The text of a file of parameters, with some values of a section written at its beginning."""
    head = re.compile(rf"^{section}:[ \t]*(?:#.*)?\n(?=(?:[ \t]*(?:#.*)?\n)*( *))", re.M)

    def extended(found: re.Match[str]) -> str:
        indent = found[1] or "  "
        fields = type(value).model_fields
        made = (
            entry(name, getattr(value, name), fields[name].description or "", indent)
            for name in names
        )
        return found[0] + "".join(made)

    return head.sub(extended, text, count=1)


def introduction(section: type[Settings]) -> str:
    """The first paragraph of a section's docstring."""
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def entry(name: str, value: Any, description: str, indent: str = "") -> str:
    """Lines of a file of parameters: what a value means, then its name and the value."""
    plain = f"{name}: {written(to_jsonable_python(value))}"
    lines = wrap(plain, WIDTH - len(indent), subsequent_indent="  ", break_on_hyphens=False)
    return comment(description, indent) + "".join(f"{indent}{line}\n" for line in lines)


def comment(text: str, indent: str = "") -> str:
    lines = wrap(text, WIDTH - 2 - len(indent), break_on_hyphens=False)
    return "".join(f"{indent}# {line}\n" for line in lines)


def written(value: Any) -> str:
    """A value as YAML."""
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9+-]*", value)
    return str(value) if plain and value.lower() not in WORDS else json.dumps(value)
