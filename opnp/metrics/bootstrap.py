"""Bootstrap intervals of the metrics of OOD detection."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opnp.metrics.separation import METRICS, check_scores

__all__ = ["bootstrap", "bootstrap_mean_fpr95", "interval", "weighted_metrics"]


BLOCK = 2_000_000  # weights that `bootstrap` holds at once, to bound its memory


def bootstrap(
    id_scores: Tensor,
    ood_scores: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    resamples: int,
    seed: int,
) -> dict[str, dict[str, tuple[float, float]]]:
    """95 % bootstrap percentile intervals of every metric, for each OOD set and their means.

    ID and OOD samples are resampled with replacement. All sets share each resample of the ID
    samples, so the interval of a mean accounts for what the sets have in common. A resample is
    stored as a weight for each sample, which lets one sort serve many resamples.

    Args:
        id_scores: outlier scores of ID samples, shape (N,).
        ood_scores: outlier scores of each OOD set, shape (M,).
        kinds: ``near`` or ``far`` for each OOD set.
        resamples: number of resamples.
        seed: of the resamples; detectors compared under one seed share them.

    Returns:
        For each set, for the mean over the sets of each kind, and for the ``mean`` over all sets:
        the interval (low, high) of each metric, in percent.

    Raises:
        InputError: a set is empty, or a score is NaN.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.
    """
    for scores in ood_scores.values():
        check_scores(id_scores, scores)
    kept = id_scores.double().numpy()
    drawn: dict[str, list[dict[str, NDArray[np.float64]]]] = {name: [] for name in ood_scores}
    largest = max(len(scores) for scores in ood_scores.values())
    block = max(1, BLOCK // (len(kept) + largest))
    # One generator for ID and one for each set: the draws do not depend on the size of a block.
    id_rng, *ood_rngs = np.random.default_rng(seed).spawn(1 + len(ood_scores))
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        id_weights = resampled(len(kept), count, id_rng)
        for (name, scores), rng in zip(ood_scores.items(), ood_rngs, strict=True):
            ood_weights = resampled(len(scores), count, rng)
            drawn[name].append(
                weighted_metrics(kept, scores.double().numpy(), id_weights, ood_weights)
            )
    values = {
        name: {metric: np.concatenate([part[metric] for part in parts]) for metric in METRICS}
        for name, parts in drawn.items()
    }
    groups = {kind: [name for name in ood_scores if kinds[name] == kind] for kind in kinds.values()}
    for group, names in {**groups, "mean": list(ood_scores)}.items():
        values[group] = {
            metric: np.mean([values[name][metric] for name in names], axis=0) for metric in METRICS
        }
    return {
        name: {metric: interval(value) for metric, value in by_metric.items()}
        for name, by_metric in values.items()
    }


def bootstrap_mean_fpr95(
    id_scores: Tensor, outlier_scores: Tensor, sizes: Sequence[int], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Bootstrap the mean ``fpr95`` over outlier sets; all detectors share each resample.

    Args:
        id_scores: outlier scores (larger = OOD) of ID samples, one row per detector, (C, N).
        outlier_scores: outlier scores of all outlier sets, one set after another, (C, Σ sizes).
        sizes: number of samples of each set.
        resamples: number of resamples.
        seed: of the resamples.

    Returns:
        The mean of each detector in each resample, in percent, shape (C, resamples).
    """
    inside, outside = id_scores.numpy(), outlier_scores.numpy()
    order = np.argsort(inside, axis=1)
    ordered = np.take_along_axis(inside, order, axis=1)
    rng, n = np.random.default_rng(seed), inside.shape[1]
    figures = np.empty((len(inside), resamples))
    for column in range(resamples):
        drawn = rng.multinomial(n, np.full(n, 1 / n))
        kept = np.cumsum(drawn[order], axis=1)
        thresholds = ordered[np.arange(len(order)), np.argmax(100 * kept >= 95 * n, axis=1)]
        share = np.concatenate([rng.multinomial(m, np.full(m, 1 / m)) / m for m in sizes])
        figures[:, column] = 100 / len(sizes) * ((outside <= thresholds[:, None]) @ share)
    return figures


def resampled(n: int, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The number of times each of ``n`` samples is drawn in each resample, (resamples, n)."""
    return rng.multinomial(n, np.full(n, 1 / n), resamples)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile of resampled values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def weighted_metrics(
    id_scores: NDArray[np.float64],
    ood_scores: NDArray[np.float64],
    id_weights: NDArray[np.int64],
    ood_weights: NDArray[np.int64],
) -> dict[str, NDArray[np.float64]]:
    """The metrics of weighted samples, in percent.

    Args:
        id_scores: outlier scores of ID samples, shape (N,).
        ood_scores: outlier scores of OOD samples, shape (M,).
        id_weights: number of times that each ID sample counts in each resample, shape (B, N).
        ood_weights: the same of the OOD samples, shape (B, M).

    Returns:
        Each metric in each resample, shape (B,).
    """
    # The thresholds are the distinct scores, ascending; a sample passes as ID if its score is ≤ t.
    thresholds, place = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    passed = []
    for weights, at in (
        (id_weights, place[: len(id_scores)]),
        (ood_weights, place[len(id_scores) :]),
    ):
        counts = np.zeros((len(weights), len(thresholds)))
        order = np.argsort(at, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(at[order]) > 0])
        counts[:, at[order][starts]] = np.add.reduceat(weights[:, order], starts, axis=1)
        passed.append(np.cumsum(np.pad(counts, ((0, 0), (1, 0))), axis=1))
    id_in, ood_in = passed  # (B, thresholds + 1): the number that pass, from none to all
    n, m = id_in[:, -1:], ood_in[:, -1:]
    id_out, ood_out = n - id_in, m - ood_in
    rows = np.arange(len(id_in))
    keeps = np.argmax(100 * id_in >= 95 * n, axis=1)  # the first threshold that keeps 95 % of ID
    catches = id_in.shape[1] - 1 - np.argmax((100 * ood_out >= 95 * m)[:, ::-1], axis=1)

    def area(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.abs(np.sum(np.diff(x, axis=1) * (y[:, 1:] + y[:, :-1]) / 2, axis=1))

    def precision(hits: NDArray[np.float64], misses: NDArray[np.float64]) -> NDArray[np.float64]:
        total = hits + misses
        return np.divide(hits, total, out=np.ones_like(hits), where=total > 0)

    values = {
        "fpr95": (ood_in / m)[rows, keeps],
        "fpr95_ood_positive": (id_out / n)[rows, catches],
        "auroc": area(ood_in / m, id_in / n),
        "aupr_in": area(id_in / n, precision(id_in, ood_in)),
        "aupr_out": area(ood_out / m, precision(ood_out, id_out)),
    }
    return {name: 100 * value for name, value in values.items()}
