"""The comparison of detectors as tables: for the report, in long form, and for GitHub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.colors import Normalize, to_hex

from opnp.detectors.names import detector_name, label
from opnp.metrics import ranking
from opnp.metrics.ranking import Intervals, Metrics, columns, ranked
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.report.findings import Evaluation, Pruning
from opnp.pipeline.report.words import number

__all__ = ["long_table", "to_markdown"]


NOTHING_PRUNED = (
    "“Nothing pruned”: no mask did better on the validation outliers, so the detector scores the "
    "unpruned model."
)
SAME = "No mask did better on the validation outliers, so that these are another detector:"


@dataclass(frozen=True)
class Comparison:
    """The detectors in order of mean rank by one metric, and their ranks on each set."""

    order: list[str]
    ranks: dict[str, dict[str, float]]


def comparison(evaluation: Evaluation, metric: str) -> Comparison:
    """Rank the detectors for a metric's table."""
    ranks = (
        evaluation.ranks
        if metric == "fpr95"
        else ranking.ranks(evaluation.table, list(evaluation.sets), metric, evaluation.same)
    )
    return Comparison(ranking.ranked(evaluation.table, ranks, metric, evaluation.same), ranks)


def best(evaluation: Evaluation, metric: str) -> dict[str, str]:
    """The best value of each column, as shown; values with the same digits count as equal."""
    choose = min if ranking.lower_is_better(metric) else max
    rows = evaluation.table.values()
    return {
        column: number(choose(row[column][metric] for row in rows)) for column in evaluation.columns
    }


@dataclass(frozen=True)
class Cell:
    text: str
    background: str
    colour: str
    chosen: bool


@dataclass(frozen=True)
class HeatMap:
    """Mean FPR95 on the proxies, by percentage of the lowest (rows) and the highest (columns)."""

    what: str
    kind: str
    columns: list[float]
    rows: dict[float, list[Cell | None]]


def heat_maps(parameters: Parameters, pruning: Pruning) -> list[HeatMap]:
    """Maps of the search grid, one for each definition of N and what is pruned.

    A cell is the lowest value over all settings that the map does not show. As in the search, only
    trials that keep the accuracy count; a cell without one is None.
    """
    trials, chosen = pruning.trials, pruning.chosen
    floor = parameters.search.lowest_accuracy(trials["accuracy"][0])
    # Trials that clip features belong to OPNP with ReAct.
    accurate = ~(trials["accuracy"] < floor - 1e-9) & ~trials["clips"]
    # Without neuron pruning, the definitions agree: the search tries such masks once, as `mean`.
    neuronless = (trials["neurons_low"] == 0) & (trials["neurons_high"] == 0)
    scale = Normalize(trials["fpr95"][accurate].min(), np.percentile(trials["fpr95"][accurate], 75))
    maps = []
    for kind in parameters.search.neuron_sensitivity:
        for what in ("weights", "neurons"):
            low, high = trials[f"{what}_low"], trials[f"{what}_high"]
            rows, columns = np.unique(low), np.unique(high)
            use = accurate & (neuronless | (trials["neuron_sensitivity"] == kind))
            least = np.full((len(rows), len(columns)), np.inf)
            place = np.searchsorted(rows, low[use]), np.searchsorted(columns, high[use])
            np.minimum.at(least, place, trials["fpr95"][use])
            here = kind == chosen["neuron_sensitivity"]
            here |= not (chosen["neurons_low"] or chosen["neurons_high"])
            best_at = (chosen[f"{what}_low"], chosen[f"{what}_high"])
            cells: dict[float, list[Cell | None]] = {
                row: [
                    cell(value, scale, here and (row, column) == best_at)
                    for column, value in zip(columns.tolist(), line, strict=True)
                ]
                for row, line in zip(rows.tolist(), least.tolist(), strict=True)
            }
            maps.append(HeatMap(what, kind, columns.tolist(), cells))
    return maps


def cell(value: float, scale: Normalize, chosen: bool) -> Cell | None:
    if value == np.inf:
        return None
    red, green, blue, _ = rgba = matplotlib.colormaps["cividis_r"](float(scale(value)))
    dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
    return Cell(number(value), to_hex(rgba), "#ffffff" if dark else "#000000", chosen)


def long_table(
    detectors: Mapping[str, Metrics],
    intervals: Mapping[str, Intervals],
    evaluation: Mapping[str, Any],
) -> pa.Table:
    """The comparison with one row for each detector and column, detectors by mean rank.

    Args:
        detectors: of `metrics.json`.
        intervals: ``detectors`` of `intervals.json`.
        evaluation: `evaluation.json`.

    Returns:
        detector, column, kind, every metric with its interval as ``_low`` and ``_high``, rank (of
        ``mean`` the mean rank; of ``near`` and ``far`` none), hyperparameters as JSON, trials,
        pruned, the percent of the head's weights that are pruned (none for other detectors), and
        same, the detector that it is where that is none of them.
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
            row["pruned"] = evaluation["pruned"].get(name)
            row["same"] = evaluation["same"].get(name)
            rows.append(row)
    return pa.Table.from_pylist(rows)


def to_markdown(
    detectors: Mapping[str, Metrics],
    intervals: Mapping[str, Intervals],
    evaluation: Mapping[str, Any],
) -> str:
    """The comparison as a table for GitHub, followed by the detectors that are not in it.

    These are the ones that could have pruned but are another detector, since they did not, and the
    ones that could not run.

    Args:
        detectors: of `metrics.json`.
        intervals: ``detectors`` of `intervals.json`.
        evaluation: `evaluation.json`.
    """
    kinds, places, pruned = kinds_of(evaluation), evaluation["ranks"], evaluation["pruned"]
    same, shown = evaluation["same"], columns(kinds)
    heads = [
        f"{column} ({kinds[column]})" if column in kinds else f"**{column}**" for column in shown
    ]
    rows: list[list[str]] = []
    order = ranked(detectors, places, same=same)
    for name in order:
        by = detectors[name]
        cells = [f"{by[column]['fpr95']:.1f}" for column in shown]
        rows.append([*cells, f"{by['mean']['auroc']:.1f}", f"{places[name]['mean']:.1f}"])
    best = [min(map(float, of)) for of in zip(*rows, strict=True)]
    best[-2] = max(float(row[-2]) for row in rows)  # AUROC, the only column where higher is better
    lines = [
        ["detector", *heads, "mean AUROC", "mean rank", "trials"],
        ["---"] + ["--:"] * (len(heads) + 3),
    ]
    for name, cells in zip(order, rows, strict=True):
        bold = [
            f"**{cell}**" if float(cell) == least else cell
            for cell, least in zip(cells, best, strict=True)
        ]
        ends = intervals[name]["mean"]["fpr95"]
        bold[-3] += f" ({ends['low']:.1f}–{ends['high']:.1f})"
        lines.append([label(name, pruned.get(name)), *bold, str(evaluation["trials"][name])])
    text = "FPR95 in % (lower is better), the mean with its 95 % interval. Sorted by mean rank.\n\n"
    text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if any(pruned.get(name) == 0 for name in order):
        text += f"\n{NOTHING_PRUNED}\n"
    if same:
        told = ", ".join(label(name, 0.0, other) for name, other in same.items())
        text += f"\n{SAME} {told}.\n"
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
