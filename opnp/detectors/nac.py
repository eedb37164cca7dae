"""NAC: how many training samples drove each neuron into the state that a sample drives it into.

With p = softmax f and ℓ = −(1/K) Σ_c log p_c, which is the divergence of p from the uniform
distribution up to a constant, the state of feature j is

    s_j = σ(α · h_j · ∂ℓ/∂h_j),        ∂ℓ/∂h = Wᵀ (p − 1/K),

in closed form, for a linear head. The interval [0, 1] is cut into M − 2 bins that are narrow at
both of its ends. The coverage of a bin is min(n/O, 1), where n training samples put the feature
there; the in-distribution score is the mean over the features of the coverage of the bin they hit.

Source: Liu et al., "Neuron Activation Coverage: Rethinking Out-of-Distribution Detection and
Generalization", ICLR 2024, arXiv 2306.02879. Bins and coverage as in the authors' code
(github.com/BierOne/ood_coverage), on the penultimate layer alone, the first of the four layers that
they use; there (α, M, O) is (100, 50, 50) on CIFAR-10 and (3000, 50, 10) on ImageNet, counted over
1,000 training images.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about

__all__ = ["NAC"]

BASE = 1e3  # of the logarithm that spaces the edges of the bins


class NAC(CachedDetector):
    """Neuron activation coverage of the penultimate layer; see the module's formulas."""

    info = about(
        "Neuron Activation Coverage: Rethinking Out-of-Distribution Detection and Generalization",
        "ICLR",
        2024,
        "https://arxiv.org/abs/2306.02879",
        "https://github.com/BierOne/ood_coverage",
    )
    # The authors take 50 bins for every penultimate layer.
    hyperparameter_space = {
        "steepness": [1.0, 10.0, 100.0, 1e3, 1e4],
        "bins": [50],
        "enough": [5, 50, 500],
    }
    fitted = ("counts",)
    at_once = frozenset({"enough"})

    counts: Tensor | None  # training samples in each bin of each feature, (bins, L)

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        steepness: float = 100.0,
        bins: int = 50,
        enough: int = 50,
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
            steepness: α of the sigmoid.
            bins: M, at least 4.
            enough: O, the number of training samples that cover a bin.
        """
        super().__init__(encoder, head)
        self.steepness = steepness
        self.bins = bins
        self.enough = enough

    def edges(self) -> Tensor:
        """The lower edges of the bins but the first, (M − 3,), ascending in (0, 1)."""
        near_zero = torch.linspace(1, BASE**0.5, self.bins // 2, dtype=torch.float64).log()
        near_zero = near_zero / torch.tensor(BASE, dtype=torch.float64).log()
        return torch.cat([near_zero[1:-1], (1 - near_zero).flip(0)[:-1]])

    def states(self, h: Tensor) -> Tensor:
        """s, (N, L), in [0, 1]."""
        p = self.logits(h).softmax(dim=1)
        return (self.steepness * h * ((p - 1 / p.shape[1]) @ self.weight)).sigmoid()

    def _places(self, h: Tensor) -> Tensor:
        """The bin of each feature, (N, L)."""
        return torch.searchsorted(self.edges().to(h), self.states(h), right=True)

    def _fit(self, h: Tensor, y: Tensor) -> None:
        places, width = self._places(h), h.shape[1]
        flat = (places * width + torch.arange(width, device=h.device)).flatten()
        size = len(self.edges()) + 1
        self.counts = torch.bincount(flat, minlength=size * width).reshape(size, width)

    def _score(self, h: Tensor) -> Tensor:
        assert self.counts is not None
        coverage = (self.counts / self.enough).clamp(max=1).double()
        return -coverage.gather(0, self._places(h)).mean(dim=1)


MAKERS: dict[str, Maker] = {"nac": lambda m: NAC(None, m.head)}
