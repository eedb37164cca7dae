"""Means over OOD sets, and detectors ranked by a metric.

A column of the comparison is one OOD set, the mean over the ``near`` or the ``far`` sets, or the
``mean`` over all sets.
"""

from collections.abc import Collection, Mapping, Sequence

__all__ = ["columns", "lower_is_better", "ranked", "ranks", "with_means"]


Metrics = Mapping[str, Mapping[str, float]]
"""The metrics of each column, by name."""

Intervals = Mapping[str, Mapping[str, Mapping[str, float]]]
"""``low`` and ``high`` of each column's metrics."""

KINDS = ("near", "far")


def lower_is_better(metric: str) -> bool:
    return metric.startswith("fpr95") or metric == "rank"


def columns(kinds: Mapping[str, str]) -> list[str]:
    """The columns of a table, in order: near sets, their mean, far sets, their mean, overall mean.

    Args:
        kinds: ``near`` or ``far`` for each OOD set.
    """
    found = []
    for kind in KINDS:
        if sets := [name for name, of in kinds.items() if of == kind]:
            found += [*sets, kind]
    return [*found, "mean"]


def with_means(by_set: Metrics, kinds: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """One detector's metrics of each OOD set, followed by their means.

    Args:
        by_set: metrics of each OOD set.
        kinds: ``near`` or ``far`` for each of these sets.

    Returns:
        ``by_set``, extended by the means of every metric: ``near`` and ``far`` if there are sets of
        that kind, and ``mean``.
    """
    groups = {kind: [name for name in by_set if kinds[name] == kind] for kind in KINDS}
    groups["mean"] = list(by_set)
    metrics = list(next(iter(by_set.values())))
    return {name: dict(values) for name, values in by_set.items()} | {
        group: {m: sum(by_set[name][m] for name in names) / len(names) for m in metrics}
        for group, names in groups.items()
        if names
    }


def ranks(
    detectors: Mapping[str, Metrics],
    sets: Sequence[str],
    metric: str = "fpr95",
    same: Mapping[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """Rank the detectors on each OOD set, 1 for the best.

    Tied detectors share the mean of the ranks they span (`scipy.stats.rankdata`, "average").

    Args:
        detectors: the metrics of each detector.
        sets: the OOD sets.
        metric: the metric to rank by.
        same: detectors that are another one by a second name: they take its ranks, and count once.

    Returns:
        For each detector, its rank on each set and the ``mean`` of these ranks.
    """
    from scipy.stats import rankdata  # here, because the import takes a second or two

    sign = 1 if lower_is_better(metric) else -1
    same = same or {}
    apart = [name for name in detectors if name not in same]
    # Rounding keeps ties that only the order of a sum would break.
    values = [[round(sign * detectors[name][s][metric], 9) for s in sets] for name in apart]
    places = rankdata(values, axis=0).tolist()
    found = {
        name: {**dict(zip(sets, row, strict=True)), "mean": sum(row) / len(row)}
        for name, row in zip(apart, places, strict=True)
    }
    return {name: found[same.get(name, name)] for name in detectors}


def ranked(
    detectors: Mapping[str, Metrics],
    places: Mapping[str, Mapping[str, float]],
    metric: str = "fpr95",
    same: Collection[str] = (),
) -> list[str]:
    """Sort the detectors by mean rank, best first; the metric's mean breaks ties.

    Those in ``same``, which are another one by a second name, are left out.
    """
    sign = 1 if lower_is_better(metric) else -1
    return sorted(
        (name for name in detectors if name not in same),
        key=lambda name: (places[name]["mean"], sign * detectors[name]["mean"][metric]),
    )
