"""SHE: how well features agree with the stored pattern of the predicted class.

The pattern S_c of class c is the mean of the features of its training samples that are classified
correctly, and the in-distribution score is the inner product

    S_k · h,     k the predicted class.

Source: Zhang et al., "Out-of-Distribution Detection based on In-Distribution Data Patterns
Memorization with Modern Hopfield Energy", ICLR 2023. Decided here: classes without a training
sample that is classified correctly have no pattern, and of the others the one with the largest
logit counts as predicted.
"""

import torch
from torch import Tensor

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about, class_means
from opnp.errors import InputError

__all__ = ["SHE"]


class SHE(CachedDetector):
    """Simplified Hopfield energy, without hyperparameters; see the module's formula."""

    info = about(
        "Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization with "
        "Modern Hopfield Energy",
        "ICLR",
        2023,
        "https://openreview.net/pdf?id=KkazG4lgKL",
    )
    fitted = ("patterns", "stored")

    patterns: Tensor | None  # S, (classes that have one, L)
    stored: Tensor | None  # which classes these are, ascending

    def _fit(self, h: Tensor, y: Tensor) -> None:
        correct = self.logits(h).argmax(dim=1) == y
        if not correct.any():
            raise InputError(
                "SHE cannot be fitted: no training sample is classified as its label says."
            )
        means, counts = class_means(h[correct], y[correct], self.head.out_features)
        self.stored = torch.nonzero(counts)[:, 0]
        self.patterns = means[self.stored]

    def _score(self, h: Tensor) -> Tensor:
        assert self.patterns is not None
        assert self.stored is not None
        predicted = self.logits(h)[:, self.stored].argmax(dim=1)
        return -(h * self.patterns[predicted]).sum(dim=1)


MAKERS: dict[str, Maker] = {"she": lambda m: SHE(None, m.head)}
