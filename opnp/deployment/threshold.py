"""The threshold of a detector: above it an image is out of distribution."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opnp.errors import InputError

__all__ = ["Threshold"]


@dataclass(frozen=True)
class Threshold:
    """The score above which an image is OOD.

    Attributes:
        value: the smallest score of an ID validation image that accepts ``accept`` % of them.
        accept: in percent.
        low: lower end of the 95 % bootstrap interval of ``value``.
        high: upper end.
        samples: ID validation images.
    """

    value: float
    accept: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, scores: Tensor, accept: float = 95.0, resamples: int = 1000, seed: int = 0) -> Self:
        """The threshold that accepts ``accept`` % of the outlier scores (N,) of ID images.

        Raises:
            InputError: there are no scores, one is not finite, or ``accept`` is out of range.

        Source of the interval: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
        section 13.3.
        """
        check_accept(accept)
        ordered, n = np.sort(scores.double().cpu().numpy()), len(scores)
        if n == 0 or not np.isfinite(ordered).all():
            raise InputError("A threshold needs ID validation images whose scores are finite.")
        place = max(0, ceil(n * Fraction(str(accept)) / 100) - 1)
        rng = np.random.default_rng(seed)
        # The place-th smallest of n draws with replacement, for one resample after another.
        drawn = [np.partition(rng.integers(n, size=n), place)[place] for _ in range(resamples)]
        low, high = np.percentile(ordered[drawn], [2.5, 97.5])
        return cls(float(ordered[place]), accept, float(low), float(high), n)

    def is_ood(self, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which are above; a score that is NaN counts as OOD, since nothing vouches for it."""
        return ~(scores <= self.value)


def check_accept(accept: float) -> None:
    """Refuse a share of ID images that no threshold accepts."""
    if not 0 < accept <= 100:
        raise InputError(f"accept must be above 0 and at most 100 percent, not {accept:g}.")
