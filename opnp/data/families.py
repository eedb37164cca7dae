"""The names of families of proxy outliers, as settings hold them.

Importing this module is cheap; `opnp.data.proxies`, which makes the outliers, imports NumPy and
SciPy.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from opnp.errors import InputError, did_you_mean
from opnp.runtime.settings import Several

__all__ = ["DECIDING", "REPORTED", "Families", "Reported", "besides"]

DECIDING = ("phase", "blobs", "zoom", "blur", "strokes", "rotation", "inversion")
"""The families that masks and detectors are chosen by unless others are named: those that keep the
statistics of natural images or drawings, and follow real OOD data most closely."""

REPORTED = ("jigsaw-4", "permutation", "uniform", "spectrum", "cutmix")
"""Families that are reported besides, unless others are named. Noise and jigsaws are easy for some
masks in ways that tell nothing about real images; mixtures of images are half in-distribution."""


def besides(reported: Sequence[str], deciding: Sequence[str]) -> list[str]:
    """The families to report that do not decide anyway.

    >>> besides(["uniform", "cutmix"], ["phase", "uniform"])
    ['cutmix']
    """
    return [name for name in reported if name not in deciding]


def known(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a name that no family has: a misspelt one must not cost a training first."""
    from opnp.data.proxies import FAMILIES

    for name in names:
        if name not in FAMILIES:
            raise InputError(f"There is no proxy {name!r}; {did_you_mean(name, FAMILIES)}")
    return names


Families = Annotated[Several[str], AfterValidator(known)]
"""Names of families."""

Reported = Annotated[
    Families,
    Field(
        description="Families of proxy outliers to report the chosen mask on; they do not decide."
    ),
]
"""Families that do not decide, as a field of settings."""
