"""The threshold of a detector: an image that scores above it is out of distribution."""

from fractions import Fraction
from math import ceil
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from opnp.errors import InputError
from opnp.pruning.masks import warn_of_fractions
from opnp.runtime.settings import Positive, Settings

__all__ = ["Threshold"]


class Threshold(Settings):
    """The score above which an image is OOD, with a confidence interval.

    The interval is the distribution-free one of Conover, "Practical Nonparametric Statistics",
    3rd edition, 1999, section 3.2 (`scipy.stats.quantile_test`). Let Y ~ Binomial(n, accept/100).
    Sort the n scores: ``low`` is the one of rank r, the least with P(Y ≤ r) ≥ 2.5 %; ``high`` is
    the one of rank s + 1, s being the least with P(Y > s) ≤ 2.5 %. Whatever the distribution of
    the scores, the interval covers its ``accept``-th percentile in at least 95 % of samples.

    Attributes:
        value: the least score of an ID validation image that accepts ``accept`` % of these images.
        accept: in percent.
        low: lower end of the 95 % confidence interval; None if too few images bound it.
        high: upper end, likewise. To accept 95 %, it needs 72 images.
        samples: number of ID validation images.
    """

    value: float
    accept: Annotated[float, Field(gt=0, le=100)]
    low: float | None
    high: float | None
    samples: Positive

    @classmethod
    def of(cls, scores: Tensor, accept: float = 95.0) -> Self:
        """The threshold that accepts ``accept`` % of ID images.

        Args:
            scores: outlier scores of ID images, shape (N,).
            accept: in percent.

        Raises:
            InputError: there are no scores, one is not finite, or ``accept`` is out of range.
        """
        if not 0 < accept <= 100:
            raise InputError(f"accept must be above 0 and at most 100 percent, not {accept:g}.")
        warn_of_fractions(f"{accept=:g}", [accept])
        ordered, n = np.sort(scores.double().cpu().numpy()), len(scores)
        if n == 0 or not np.isfinite(ordered).all():
            raise InputError("A threshold needs ID validation images whose scores are finite.")
        # A fraction, since 0.35 * 20 is more than 7 in floating point.
        value = float(ordered[max(0, ceil(n * Fraction(str(accept)) / 100) - 1)])
        low, high = interval(ordered, accept)
        return cls(value=value, accept=accept, low=low, high=high, samples=n)

    def is_ood(self, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
        """True where the score exceeds the threshold; NaN counts as OOD."""
        return ~(scores <= self.value)


def interval(scores: NDArray[np.float64], accept: float) -> tuple[float | None, float | None]:
    """The 95 % confidence interval of a percentile; None for an end without a bound."""
    from scipy.stats import quantile_test  # here, because the import takes a second or two

    if accept == 100:  # no sample bounds the greatest score from above
        return float(scores.max()), None
    ends = quantile_test(scores, p=accept / 100).confidence_interval(0.95)
    low, high = (None if np.isnan(end) else float(end) for end in ends)
    return low, high
