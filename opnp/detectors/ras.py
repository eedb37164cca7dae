"""RAS: activations keep their order and take the values of a typical training sample.

The sorted features of every training sample are averaged place by place, which gives one profile of
L ascending values. At test time the smallest feature of a sample becomes the first value of the
profile, the next one the second, and so on; the score is the energy of the head on these features.

Source: Guglielmo and Masana, "Ranked Activation Shift for Post-Hoc Out-of-Distribution Detection",
2026, arXiv 2604.08572. As the authors' code (github.com/gigug/RAS); equal features are put in the
order of their indices.
"""

import torch
from torch import Tensor

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about

__all__ = ["RAS"]


class RAS(CachedDetector):
    """Ranked activation shift, without hyperparameters; see the module."""

    info = about(
        "Ranked Activation Shift for Post-Hoc Out-of-Distribution Detection",
        "arXiv",
        2026,
        "https://arxiv.org/abs/2604.08572",
        "https://github.com/gigug/RAS",
    )
    fitted = ("profile",)

    profile: Tensor | None  # (L,), ascending

    def _fit(self, h: Tensor, y: Tensor) -> None:
        self.profile = h.sort(dim=1).values.mean(dim=0)

    def _score(self, h: Tensor) -> Tensor:
        assert self.profile is not None
        order = h.argsort(dim=1, stable=True)
        shifted = torch.empty_like(h).scatter_(1, order, self.profile.expand_as(h))
        return -self.logits(shifted).logsumexp(dim=1)


MAKERS: dict[str, Maker] = {"ras": lambda m: RAS(None, m.head)}
