"""GMM: the likelihood of features under one Gaussian for each class, with few samples or many.

With n_c training samples of class c among n, their mean μ_c and empirical covariance S_c, and the
covariance Σ of all samples around their class means, shrunk by Ledoit and Wolf's rule,

    Σ_c = (n_c S_c + m Σ) / (n_c + m),     score = −log Σ_c (n_c / n) N(h | μ_c, Σ_c),

so that Σ weighs as much as m samples of each class: a class with a single sample takes the shape
that all classes share, one with many its own. Classes without samples take no part, and every Σ_c
has an inverse. Constants that all samples share are left out of the score.

Sources: Friedman, "Regularized Discriminant Analysis", Journal of the American Statistical
Association 1989, for covariances between a class's own and the pooled one; Ledoit and Wolf, "A
well-conditioned estimator for large-dimensional covariance matrices", Journal of Multivariate
Analysis 2004. The weight by m samples is the mean of an inverse Wishart prior.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from pytorch_ood.api import DetectorInfo, Task
from torch import Tensor, nn

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, class_means
from opnp.detectors.mahalanobis import whitening
from opnp.errors import InputError

__all__ = ["GMM"]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A class in coordinates where Σ is the identity."""

    count: int  # n_c
    mean: Tensor  # μ_c, (L,)
    spreads: Tensor  # the eigenvalues of n_c S_c that are not zero, (r,)
    axes: Tensor  # their eigenvectors, (L, r), with r ≤ min(n_c, L): all that is kept of S_c


class GMM(CachedDetector):
    """A Gaussian for each class, each between its own and the pooled covariance; see the module."""

    # A classical method, which no single paper introduced.
    info = DetectorInfo(tasks={Task.CLASSIFICATION})
    hyperparameter_space = {"prior": [0.1, 1.0, 10.0, 100.0, 1000.0]}
    fitted = ("factor", "classes")
    at_once = frozenset({"prior"})

    factor: Tensor | None  # Σ^-½, (L, L)
    classes: list[Gaussian] | None  # those that have samples

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        prior: float = 1.0,
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
            prior: m > 0, the number of samples of each class that the pooled covariance is worth.

        Raises:
            InputError: ``prior`` is not positive.
        """
        super().__init__(encoder, head)
        self.prior = prior
        self._check()

    def _check(self) -> None:
        if not 0 < self.prior < float("inf"):
            raise InputError(f"prior={self.prior} must be positive and finite.")

    def _fit(self, h: Tensor, y: Tensor) -> None:
        means, counts = class_means(h, y, self.head.out_features)
        self.factor = whitening(h - means[y])
        h, means = h @ self.factor, means @ self.factor
        self.classes = [
            Gaussian(int(counts[label]), means[label], *principal(h[y == label] - means[label]))
            for label in torch.nonzero(counts)[:, 0].tolist()
        ]

    def _score(self, h: Tensor) -> Tensor:
        assert self.factor is not None
        assert self.classes is not None
        h = h @ self.factor
        found, m = h.new_empty(len(h), len(self.classes)), self.prior
        for place, each in enumerate(self.classes):
            away, spreads = h - each.mean, each.spreads
            # By Woodbury's identity, with m and m + spreads the eigenvalues of (n_c + m) Σ_c.
            along = (away @ each.axes).square() * (spreads / (m + spreads))
            scale = 1 + each.count / m
            distance = scale * (away.square().sum(dim=1) - along.sum(dim=1))
            volume = float((spreads / m).log1p().sum()) - h.shape[1] * log(scale)
            found[:, place] = log(each.count) - (distance + volume) / 2
        return -found.logsumexp(dim=1)


def principal(centred: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of CᵀC that are not zero, (r,), and their eigenvectors, (L, r).

    Args:
        centred: C, the samples (n, L) of a class less their mean.
    """
    count, width = centred.shape
    if count >= width:
        values, axes = torch.linalg.eigh(centred.T @ centred)
    else:  # the smaller of two matrices that share these eigenvalues
        values, axes = torch.linalg.eigh(centred @ centred.T)
        axes = centred.T @ axes / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    kept = values > values.max().clamp(min=0) * 1e-10
    return values[kept], axes[:, kept]


MAKERS: dict[str, Maker] = {"gmm": lambda m: GMM(None, m.head)}
