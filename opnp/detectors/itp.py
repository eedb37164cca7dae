"""ITP: contributions that a class rarely makes, or makes far too much of, are left out.

The contribution of feature j to the logit of class i is c_ij = W_ij h_j. Over the training samples
of label i it has mean μ_ij and standard deviation σ_ij. Two prunings, then the energy of what is
left:

    coarse   weights whose μ_ij is among the lowest p % of all μ are removed, for every sample;
    fine     contributions c_ij ≥ μ_ij + λ σ_ij are removed, for the sample at hand.

Since W is fixed, μ_ij = W_ij m_ij and σ_ij = |W_ij| s_ij, with m and s the mean and the standard
deviation of the features of class i.

Source: Xu and Yang, "ITP: Instance-Aware Test Pruning for Out-of-Distribution Detection", AAAI
2025, arXiv 2412.12566. From the authors' code (github.com/njustkmg/AAAI2025-ITP): statistics by
label, (p, λ) of (10, 2.2) on CIFAR-10, (20, 1.6) on CIFAR-100 and (30, 1.5) on ImageNet. Decided
here: classes with fewer than two training samples take the statistics of all samples.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about, class_means

__all__ = ["ITP"]


class ITP(CachedDetector):
    """Instance-aware test pruning; see the module's formulas."""

    info = about(
        "ITP: Instance-Aware Test Pruning for Out-of-Distribution Detection",
        "AAAI",
        2025,
        "https://arxiv.org/abs/2412.12566",
        "https://github.com/njustkmg/AAAI2025-ITP",
    )
    hyperparameter_space = {"percentile": [0, 10, 20, 30, 50], "deviations": [1.5, 1.6, 2.2, 3.0]}
    fitted = ("mean", "deviation")
    at_once = frozenset({"percentile", "deviations"})

    mean: Tensor | None  # μ, (K, L)
    deviation: Tensor | None  # σ, (K, L)

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        percentile: float = 10,
        deviations: float = 2.2,
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
            percentile: p, percent of the weights that are removed for every sample.
            deviations: λ.
        """
        super().__init__(encoder, head)
        self.percentile = percentile
        self.deviations = deviations

    def _fit(self, h: Tensor, y: Tensor) -> None:
        means, counts = class_means(h, y, self.head.out_features)
        squares = torch.zeros_like(means).index_add_(0, y, (h - means[y]).square())
        deviations = (squares / (counts - 1).clamp(min=1)[:, None]).sqrt()
        few = (counts < 2)[:, None]
        overall = h.std(dim=0) if len(h) > 1 else torch.zeros_like(h[0])
        self.mean = self.weight * torch.where(few, h.mean(dim=0), means)
        self.deviation = self.weight.abs() * torch.where(few, overall, deviations)

    def _score(self, h: Tensor) -> Tensor:
        assert self.mean is not None
        assert self.deviation is not None
        threshold = percentile(self.mean, self.percentile)
        kept, limit = self.mean > threshold, self.mean + self.deviations * self.deviation
        weight, energies = torch.where(kept, self.weight, 0.0), []
        for rows in h.split(self.rows_at_once()):
            contributions = rows[:, None] * weight
            within = rows[:, None] * self.weight < limit
            logits = torch.where(within, contributions, 0.0).sum(dim=2) + self.bias
            energies.append(-logits.logsumexp(dim=1))
        return torch.cat(energies)


def percentile(values: Tensor, percent: float) -> float:
    """A percentile with linear interpolation; −∞ for 0, so that everything lies above it."""
    if percent <= 0:
        return float("-inf")
    import numpy as np

    return float(np.percentile(values.cpu().numpy(), percent))


MAKERS: dict[str, Maker] = {"itp": lambda m: ITP(None, m.head)}
