"""Training by shaping parameter contribution patterns (SPCP, arXiv 2603.07195)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["Rectifier", "rectified"]


CONTRIBUTIONS = 2**23  # products W_ij·h_j held at once by `Rectifier`: 32 MiB of float32


def excess(features: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    """Σ_j max(W_ij h_j − λ, 0), shape (N, K), of features (N, L), weight (K, L) and a scalar λ."""
    return F.relu(features[:, None] * weight - threshold).sum(dim=2)


def rectified(
    head: nn.Linear,
    features: Tensor,
    threshold: Tensor,
    of: Callable[[Tensor, Tensor, Tensor], Tensor] = excess,
) -> Tensor:
    """Logits (N, K) of features (N, L) with contributions clipped to the scalar threshold.

    Args:
        head: the last layer, weight (K, L).
        features: h, (N, L).
        threshold: λ, a scalar.
        of: computes `excess`, for some of the classes at a time.
    """
    classes = head.weight.split(max(1, CONTRIBUTIONS // max(1, features.numel())))
    # Taken off the plain logits, which thus keep their bits where nothing is clipped.
    over = [of(features, w, threshold) for w in classes]
    logits: Tensor = head(features) - torch.cat(over, dim=1)
    return logits


class Rectifier:
    """Logits for training whose contributions W_ij·h_j are clipped to a threshold λ (SPCP).

    f_i = Σ_j min(W_ij h_j, λ) + b_i, so that a class learns to rely on many weights. For each batch
    λ ← decay·λ + (1 − decay)·q. For q, take the percentile of each sample's K·L contributions, and
    the mean of these over the samples. The backward pass treats λ as a constant.

    A batch has B·K·L contributions. To save memory, those of one class at a time, or at most
    `CONTRIBUTIONS`, are held, and the backward pass computes them again. q is estimated from as
    many samples as `CONTRIBUTIONS` allows: all of them for small heads, 16 for K = 1000, L = 512.
    `torch.quantile` does not take a head of more than 2²⁴ weights.

    Source: Xu and Yang, "Shaping Parameter Contribution Patterns for Out-of-Distribution
    Detection", AAAI 2026, arXiv 2603.07195. As in the authors' code (github.com/njustkmg/
    AAAI2026-SPCP): one λ for all classes, updated before the batch is clipped; q of 16 samples
    from 200 classes on. They use percentile 70 for CIFAR-10, 99.5 for CIFAR-100 and 99.8 for
    ImageNet-200. Unlike theirs: they start at λ = 1000 with decay 0.999, so that the first
    thousands of steps, more than a whole training has here, clip nothing. Here λ starts at the
    first batch's q, and decay is the 0.95 of their default configuration. Their evaluation clips at
    the learnt λ as well. Here a trained head is a plain linear layer, by which images are
    classified and which all detectors but one see; `opnp.detectors.spcp` scores as they do.

    Args:
        percentile: in (0, 100).
        decay: share of λ that stays at each update.
    """

    def __init__(self, percentile: float, decay: float = 0.95):
        self.percentile = percentile
        self.decay = decay
        self.threshold: Tensor | None = None

    def __call__(self, head: nn.Linear, features: Tensor) -> Tensor:
        """Update λ and return logits, float32 (N, K), of features (N, L)."""
        features = features.float()
        estimate = self._estimate(features.detach(), head.weight.detach())
        if self.threshold is None:
            self.threshold = estimate
        else:
            self.threshold = self.threshold.lerp(estimate, 1 - self.decay)
        return self.rectify(head, features, self.threshold)

    def _estimate(self, features: Tensor, weight: Tensor) -> Tensor:
        some = features[: max(1, CONTRIBUTIONS // weight.numel())]  # batches are shuffled already
        return (some[:, None] * weight).flatten(1).quantile(self.percentile / 100, dim=1).mean()

    @staticmethod
    def rectify(head: nn.Linear, features: Tensor, threshold: Tensor) -> Tensor:
        """Logits (N, K) of features (N, L) with contributions clipped to the scalar threshold."""
        again = partial(checkpoint, excess, use_reentrant=False, preserve_rng_state=False)
        return rectified(head, features, threshold, again)
