"""Fusion: several detectors as one, their outlier scores brought to a common scale by p-values.

An outlier score of one detector means nothing to another. What they share is how unusual a score is
among in-distribution (ID) validation images: its p-value, the probability that an ID image scores
at least as high. Each score x becomes the surprise

    t(x) = −log p(x),

and the surprises are added, which is Fisher's method of combining tests:

    Fisher, "Statistical Methods for Research Workers", 4th ed. 1932, section 21.1.
    Bates et al., "Testing for Outliers with Conformal p-values", Annals of Statistics 2023.
    Magesh et al., "Principled Out-of-Distribution Detection via Multiple Testing", JMLR 2023.

Of n validation scores s, the conformal p-value is exact, whatever their distribution:

    p(x) = (1 + #{s ≥ x}) / (1 + n).

It cannot fall below 1/(1 + n), so that all clear outliers would tie. Above u, the score that a
tenth of the validation images reach, an exponential tail takes its place,

    p(x) = p(u)·exp(−(x − u)/β),

where β is the mean excess of the validation scores above u, its maximum likelihood estimate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.special import ndtri_exp
from torch import Tensor

from opnp.detectors.base import Samples
from opnp.detectors.names import ours
from opnp.detectors.tuning import Tuned
from opnp.errors import InputError

__all__ = ["Calibration", "Combination", "Fusion", "combine"]

TAIL = 0.1  # share of the validation scores that the exponential tail is fitted to
LARGEST = 1e300  # surprise of a score that is infinite, or so far out that the tail overflows

CERTAIN = 1e-3  # what `combine` by z takes a p-value to be below 1 at least: z of 1 is infinite

Combination = Literal["fisher", "z", "maximum"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """How unusual an outlier score is among those of ID validation images.

    Attributes:
        scores: the validation scores in ascending order, float64 (n,).
        start: u, the score from which on the tail is exponential.
        scale: β of the tail; 0 where no validation score lies above u.
    """

    scores: Tensor
    start: float
    scale: float

    @classmethod
    def of(cls, scores: Tensor) -> "Calibration":
        """Calibrate a detector on its outlier scores of ID validation images.

        Args:
            scores: outlier scores (larger means OOD), (n,), n ≥ 1.

        Raises:
            InputError: there are no scores, or one is NaN or infinite.

        >>> calibration = Calibration.of(torch.arange(100.0))
        >>> calibration.p_values(torch.tensor([0.0, 50.0, 90.0]))
        tensor([1.0000, 0.5050, 0.1089], dtype=torch.float64)
        """
        ordered = scores.detach().cpu().double().flatten().sort().values
        if len(ordered) == 0 or not torch.isfinite(ordered).all():
            raise InputError(
                "A detector is calibrated on finite scores of at least one validation image, not "
                f"on {len(ordered)} of which {int((~torch.isfinite(ordered)).sum())} are NaN or "
                "infinite."
            )
        start = ordered[-max(1, round(TAIL * len(ordered)))]
        excess = ordered[ordered > start] - start
        scale = float(excess.mean()) if len(excess) else 0.0
        return cls(ordered, float(start), scale)

    def surprise(self, scores: Tensor) -> Tensor:
        """t = −log p of outlier scores, (N,), float64: finite, at least 0, and no smaller for a
        larger score.

        Raises:
            InputError: a score is NaN.
        """
        x, n = scores.detach().cpu().double(), len(self.scores)
        if x.isnan().any():
            raise InputError(f"The outlier score of row {int(x.isnan().nonzero()[0])} is NaN.")

        def counted(x: Tensor) -> Tensor:
            reached = n - torch.searchsorted(self.scores, x.contiguous())  # #{s ≥ x}
            return -torch.log((1 + reached.double()) / (1 + n))

        t, beyond = counted(x), x - self.start
        if self.scale > 0:  # else the scores above u do not spread, and there is no tail to fit
            tail = counted(torch.tensor(self.start, dtype=x.dtype)) + beyond / self.scale
            t = torch.where(beyond > 0, tail, t)
        return t.clamp(0, LARGEST)

    def p_values(self, scores: Tensor) -> Tensor:
        """p of outlier scores, (N,), float64 in [0, 1]."""
        return torch.exp(-self.surprise(scores))


def combine(surprises: Sequence[Tensor], how: Combination = "fisher") -> Tensor:
    """One outlier score of the surprises of several detectors.

    Args:
        surprises: of each detector, (N,), see `Calibration.surprise`.
        how: ``fisher`` adds them; ``z`` adds the quantiles of the standard normal distribution that
            belong to the p-values (Stouffer et al., 1949); ``maximum`` takes the largest surprise,
            so that the alarm of one detector is enough.

    Returns:
        (N,), float64; larger means OOD.

    Raises:
        InputError: there are none, or they are of different numbers of images.
    """
    if not surprises or len({each.shape for each in surprises}) > 1:
        raise InputError("A fusion needs the scores of at least one detector, of the same images.")
    stacked = torch.stack([each.double() for each in surprises])
    if how == "maximum":
        return stacked.amax(dim=0)
    if how == "z":
        stacked = -torch.from_numpy(ndtri_exp(-stacked.clamp(min=CERTAIN).numpy()))
    return stacked.sum(dim=0)


@dataclass(frozen=True, eq=False)
class Fusion:
    """Tuned detectors as one, by Fisher's method; nothing is tuned in the fusion itself.

    Attributes:
        parts: the detectors by name.
        calibrations: of each, on the same ID validation samples.
    """

    parts: Mapping[str, Tuned]
    calibrations: Mapping[str, Calibration]

    @classmethod
    def of(cls, parts: Mapping[str, Tuned], validation: Samples) -> "Fusion":
        """Calibrate tuned detectors on ID validation samples, all that there are.

        Raises:
            InputError: there are no validation samples.
            UnavailableError: a detector cannot score them.
        """
        found = {name: Calibration.of(part.score(validation)) for name, part in parts.items()}
        return cls(parts, found)

    def surprises(self, samples: Samples) -> dict[str, Tensor]:
        """−log p of samples for each part, (N,), float64; larger means OOD.

        Raises:
            UnavailableError: a part cannot score these samples.
        """
        return {
            name: self.calibrations[name].surprise(part.score(samples))
            for name, part in self.parts.items()
        }

    def score(self, samples: Samples) -> Tensor:
        """Outlier scores (N,), float64; larger means OOD. See `surprises`."""
        return combine([*self.surprises(samples).values()])

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those of each part, as ``PART/NAME``."""
        return {
            f"{name}/{key}": value
            for name, part in self.parts.items()
            for key, value in part.hyperparameters.items()
        }

    @property
    def fit_seconds(self) -> float:
        """Time to fit all parts."""
        return sum(part.fit_seconds for part in self.parts.values())

    @property
    def trials(self) -> int:
        """What the parts have tried together."""
        return sum(part.trials for part in self.parts.values())

    @property
    def pruned(self) -> float | None:
        """Percent of the head's weights that the part that prunes most prunes; None without one."""
        shares = [part.pruned or 0.0 for name, part in self.parts.items() if ours(name)]
        return max(shares, default=None)

    def pruned_logits(self, features: Tensor) -> None:
        """No logits of its own: the classifier's stay as they are."""
