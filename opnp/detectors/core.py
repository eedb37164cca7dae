"""CORE: the confidence of the classifier, and membership in what the classifier does not look at.

Features are divided into their projection on the row space of the head's weight and the residual
r(h) orthogonal to it. Two in-distribution scores, each brought to mean 0 and standard deviation 1
on the training samples, are added:

    confidence   S(x) = logsumexp f(x), the energy score;
    membership   max_c cos(r(h), r̄_c), with r̄_c the mean residual of training label c.

The outlier score is minus their sum. Where the weight's rows span all features (K ≥ L, at full
rank) there is no residual, and the confidence decides alone.

Source: Yang, Kim and Bahk, "CORE: Robust Out-of-Distribution Detection via Confidence and
Orthogonal Residual Scoring", 2026, arXiv 2603.18290, as far as its abstract and public summaries
say; no code was to be had. Decided here: the maximum over the classes that have training samples,
and statistics of the training samples.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about, class_means

__all__ = ["CORE"]


class CORE(CachedDetector):
    """Confidence and orthogonal residual; see the module's formulas."""

    info = about(
        "CORE: Robust Out-of-Distribution Detection via Confidence and Orthogonal Residual Scoring",
        "arXiv",
        2026,
        "https://arxiv.org/abs/2603.18290",
    )
    fitted = ("rows", "directions", "scale")

    rows: Tensor | None  # an orthonormal basis of the row space of W, (rank, L)
    directions: Tensor | None  # r̄_c / ‖r̄_c‖ of the classes that have samples, (classes, L)
    scale: tuple[Tensor, Tensor] | None  # means and standard deviations of both scores, (2,) each

    def _residual(self, h: Tensor) -> Tensor:
        assert self.rows is not None
        rest = h - h @ self.rows.T @ self.rows
        # What rounding leaves of a residual that is zero has no direction.
        tiny = 1e-9 * h.norm(dim=1, keepdim=True)
        return torch.where(rest.norm(dim=1, keepdim=True) > tiny, rest, 0.0)

    def _scores(self, h: Tensor) -> Tensor:
        """Confidence and membership, (N, 2); larger means ID."""
        assert self.directions is not None
        member = (F.normalize(self._residual(h), dim=1) @ self.directions.T).amax(dim=1)
        return torch.stack([self.logits(h).logsumexp(dim=1), member], dim=1)

    def _fit(self, h: Tensor, y: Tensor) -> None:
        _, values, rows = torch.linalg.svd(self.weight, full_matrices=False)
        smallest = values.max() * max(self.weight.shape) * torch.finfo(values.dtype).eps
        self.rows = rows[values > smallest]
        means, counts = class_means(self._residual(h), y, self.head.out_features)
        self.directions = F.normalize(means[counts > 0], dim=1)
        scores = self._scores(h)
        spread = scores.std(dim=0) if len(h) > 1 else torch.zeros_like(scores[0])
        self.scale = scores.mean(dim=0), torch.where(spread > 0, spread, 1.0)

    def _score(self, h: Tensor) -> Tensor:
        assert self.scale is not None
        mean, spread = self.scale
        return -((self._scores(h) - mean) / spread).sum(dim=1)


MAKERS: dict[str, Maker] = {"core": lambda m: CORE(None, m.head)}
