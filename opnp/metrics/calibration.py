"""Accuracy and calibration of a classifier, with bootstrap intervals."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from opnp.metrics.bootstrap import interval

__all__ = ["calibration", "calibration_intervals"]


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and calibration of a classifier.

    Args:
        logits: shape (N, K).
        labels: shape (N,).

    Returns:
        ``accuracy`` in percent; ``ece``, the expected calibration error in percent, over bins of
        100 samples each, not of equal width (pytorch-ood's `calibration_error` with p = 1);
        ``nll``, the mean negative log-likelihood in nats.
    """
    return calibration_of(*outcomes(logits, labels))


def calibration_intervals(
    logits: Tensor, labels: Tensor, resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals (low, high) of the figures that `calibration` returns.

    Args:
        logits: shape (N, K).
        labels: shape (N,).
        resamples: number of resamples.
        seed: of the resamples.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.
    """
    measured = outcomes(logits, labels)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        rows = torch.from_numpy(rng.integers(len(labels), size=len(labels)))
        drawn.append(calibration_of(*(values[rows] for values in measured)))
    return {name: interval(np.array([values[name] for values in drawn])) for name in drawn[0]}


def outcomes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, correctness and negative log-likelihood of each prediction, each (N,)."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    return confidence, predicted == labels, F.cross_entropy(logits, labels, reduction="none")


def calibration_of(confidence: Tensor, correct: Tensor, nll: Tensor) -> dict[str, float]:
    from pytorch_ood.metrics import calibration_error

    return {
        "accuracy": 100 * float(correct.double().mean()),
        "ece": 100 * calibration_error(confidence, correct, p="1", beta=100),
        "nll": float(nll.double().mean()),
    }
