"""Means over OOD sets, and detectors ranked by a metric.

A column of the comparison is an OOD set, the mean over the `near` or the `far` sets, or the `mean`
over all of them.
"""

from collections.abc import Mapping, Sequence

__all__ = ["columns", "lower_is_better", "ranked", "ranks", "with_means"]


Metrics = Mapping[str, Mapping[str, float]]
"""Metrics by name, of each column."""

Intervals = Mapping[str, Mapping[str, Mapping[str, float]]]
"""``low`` and ``high`` of each metric, of each column."""

KINDS = ("near", "far")


def lower_is_better(metric: str) -> bool:
    return metric.startswith("fpr95") or metric == "rank"


def columns(kinds: Mapping[str, str]) -> list[str]:
    """The columns in the order of tables: near sets and their mean, far sets and theirs, mean.

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
        The same, and every metric's mean as ``near`` and ``far``, where there are such sets, and
        ``mean``.
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
    detectors: Mapping[str, Metrics], sets: Sequence[str], metric: str = "fpr95"
) -> dict[str, dict[str, float]]:
    """The place of each detector on each OOD set, 1 for the best.

    Detectors that are equal share the mean of the places they take together.

    Args:
        detectors: metrics of each detector.
        sets: the OOD sets.
        metric: what decides.

    Returns:
        For each detector: its rank on each set, and their ``mean``.
    """
    sign = 1 if lower_is_better(metric) else -1
    found: dict[str, dict[str, float]] = {name: {} for name in detectors}
    for column in sets:
        # Rounded, so that sums in another order do not part what is equal.
        values = {name: round(sign * by[column][metric], 9) for name, by in detectors.items()}
        for name, value in values.items():
            better = sum(other < value for other in values.values())
            equal = sum(other == value for other in values.values())
            found[name][column] = better + (equal + 1) / 2
    return {name: {**of, "mean": sum(of.values()) / len(of)} for name, of in found.items()}


def ranked(
    detectors: Mapping[str, Metrics],
    places: Mapping[str, Mapping[str, float]],
    metric: str = "fpr95",
) -> list[str]:
    """Detectors by mean rank, best first; the mean of the metric parts those of equal rank."""
    sign = 1 if lower_is_better(metric) else -1
    return sorted(
        detectors, key=lambda name: (places[name]["mean"], sign * detectors[name]["mean"][metric])
    )
