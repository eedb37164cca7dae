"""The names of the families of proxy outliers, without the libraries that make them."""

from typing import Annotated

from pydantic import AfterValidator

from opnp.errors import InputError, did_you_mean
from opnp.runtime.settings import Several

__all__ = ["DEFAULT", "NAMES", "NATURAL", "Families", "check"]

DEFAULT = (
    *("jigsaw-2", "jigsaw-4", "jigsaw-7", "permutation", "phase", "mixup", "inversion"),
    *("rotation", "uniform", "gaussian", "rademacher", "blobs"),
)
"""The families that masks are chosen by unless others are named."""

NAMES = (*DEFAULT, "zoom", "blur", "strokes", "spectrum", "cutmix")
"""Every family; `opnp.data.proxies` makes them."""

NATURAL = ("phase", "blobs", "zoom", "blur", "strokes", "rotation", "inversion")
"""The families that keep the statistics of natural images."""


def check(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a name that no family has: a misspelt one must not cost a training first."""
    for name in names:
        if name not in NAMES:
            raise InputError(f"There is no proxy {name!r}; {did_you_mean(name, NAMES)}")
    return names


Families = Annotated[Several[str], AfterValidator(check)]
"""Names of families, as settings hold them."""
