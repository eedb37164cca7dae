"""KPCA: the part of a feature's direction that the principal components of training leave over.

Features are divided by their Euclidean norm (CoP, a cosine kernel) and, where a width γ of the
Gaussian kernel is given, mapped by M random Fourier features (CoRP),

    φ(h) = √(2/M) cos(Ω h/‖h‖₂ + u),     Ω_ij ~ N(0, 2γ),  u_i ~ U(0, 2π).

The score is the distance of the centred φ from the span of the first q principal components of the
training samples, with q the smallest number that explains a given share of their variance.

Source: Fang et al., "Kernel PCA for Out-of-Distribution Detection", NeurIPS 2024, arXiv
2402.02949. As the authors' code (github.com/fanghenshaometeor/ood-kernel-pca), with the random
numbers drawn from a fixed seed.
"""

from collections.abc import Callable
from functools import lru_cache
from math import pi, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about

__all__ = ["KPCA"]


class KPCA(CachedDetector):
    """Reconstruction error of kernel PCA; see the module's formulas."""

    info = about(
        "Kernel PCA for Out-of-Distribution Detection",
        "NeurIPS",
        2024,
        "https://arxiv.org/abs/2402.02949",
        "https://github.com/fanghenshaometeor/ood-kernel-pca",
    )
    hyperparameter_space = {"explained": [0.8, 0.9, 0.95, 0.99], "gamma": [None, 0.5, 1.0, 3.0]}
    fitted = ("centre", "components")

    centre: Tensor | None  # (M,) or (L,)
    components: Tensor | None  # (M or L, q)

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        explained: float = 0.9,
        gamma: float | None = None,
        dimensions: int | None = None,
        seed: int = 0,
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
            explained: share of the variance that the components explain at least, in (0, 1).
            gamma: γ of the Gaussian kernel; None: cosine kernel alone.
            dimensions: M; without it 2·L, and at most 2048.
            seed: of the random Fourier features.
        """
        super().__init__(encoder, head)
        self.explained = explained
        self.gamma = gamma
        self.dimensions = dimensions or min(2 * head.in_features, 2048)
        self.seed = seed

    def _mapped(self, h: Tensor) -> Tensor:
        direction = F.normalize(h, dim=1)
        if self.gamma is None:
            return direction
        frequencies, shift = random_features(self.seed, self.dimensions, h.shape[1])
        omega = sqrt(2 * self.gamma) * frequencies
        angle = direction @ omega.T.to(h.device) + shift.to(h.device)
        return sqrt(2 / self.dimensions) * angle.cos()

    def _fit(self, h: Tensor, y: Tensor) -> None:
        mapped = self._mapped(h)
        self.centre = mapped.mean(dim=0)
        centred = mapped - self.centre
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        shares = values.clamp(min=0).flip(0).cumsum(0)
        shares = shares / shares[-1].clamp(min=torch.finfo(shares.dtype).tiny)
        kept = int((shares < self.explained).sum()) + 1
        self.components = vectors[:, -min(kept, len(values)) :]

    def _score(self, h: Tensor) -> Tensor:
        assert self.centre is not None
        assert self.components is not None
        centred = self._mapped(h) - self.centre
        return (centred - centred @ self.components @ self.components.T).norm(dim=1)


@lru_cache(maxsize=2)  # every batch of every combination of hyperparameters asks for the same
def random_features(seed: int, dimensions: int, width: int) -> tuple[Tensor, Tensor]:
    """Ω for γ = ½, (M, L), and u, (M,), of the Fourier features, float64."""
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn((dimensions, width), generator=generator, dtype=torch.float64)
    shift = 2 * pi * torch.rand(dimensions, generator=generator, dtype=torch.float64)
    return omega, shift


MAKERS: dict[str, Maker] = {"kpca": lambda m: KPCA(None, m.head)}
