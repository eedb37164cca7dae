"""What to do about an error, in the words of the program that was called.

See `opnp.errors` for what the library puts into ``about``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from opnp.errors import InputError

__all__ = ["called_as", "tell"]

CALLED = ContextVar("CALLED", default="opnp run")
"""How the program was called: `opnp stage search`, or `python -m flows.search`."""

OTHERS = {
    "batch_size": "lower --batch-size",
    "challenger": "make one with `opnp register`",
    "champion": "make one with `opnp promote`",
    "detector": "copy the detector again, or make it again with `opnp fit`",
    "device": "choose another --device",
    "fit": "make one with `opnp fit`",
    "ood": "give --ood NAME=PATH",
    "port": "name another with --port or --host",
    "trust": "name it with --trust if you trust it",
}
FIT = {
    **OTHERS,
    "backbone": "correct --model",
    "classes": "correct --classes",
    "preprocessing": "state it with --preprocessing",
    "proxies": "remove it from --proxies",
    "weights": "correct --weights",
}
PIPELINE = {
    **OTHERS,
    "backbone": "correct train.backbone in params.yaml",
    "batch_size": "lower features.batch_size in params.yaml",
    "classes": "correct data.id in params.yaml",
    "data": "correct the section data of params.yaml",
    "data.test": "state in data.test what percentage of the images to test on",
    "evaluation": "restore it, or name another folder in retrain.evaluation",
    "id": "correct data.id in params.yaml",
    "preprocessing": "state it with train.preprocessing in params.yaml",
    "proxies": "remove it from search.proxies in params.yaml",
    "storage": "delete it from the storage and run again",
    "trust": "name it in train.backbone if you trust it",
    "unseen": "give data.id its own test split, or name another folder in retrain.evaluation",
    "weights": "correct train.checkpoint in params.yaml",
}


@contextmanager
def called_as(path: str) -> Iterator[None]:
    """Word errors of the block as those of a program, such as `opnp stage search`."""
    before = CALLED.set(path)
    try:
        yield
    finally:
        CALLED.reset(before)


def tell(error: InputError) -> str:
    """The error in one sentence, with the remedy in the words of the program that was called."""
    fact, remedy = str(error), remedy_for(error.about)
    if not remedy or not fact.endswith("."):
        return fact
    return f"{fact[:-1]} ({remedy})." if ": " in fact else f"{fact[:-1]}: {remedy}."


def remedy_for(about: str | None) -> str | None:
    if about is None:
        return None
    if about in ("run", "retrain") or about.startswith("stage:"):
        return f"run `{command(about)}`"
    words = CALLED.get().split()
    table = OTHERS
    if words[:2] == ["opnp", "fit"]:
        table = FIT
    elif words[0] != "opnp" or words[1] in ("run", "stage", "retrain", "monitor"):
        table = PIPELINE
    # A parameter, such as search.clip; commands that read no parameters raise no error about one.
    return table.get(about, f"correct {about} in params.yaml" if "." in about else None)


def command(about: str) -> str:
    """The command that makes what is missing."""
    name = about.removeprefix("stage:")
    if CALLED.get().startswith("opnp"):
        return f"opnp stage {name}" if about.startswith("stage:") else f"opnp {name}"
    return f"python -m flows.{'pipeline' if name == 'run' else name}"
