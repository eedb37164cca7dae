"""Mahalanobis distances that hold with few samples a class, on features or on their directions.

With μ_c the mean features of class c over the training samples and Σ the covariance of all samples
around their class means, shrunk towards a multiple of the identity by Ledoit and Wolf's rule,

    d_c(x) = (h − μ_c)ᵀ Σ⁻¹ (h − μ_c)            score = min_c d_c(x)                (Mahalanobis)

    score = min_c d_c(x) − (h − μ)ᵀ Σ₀⁻¹ (h − μ)         (relative: μ, Σ₀ of all samples together)

and Mahalanobis++ and its relative form are the same on h/‖h‖₂. Classes without a training sample
take no part, and the shrunk covariance always has an inverse.

Sources: Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
Adversarial Attacks", NeurIPS 2018; Ren et al., "A Simple Fix to Mahalanobis Distance for Improving
Near-OOD Detection", arXiv 2106.09022; Müller and Hein, "Mahalanobis++: Improving OOD Detection via
Feature Normalization", ICML 2025, arXiv 2505.18032; Ledoit and Wolf, "A well-conditioned estimator
for large-dimensional covariance matrices", Journal of Multivariate Analysis 2004.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about, class_means

__all__ = ["Mahalanobis", "MahalanobisPP", "RelativeMahalanobis", "RelativeMahalanobisPP"]


class Mahalanobis(CachedDetector):
    """Squared Mahalanobis distance to the nearest class; see the module's formulas."""

    info = about(
        "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial "
        "Attacks",
        "NeurIPS",
        2018,
        "https://arxiv.org/abs/1807.03888",
    )
    fitted = ("means", "factor")
    normalized = False
    relative = False

    means: Tensor | None  # of the classes that have samples, (classes, L), whitened
    factor: Tensor | None  # Σ^-½, (L, L)
    background: tuple[Tensor, Tensor] | None  # mean (L,), whitened, and Σ₀^-½ of all samples

    def _prepared(self, h: Tensor) -> Tensor:
        return F.normalize(h, dim=1) if self.normalized else h

    def _fit(self, h: Tensor, y: Tensor) -> None:
        h = self._prepared(h)
        means, counts = class_means(h, y, self.head.out_features)
        self.factor = whitening(h - means[y])
        self.means = means[counts > 0] @ self.factor
        self.background = None
        if self.relative:
            centre = h.mean(dim=0)
            factor = whitening(h - centre)
            self.background = centre @ factor, factor

    def _score(self, h: Tensor) -> Tensor:
        assert self.means is not None
        assert self.factor is not None
        h = self._prepared(h)
        found = torch.cdist(h @ self.factor, self.means).amin(dim=1) ** 2
        if self.background is not None:
            centre, factor = self.background
            found = found - (h @ factor - centre).square().sum(dim=1)
        return found


class RelativeMahalanobis(Mahalanobis):
    """Mahalanobis distance to the nearest class less that to all training samples together."""

    info = about(
        "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection",
        "arXiv",
        2021,
        "https://arxiv.org/abs/2106.09022",
    )
    relative = True


class MahalanobisPP(Mahalanobis):
    """Mahalanobis++: the distance between directions of features."""

    info = about(
        "Mahalanobis++: Improving OOD Detection via Feature Normalization",
        "ICML",
        2025,
        "https://arxiv.org/abs/2505.18032",
        "https://github.com/mueller-mp/maha-norm",
    )
    normalized = True


class RelativeMahalanobisPP(MahalanobisPP):
    """Relative Mahalanobis++: both distances between directions of features."""

    relative = True


def whitening(centred: Tensor) -> Tensor:
    """Σ^-½, (L, L), of the Ledoit-Wolf estimate of the covariance of centred samples (N, L).

    A dimension that never varies, in samples that vary, keeps what shrinkage gives it; where
    nothing varies at all the identity is returned.
    """
    from sklearn.covariance import ledoit_wolf

    estimate, _ = ledoit_wolf(centred.cpu().numpy(), assume_centered=True)
    values, vectors = torch.linalg.eigh(torch.from_numpy(estimate).to(centred))
    smallest = values.max() * torch.finfo(values.dtype).eps * len(values)
    if values.max() <= 0:
        return torch.eye(len(values)).to(centred)
    return (vectors * values.clamp(min=float(smallest)).rsqrt()) @ vectors.T


MAKERS: dict[str, Maker] = {
    "mahalanobis": lambda m: Mahalanobis(None, m.head),
    "rmd": lambda m: RelativeMahalanobis(None, m.head),
    "mahalanobis++": lambda m: MahalanobisPP(None, m.head),
    "rmd++": lambda m: RelativeMahalanobisPP(None, m.head),
}
