"""What all measurements of speed have in common: interleaved repetitions, and how they are told."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["goal", "interleaved", "ratio", "show"]


def interleaved(
    works: Mapping[str, Callable[[], Any]],
    repeats: int,
    before: Callable[[], Any] = lambda: None,
    settled: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each work, one after the other, again and again: a busy machine slows all alike.

    Args:
        works: by name.
        repeats: how often each runs.
        before: runs before each, and is not counted.
        settled: waits until what a work has begun is done, as on a GPU.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            before()
            settled()
            start = time.perf_counter()
            work()
            settled()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], slower: str, faster: str) -> float:
    """The median, over the repetitions, of how many times as long one work took as the other."""
    pairs = zip(seconds[slower], seconds[faster], strict=True)
    return median(slow / fast for slow, fast in pairs)


def goal(sentence: str, measured: float, met: bool) -> dict[str, Any]:
    return {"goal": sentence, "measured": measured, "met": met}


def show(result: dict[str, Any], as_json: bool, title: str) -> None:
    """Print what was measured: one JSON object, or tables and a line for each goal.

    Args:
        result: lists of rows (dictionaries with the same keys), single values, and ``goals``.
        as_json: print it as one JSON object.
        title: of the tables.
    """
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console = Console()
    for name, value in result.items():
        if name == "goals":
            continue
        if not isinstance(value, list) or not value or not isinstance(value[0], dict):
            print(f"{name.replace('_', ' ')}: {told(value)}")
            continue
        table = Table(title=f"{title}: {name.replace('_', ' ')}", title_justify="left")
        for place, column in enumerate(value[0]):
            table.add_column(column.replace("_", " "), justify="right" if place else "left")
        for row in value:
            table.add_row(*map(told, row.values()))
        console.print(table)
    for each in result["goals"]:
        print(f"goal: {each['goal']}; measured: {told(each['measured'])}; met: {each['met']}")


def told(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
