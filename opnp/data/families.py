"""The names of families of proxy outliers, as settings hold them.

Importing this module is cheap; `opnp.data.proxies`, which makes the outliers, imports NumPy and
SciPy.
"""

from typing import Annotated

from pydantic import AfterValidator

from opnp.errors import InputError, did_you_mean
from opnp.runtime.settings import Several

__all__ = ["DEFAULT", "Families"]

DEFAULT = (
    *("jigsaw-2", "jigsaw-4", "jigsaw-7", "permutation", "phase", "mixup", "inversion"),
    *("rotation", "uniform", "gaussian", "rademacher", "blobs"),
)
"""The families that masks are chosen by unless others are named."""


def known(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a name that no family has: a misspelt one must not cost a training first."""
    from opnp.data.proxies import FAMILIES

    for name in names:
        if name not in FAMILIES:
            raise InputError(f"There is no proxy {name!r}; {did_you_mean(name, FAMILIES)}")
    return names


Families = Annotated[Several[str], AfterValidator(known)]
"""Names of families."""
