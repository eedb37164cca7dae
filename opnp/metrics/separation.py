"""Metrics of OOD detection, in percent.

FPR95 is defined in two ways, and both are reported, under different names:

``fpr95``
    As in the OOD literature (ODIN, ReAct, DICE, OPNP), in-distribution (ID) is positive: the
    threshold keeps 95 % of the ID samples, and FPR95 is the share of OOD samples that pass it.
``fpr95_ood_positive``
    As in OpenOOD and pytorch-ood, OOD is positive: the threshold catches 95 % of the OOD samples,
    and FPR95 is the share of ID samples that it rejects.
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
    """Compute the five metrics with pytorch-ood.

    Args:
        id_scores: outlier scores (larger = OOD) of ID samples, shape (N,).
        ood_scores: outlier scores of OOD samples, shape (M,).

    Returns:
        Each metric of `METRICS`, in percent.

    Raises:
        InputError: there are no ID or no OOD scores, or a score is NaN.
    """
    from pytorch_ood.metrics import functional as metric

    check_scores(id_scores, ood_scores)
    scores = torch.cat([id_scores, ood_scores])
    labels = torch.cat([torch.zeros(len(id_scores)), -torch.ones(len(ood_scores))])
    values = {
        # To pytorch-ood, negative labels are positive samples: both signs swapped, ID is positive.
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
                f"There are no {name} scores: a metric needs ID scores and OOD scores."
            )
        if scores.isnan().any():
            raise InputError(f"{name} scores contain NaN: check the features and the detector.")


def fpr95_auroc(
    id_scores: Tensor, outlier_scores: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``fpr95`` and ``auroc`` against several outlier sets at once, fast enough for a search.

    The figures equal those of `ood_metrics`, but take only one sort of each set's scores.

    Args:
        id_scores: outlier scores (larger = OOD) of ID samples, shape (..., N).
        outlier_scores: outlier scores of all outlier sets, one set after another, shape
            (..., Σ sizes).
        sizes: number of samples of each set.

    Returns:
        FPR95 and AUROC in percent, each float64 of shape (..., len(sizes)).
    """
    n = id_scores.shape[-1]
    at = -(-95 * n // 100) - 1  # rank of the least score that keeps at least 95 % of ID
    rows = id_scores.reshape(-1, n)
    outliers = outlier_scores.reshape(len(rows), -1)
    if rows.is_cuda:
        ordered = rows.sort(dim=1).values
        below = torch.searchsorted(ordered, outliers)  # number of ID samples below an outlier
        not_above = torch.searchsorted(ordered, outliers, right=True)
        wins = (below + not_above).double() / (2 * n)  # ties count half
        passes = (outliers <= ordered[:, at, None]).double()
        values = [
            torch.stack([part.mean(dim=1) for part in each.split(list(sizes), dim=1)], dim=1)
            for each in (passes, wins)
        ]
    else:  # on a CPU, NumPy sorts and searches several times faster than torch
        found = np.empty((2, len(rows), len(sizes)))
        counts = np.asarray(sizes)
        starts = np.cumsum(counts) - counts
        for row, (inside, outside) in enumerate(zip(rows.numpy(), outliers.numpy(), strict=True)):
            ordered_id, ordered_out = np.sort(inside), outside.copy()
            for start, count in zip(starts, counts, strict=True):
                ordered_out[start : start + count].sort()  # makes the searches hit the cache
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
    """The ROC curve with ID as positive.

    Args:
        id_scores: outlier scores (larger = OOD) of ID samples, shape (N,).
        ood_scores: outlier scores of OOD samples, shape (M,).
        fpr: false positive rates in [0, 1], ascending.

    Returns:
        The true positive rate in [0, 1] at each FPR, interpolated linearly.
    """
    thresholds = torch.cat([id_scores, ood_scores]).unique().double().numpy()
    kept, passed = (
        np.searchsorted(np.sort(scores.double().numpy()), thresholds, side="right") / len(scores)
        for scores in (id_scores, ood_scores)
    )
    return np.interp(fpr, np.concatenate([[0.0], passed]), np.concatenate([[0.0], kept]))
