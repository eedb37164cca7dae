"""The exceptions that mean "the input is at fault", and how to word them.

The library states a fact; the program that was called adds the remedy in its own words. For that
an error may carry ``about``, the thing that is at fault:

    raise InputError(f"{path} is missing.", about="stage:features")
    raise InputError(f"Checkpoint {path} is missing.", about="weights")

``opnp stage search`` then ends with "…/train holds no shards: run `opnp stage features`.",
``python -m flows.search`` with "…: run `python -m flows.features`."; ``opnp fit`` says "Checkpoint
x.pth is missing: correct --weights.", the pipeline "…: correct train.checkpoint in params.yaml."
`opnp.cli.remedies` holds these words. What can stand in ``about``:

- ``stage:NAME``: what a stage of the pipeline makes is missing, damaged or of other parameters;
- ``run`` and ``retrain``: the same of what a whole run or a retraining makes;
- an argument of the library: ``weights``, ``backbone``, ``preprocessing``, ``classes``, ``device``,
  … (the keys of the tables in `opnp.cli.remedies`);
- in `opnp.pipeline` alone, a parameter as SECTION.KEY.

The message is a whole sentence that ends with a full stop, since a caller in Python sees nothing
else. Where the way out is the same in every program ("… is not a whole image: replace it."), it
stands in the message and there is no ``about``.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["InputError", "MissingError", "UnavailableError", "did_you_mean", "first_line"]


class InputError(ValueError):
    """The input is at fault; the message says how in one sentence.

    Args:
        fact: the sentence, with a full stop.
        about: what is at fault, for the program to add the remedy; see above.
    """

    def __init__(self, fact: str, about: str | None = None) -> None:
        super().__init__(fact)
        self.about = about


class UnavailableError(InputError):
    """A remote resource is unavailable; retrying may help."""


class MissingError(InputError):
    """The user's files are not where the parameters say."""


ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\].*?(\x07|\x1b\\)|[@-Z\\^_])")


def first_line(error: BaseException) -> str:
    """The first line that an error of another library says, without terminal escape codes.

    Returns:
        The line; the name of the error's type if it says nothing.
    """
    lines = (line.strip() for line in ESCAPES.sub("", str(error)).splitlines())
    return next(filter(None, lines), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str], form: str = "{}") -> str:
    """The question to end an error with: "did you mean vim, vit or vra?".

    Args:
        name: the name that does not exist.
        known: the names that do, at least one.
        form: how to print each name, such as "`timm:{}`".

    Returns:
        The question, with the nearest names, at most three; the single nearest one if none is near.
    """
    names = sorted(known)
    near = get_close_matches(name, names, 3) or get_close_matches(name, names, 1, cutoff=0)
    *others, last = (form.format(each) for each in near)
    return f"did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
