"""Metrics of OOD detection and of classification, in percent.

Two conventions of FPR95 exist, and both are reported under names that tell them apart:

``fpr95``
    The OOD literature's (ODIN, ReAct, DICE, OPNP): in-distribution (ID) is positive. The threshold
    keeps 95 % of the ID samples; the figure is the share of OOD samples that pass it.
``fpr95_ood_positive``
    OpenOOD's and pytorch-ood's: OOD is positive. The threshold catches 95 % of the OOD samples; the
    figure is the share of ID samples rejected by it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opnp.errors import InputError

__all__ = ["METRICS", "fpr95_auroc", "ood_metrics", "tpr_at_fpr"]


METRICS = ("fpr95", "fpr95_ood_positive", "auroc", "aupr_in", "aupr_out")


def ood_metrics(id_scores: Tensor, ood_scores: Tensor) -> dict[str, float]:
    """The five metrics, computed by pytorch-ood.

    Args:
        id_scores: outlier scores (larger = OOD) of ID samples, shape (N,).
        ood_scores: outlier scores of OOD samples, shape (M,).

    Returns:
        The metrics in `METRICS`, each in percent.

    Raises:
        InputError: one of the two is empty, or a score is NaN.
    """
    from pytorch_ood.metrics import functional as metric

    check_scores(id_scores, ood_scores)
    scores = torch.cat([id_scores, ood_scores])
    labels = torch.cat([torch.zeros(len(id_scores)), -torch.ones(len(ood_scores))])
    values = {
        # pytorch-ood takes labels below zero as positive: swapping both signs makes ID positive.
        "fpr95": metric.fpr_at_tpr(-scores, -1 - labels),
        "fpr95_ood_positive": metric.fpr_at_tpr(scores, labels),
        "auroc": metric.auroc(scores, labels),
        "aupr_in": metric.aupr(scores, labels, positive="id"),
        "aupr_out": metric.aupr(scores, labels, positive="ood"),
    }
    return {name: 100 * float(value) for name, value in values.items()}


def check_scores(id_scores: Tensor, ood_scores: Tensor) -> None:
    for name, scores in (("ID", id_scores), ("OOD", ood_scores)):
        if len(scores) == 0:
            raise InputError(
                f"There are no {name} scores: a metric needs at least one of each kind."
            )
        if scores.isnan().any():
            raise InputError(f"{name} scores hold NaN: check the features and the detector.")


def fpr95_auroc(
    id_scores: Tensor, outlier_scores: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``fpr95`` and ``auroc`` against several outlier sets at once, fast enough for a search.

    The same figures as `ood_metrics`, from one sort of each set's scores.

    Args:
        id_scores: outlier scores (larger = OOD) of ID samples, shape (..., N).
        outlier_scores: of all outlier sets, one after another, shape (..., Σ sizes).
        sizes: of each set.

    Returns:
        FPR95 and AUROC, each of shape (..., len(sizes)), float64, in percent.
    """
    n = id_scores.shape[-1]
    at = -(-95 * n // 100) - 1  # in order: the smallest score that keeps at least 95 % of ID
    rows = id_scores.reshape(-1, n)
    outliers = outlier_scores.reshape(len(rows), -1)
    if rows.is_cuda:
        ordered = rows.sort(dim=1).values
        below = torch.searchsorted(ordered, outliers)  # ID samples scored less than this outlier
        not_above = torch.searchsorted(ordered, outliers, right=True)
        wins = (below + not_above).double() / (2 * n)  # ties count half
        passes = (outliers <= ordered[:, at, None]).double()
        values = [
            torch.stack([part.mean(dim=1) for part in each.split(list(sizes), dim=1)], dim=1)
            for each in (passes, wins)
        ]
    else:  # NumPy sorts, and searches what is sorted, several times faster than torch on CPUs
        found = np.empty((2, len(rows), len(sizes)))
        counts = np.asarray(sizes)
        starts = np.cumsum(counts) - counts
        for row, (inside, outside) in enumerate(zip(rows.numpy(), outliers.numpy(), strict=True)):
            ordered_id, ordered_out = np.sort(inside), outside.copy()
            for start, count in zip(starts, counts, strict=True):
                ordered_out[start : start + count].sort()  # so that searches hit the cache
            below_id = np.searchsorted(ordered_id, ordered_out)
            tied = np.flatnonzero(ordered_id[np.minimum(below_id, n - 1)] == ordered_out)
            wins = below_id.astype(np.float64)
            not_above_id = np.searchsorted(ordered_id, ordered_out[tied], "right")
            wins[tied] = (wins[tied] + not_above_id) / 2  # ties count half
            passed = (ordered_out <= ordered_id[at]).astype(np.float64)
            found[:, row] = np.add.reduceat([passed, wins / n], starts, axis=1) / counts
        values = list(torch.from_numpy(found))
    shape = (*id_scores.shape[:-1], len(sizes))
    return 100 * values[0].reshape(shape), 100 * values[1].reshape(shape)


def tpr_at_fpr(
    id_scores: Tensor, ood_scores: Tensor, fpr: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The ROC curve with ID positive: TPR, in [0, 1], at each FPR, linear in between."""
    thresholds = torch.cat([id_scores, ood_scores]).unique().double().numpy()
    kept, passed = (
        np.searchsorted(np.sort(scores.double().numpy()), thresholds, side="right") / len(scores)
        for scores in (id_scores, ood_scores)
    )
    return np.interp(fpr, np.concatenate([[0.0], passed]), np.concatenate([[0.0], kept]))
