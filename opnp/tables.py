"""The comparison of detectors as tables: means, ranks, a long table and one for GitHub.

A column of the comparison is an OOD set, the mean over the `near` or the `far` sets, or the `mean`
over all of them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opnp.files import atomic

__all__ = [
    "columns",
    "detector_name",
    "long_table",
    "lower_is_better",
    "ours",
    "ranked",
    "ranks",
    "to_markdown",
    "with_means",
    "write",
]

Metrics = Mapping[str, Mapping[str, float]]
"""Metrics by name, of each column."""

Intervals = Mapping[str, Mapping[str, Mapping[str, float]]]
"""``low`` and ``high`` of each metric, of each column."""

KINDS = ("near", "far")

NAMES = {
    "msp": "MSP",
    "maxlogit": "MaxLogit",
    "energy": "Energy",
    "gen": "GEN",
    "klmatching": "KL matching",
    "react": "ReAct",
    "dice": "DICE",
    "ash": "ASH",
    "scale": "SCALE",
    "vra": "VRA",
    "she": "SHE",
    "knn": "KNN",
    "mahalanobis": "Mahalanobis",
    "rmd": "RMD",
    "vim": "ViM",
    "gmm": "GMM",
    "fdbd": "fDBD",
    "nci": "NCI",
    "nnguide": "NNGuide",
    "lts": "LTS",
    "openmax": "OpenMax",
    "nero": "NERO",
    "odin": "ODIN",
    "gradnorm": "GradNorm",
    "rankfeat": "RankFeat",
    "nac": "NAC",
    "opp": "OPP",
    "onp": "ONP",
    "opnp": "OPNP",
}


def detector_name(name: str) -> str:
    """A detector as papers write it; one that has no such name here keeps its own."""
    return "+".join(NAMES.get(part, part) for part in name.split("+"))


def ours(name: str) -> bool:
    """Whether a detector prunes by sensitivity: OPP, ONP, OPNP, or one combined with it."""
    return name.partition("+")[0] in ("opp", "onp", "opnp")


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


def long_table(
    detectors: Mapping[str, Metrics],
    intervals: Mapping[str, Intervals],
    evaluation: Mapping[str, Any],
) -> pa.Table:
    """One row for each detector and column, detectors by mean rank.

    Args:
        detectors: of `metrics.json`.
        intervals: ``detectors`` of `intervals.json`.
        evaluation: `evaluation.json`.

    Returns:
        detector, column, kind, every metric with its interval as ``_low`` and ``_high``, rank (of
        ``mean`` the mean rank; of ``near`` and ``far`` none), hyperparameters as JSON, and trials.
    """
    kinds = kinds_of(evaluation)
    rows = []
    for name in ranked(detectors, evaluation["ranks"]):
        for column in columns(kinds):
            row: dict[str, Any] = {
                "detector": name,
                "column": column,
                "kind": kinds.get(column, column),
            }
            for metric, value in detectors[name][column].items():
                ends = intervals[name][column][metric]
                row |= {metric: value, f"{metric}_low": ends["low"], f"{metric}_high": ends["high"]}
            row["rank"] = evaluation["ranks"][name].get(column)
            row["hyperparameters"] = json.dumps(evaluation["hyperparameters"][name])
            row["trials"] = evaluation["trials"][name]
            rows.append(row)
    return pa.Table.from_pylist(rows)


def to_markdown(
    detectors: Mapping[str, Metrics],
    intervals: Mapping[str, Intervals],
    evaluation: Mapping[str, Any],
) -> str:
    """The comparison as GitHub shows it, and below it the detectors that could not run.

    Args:
        detectors: of `metrics.json`.
        intervals: ``detectors`` of `intervals.json`.
        evaluation: `evaluation.json`.
    """
    kinds, places = kinds_of(evaluation), evaluation["ranks"]
    shown = columns(kinds)
    heads = [
        f"{column} ({kinds[column]})" if column in kinds else f"**{column}**" for column in shown
    ]
    rows: list[list[str]] = []
    for name in ranked(detectors, places):
        by, ends = detectors[name], intervals[name]["mean"]["fpr95"]
        cells = [f"{by[column]['fpr95']:.1f}" for column in shown]
        cells += [f"{by['mean']['auroc']:.1f}", f"{places[name]['mean']:.1f}"]
        interval = f" ({ends['low']:.1f}–{ends['high']:.1f})"
        rows.append([detector_name(name), *cells, interval])
    best = [min(map(float, of)) for of in zip(*(row[1:-1] for row in rows), strict=True)]
    best[-2] = max(float(row[-3]) for row in rows)  # AUROC, the only one where higher is better
    lines = [["detector", *heads, "mean AUROC", "mean rank"], ["---"] + ["--:"] * (len(heads) + 2)]
    for name, *cells, interval in rows:
        bold = [
            f"**{cell}**" if float(cell) == least else cell
            for cell, least in zip(cells, best, strict=True)
        ]
        bold[-3] += interval
        lines.append([name, *bold])
    text = "FPR95 in % (lower is better), of the mean with its 95 % interval; by mean rank.\n\n"
    text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if missing := evaluation["unavailable"]:
        text += "\nNot compared:\n\n"
        text += "".join(
            f"- {detector_name(name)}: {one_line(reason)}\n" for name, reason in missing.items()
        )
    return text


def kinds_of(evaluation: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["kind"] for name, entry in evaluation["sets"].items()}


def one_line(text: str) -> str:
    return " ".join(text.split())


def write(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet, atomically."""
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
