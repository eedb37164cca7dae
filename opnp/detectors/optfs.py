"""OptFS: features are scaled by how much features of their size add to the predicted logit.

The range of the training features between their 0.1 and 99.9 % quantiles is cut into 100 equal
bins. With k the predicted class of a training sample, bin b is worth the mean over the samples of
what its features contribute to that logit,

    θ_b ∝ E[Σ_{j: h_j in b} W_kj h_j],       ‖θ‖₂ = 1000,

which solves the authors' optimization in closed form. A test feature in bin b is multiplied by θ_b,
one outside all bins is set to zero, and the score is the energy of the head on these features.

Source: Zhao et al., "Towards Optimal Feature-Shaping Methods for Out-of-Distribution Detection",
ICLR 2024, arXiv 2402.00865; number of bins, quantiles and norm as in their code.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about

__all__ = ["OptFS"]

OUTSIDE = 1e-3  # share of the features below the first bin, and of those above the last


class OptFS(CachedDetector):
    """Optimal feature shaping; see the module's formulas."""

    info = about(
        "Towards Optimal Feature-Shaping Methods for Out-of-Distribution Detection",
        "ICLR",
        2024,
        "https://arxiv.org/abs/2402.00865",
        "https://github.com/Qinyu-Allen-Zhao/OptFSOOD",
    )
    hyperparameter_space = {"norm": [10.0, 100.0, 1000.0]}
    fitted = ("worth", "edges")
    at_once = frozenset({"norm"})

    worth: Tensor | None  # θ of norm 1, (bins,)
    edges: Tensor | None  # (bins + 1,)

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        norm: float = 1000.0,
        bins: int = 100,
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
            norm: ‖θ‖₂, which acts as an inverse temperature.
            bins: into how many the range of the features is cut.
        """
        super().__init__(encoder, head)
        self.norm = norm
        self.bins = bins

    def _fit(self, h: Tensor, y: Tensor) -> None:
        low, high = np.quantile(h.cpu().numpy(), [OUTSIDE, 1 - OUTSIDE])
        self.edges = torch.linspace(low, high, self.bins + 1).to(h)
        adds = self.weight[self.logits(h).argmax(dim=1)] * h
        place, inside = self._places(h)
        sums = torch.zeros(self.bins).to(h).index_add_(0, place[inside], adds[inside])
        size = sums.norm()
        self.worth = sums / size if size > 0 else torch.ones_like(sums) / self.bins**0.5

    def _places(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The bin of each feature, and whether it lies in any."""
        assert self.edges is not None
        inside = (h >= self.edges[0]) & (h < self.edges[-1])
        place = torch.searchsorted(self.edges, h.contiguous(), right=True) - 1
        return place.clamp(0, self.bins - 1), inside

    def _score(self, h: Tensor) -> Tensor:
        assert self.worth is not None
        place, inside = self._places(h)
        shaped = torch.where(inside, h * self.norm * self.worth[place], 0.0)
        return -self.logits(shaped).logsumexp(dim=1)


MAKERS: dict[str, Maker] = {"optfs": lambda m: OptFS(None, m.head)}
