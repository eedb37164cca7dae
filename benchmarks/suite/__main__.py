"""The detection suite: real images, real backbones, everything chosen without OOD images.

Run ``python -m benchmarks.suite --data FOLDER [--only NAME,…] [--cache FOLDER] [--json]``. Features
are kept in the cache, so that a change of the search, a detector or a fusion is judged in minutes.
``--only digits,cifar10-resnet20,imagenet`` takes the sets that need next to no training.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.suite.judging import FUSIONS, SINGLES, Verdict, judge
from benchmarks.suite.sets import SETS, features_of
from benchmarks.timing import goal, show
from opnp.detectors.names import detector_name
from opnp.pruning.settings import SearchSettings
from opnp.runtime import malloc

__all__ = ["main"]

OURS = {
    "clip": "clip alone",
    "opp": "OPP",
    "onp": "ONP",
    "opnp": "OPNP",
    "opnp+react": "OPNP with clip",
    "oracle without clip": "oracle without clip",
    "oracle": "oracle",
}
AUTOMATIC = "chosen automatically"


def group_of(name: str) -> str:
    """``digits`` for ``digits-0``: seeds of a set are averaged."""
    stem, _, last = name.rpartition("-")
    return stem if last.isdigit() else name


def averaged(verdicts: Mapping[str, Verdict]) -> dict[str, dict[str, float]]:
    """The mean FPR95 of each row, by group of sets; rows that some seed lacks are left out."""
    groups: dict[str, list[Verdict]] = {}
    for name, verdict in verdicts.items():
        groups.setdefault(group_of(name), []).append(verdict)
    found: dict[str, dict[str, float]] = {}
    for group, seeds in groups.items():
        rows = [row for row in seeds[0].fpr95 if all(row in each.fpr95 for each in seeds)]
        found[group] = {row: mean(each.fpr95[row] for each in seeds) for row in rows}
        found[group][AUTOMATIC] = mean(each.fpr95[each.automatic] for each in seeds)
    return found


def summary(verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """The tables and the goals."""
    figures = averaged(verdicts)
    groups = list(figures)
    everywhere = [row for row in figures[groups[0]] if all(row in of for of in figures.values())]

    def ratio(row: str) -> list[float]:
        return [figures[group][row] / figures[group]["energy"] for group in groups]

    def table(rows: Iterable[str]) -> list[dict[str, Any]]:
        known = sorted((row for row in rows if row in everywhere), key=lambda row: mean(ratio(row)))
        return [
            {"detector": printed(row)}
            | {group: round(figures[group][row], 1) for group in groups}
            | {"× Energy": round(mean(ratio(row)), 2)}
            for row in known
        ]

    return {
        "ours": table(["energy", *OURS, AUTOMATIC]),
        "detectors": table(SINGLES),
        "fusions": table(FUSIONS),
        "chosen": [
            {
                "set": name,
                "automatic": printed(verdict.automatic),
                "FPR95": round(verdict.fpr95[verdict.automatic], 1),
                "on proxies": round(verdict.proxies[verdict.automatic], 1),
                "OPNP with clip": text(verdict.chosen["opnp+react"]),
            }
            for name, verdict in verdicts.items()
        ],
        "goals": goals(figures, ratio, everywhere),
    }


def goals(figures: Mapping[str, Mapping[str, float]], ratio: Any, rows: list[str]) -> list[Any]:
    """What was aimed at, what was measured, and whether it is met."""
    pruned, automatic = ratio("opnp+react"), ratio(AUTOMATIC)
    kept = mean(
        (of["energy"] - of["opnp+react"]) / (of["energy"] - of["oracle"]) for of in figures.values()
    )
    lowest = {
        group: min(of[row] for row in SINGLES if row in rows) for group, of in figures.items()
    }
    excess = [of[AUTOMATIC] - lowest[group] for group, of in figures.items()]
    near = all(
        of[AUTOMATIC] <= max(1.1 * lowest[group], lowest[group] + 1)
        for group, of in figures.items()
    )
    partners = [row.split("&")[1] for row in FUSIONS if row.startswith("energy&") and row in rows]
    gains = {
        partner: 1 - mean(ratio(f"opnp+react&{partner}")) / mean(ratio(f"energy&{partner}"))
        for partner in partners
    }
    best = max(gains, key=lambda partner: gains[partner])
    return [
        goal("OPNP with clip at most 0.62 × Energy on average", mean(pruned), mean(pruned) <= 0.62),
        goal("OPNP with clip at most 0.75 × Energy on each set", max(pruned), max(pruned) <= 0.75),
        goal("share of the oracle's gain kept, at least 0.90", kept, kept >= 0.9),
        goal(
            "chosen automatically at most 0.42 × Energy on average",
            mean(automatic),
            mean(automatic) <= 0.42,
        ),
        goal(
            "chosen automatically within 1.1 × or 1 point of the best single detector on each set; "
            "largest excess in points",
            max(excess),
            near,
        ),
        goal(
            f"a fusion with OPNP at least 0.15 below the same with Energy on average (with {best})",
            gains[best],
            gains[best] >= 0.15,
        ),
    ]


def printed(row: str) -> str:
    if row in OURS or row == AUTOMATIC:
        return OURS.get(row, row)
    return detector_name(row).replace("OPNP+ReAct", "OPNP with clip")


def text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def wanted(only: str | None) -> list[str]:
    """The names of the sets that ``--only`` asks for, by their names or the beginnings of them."""
    if only is None:
        return list(SETS)
    asked = only.split(",")
    found = [name for name in SETS if any(name == a or name.startswith(f"{a}-") for a in asked)]
    for each in asked:
        if not any(name == each or name.startswith(f"{each}-") for name in SETS):
            raise SystemExit(f"There is no set named {each!r}; the sets are {', '.join(SETS)}.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of images and weights")
    parser.add_argument(
        "--cache", type=Path, help="where features are kept; default: DATA/features"
    )
    parser.add_argument("--only", help="sets, separated by commas; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    malloc.keep()
    # Products here are small: threads would wait for each other.
    torch.set_num_threads(1)
    cache = arguments.cache or arguments.data / "features"
    verdicts = {}
    for name in wanted(arguments.only):
        print(f"{name}: features", file=sys.stderr)
        features = features_of(name, arguments.data, cache)
        print(f"{name}: judged", file=sys.stderr)
        verdicts[name] = judge(features, SearchSettings())
    result = summary(verdicts)
    if arguments.json:
        result["sets"] = {name: asdict(verdict) for name, verdict in verdicts.items()}
    show(result, arguments.json, "mean FPR95 in %")


if __name__ == "__main__":
    main()
