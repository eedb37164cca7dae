"""`opnp compare`: the detectors of all runs in MLflow, side by side."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opnp.cli.words import here
from opnp.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from opnp.tracking.history import DetectorRun


UNPRUNED = "="  # marks a detector that might have pruned but did not


def compare(
    metric: Annotated[
        str,
        typer.Option(
            help="Metric to show: fpr95, fpr95_ood_positive, auroc, aupr_in, aupr_out or rank."
        ),
    ] = "fpr95",
    on: Annotated[
        str, typer.Option(help="OOD set to show, or the mean over all, near or far sets.")
    ] = "mean",
    experiment: Annotated[
        str | None,
        typer.Option(help="MLflow experiment.", show_default="the pipeline's experiment"),
    ] = None,
    detectors: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help="Detectors to show.", show_default="all"),
    ] = None,
    data: Annotated[str | None, typer.Option(help="ID data to show.", show_default="all")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a GitHub table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the detectors over backbones and data, from the runs in MLflow.

    The latest run counts for each backbone, data and seed. Seeds are averaged.

    \b
    Example:
      opnp compare --metric auroc --on near
    """
    if markdown and as_json:
        raise InputError("--markdown and --json exclude each other: choose one.")
    from opnp.tracking import history, mlflow_client

    runs = history.detector_runs(here(), experiment or mlflow_client.experiment_name())
    table = tabulate(runs, metric, on, detectors.split(",") if detectors else None, data)
    if as_json:
        print(json.dumps(as_values(table), indent=2))
    elif markdown:
        print(as_markdown(table))
    else:
        show_table(table)


@dataclass(frozen=True)
class Row:
    """The detectors on one backbone and ID data set.

    Attributes:
        backbone: spec of the backbone.
        data: source of the ID data.
        seeds: of the runs.
        values: of each detector, for each seed that has it.
        pruned: percent of the head's weights that each detector prunes, for each of these seeds;
            None if it is not one that prunes.
        same: the detectors that each detector is, for any of these seeds, where it prunes nothing.
        trials: of each detector, for each of these seeds.
    """

    backbone: str
    data: str
    seeds: list[int]
    values: dict[str, list[float]]
    pruned: dict[str, list[float | None]]
    same: dict[str, set[str | None]]
    trials: dict[str, set[int]]

    def same_as(self, detector: str) -> str | None:
        """The detector that this one is for every seed, since it prunes nothing; else None."""
        return next(iter(found)) if len(found := self.same.get(detector, set())) == 1 else None

    def unpruned(self, detector: str) -> bool:
        """Whether a detector might have pruned but did not, for any seed."""
        return set(self.pruned.get(detector, ())) == {0}

    def mean(self, detector: str) -> float | None:
        values = self.values.get(detector)
        return fmean(values) if values else None

    def text(self, detector: str) -> str:
        """The mean, or which other detector it is, and of how many seeds if some lack it."""
        mean, count = self.mean(detector), len(self.values.get(detector, ()))
        if mean is None:
            return "–"
        shown = f"{mean:.1f}{UNPRUNED * self.unpruned(detector)}"
        if (other := self.same_as(detector)) is not None:
            shown = f"{UNPRUNED} {other}"
        return shown + f" ({count} of {len(self.seeds)})" * (count < len(self.seeds))


@dataclass(frozen=True)
class Table:
    """One metric of detectors, the best first, over rows."""

    metric: str
    on: str
    detectors: list[str]
    rows: list[Row]

    def means(self) -> dict[str, float | None]:
        """Of each detector over all rows; none where a row lacks it, which would not be fair."""
        found: dict[str, float | None] = {}
        for name in self.detectors:
            known = [value for row in self.rows if (value := row.mean(name)) is not None]
            found[name] = fmean(known) if len(known) == len(self.rows) else None
        return found

    @property
    def note(self) -> str:
        """What the mark in the table means; empty if no cell is marked."""
        marked = any(row.unpruned(name) for row in self.rows for name in self.detectors)
        return f"{UNPRUNED} nothing pruned: the detector scores the unpruned model" * marked

    def same_as(self, detector: str) -> str | None:
        """The detector that this one is in every row, since it prunes nothing; else None."""
        others = {row.same_as(detector) for row in self.rows}
        return others.pop() if len(others) == 1 else None

    def trials(self) -> list[str]:
        """How many combinations each detector tried, as a range where runs differ."""
        found = [
            set[int]().union(*(row.trials.get(d, ()) for row in self.rows)) for d in self.detectors
        ]
        ends = [sorted({min(counts), max(counts)}) if counts else [] for counts in found]
        return ["–".join(map(str, each)) or "–" for each in ends]

    @property
    def title(self) -> str:
        from opnp.metrics.ranking import lower_is_better

        unit = "" if self.metric == "rank" else " in %"
        better = "lower" if lower_is_better(self.metric) else "higher"
        return f"{self.metric}{unit} on {self.on}, {better} is better"

    def lines(self) -> list[tuple[list[str], list[str], list[bool]]]:
        """Heads, cells and which cells are best, of each row, of the means and of the trials."""
        lines = []
        for row in self.rows:
            shown = [row.text(name) for name in self.detectors]
            heads = [row.backbone, short(row.data), str(len(row.seeds))]
            values = [None if row.same_as(n) else row.mean(n) for n in self.detectors]
            lines.append((heads, shown, self.best(values)))
        same, found = [self.same_as(name) for name in self.detectors], self.means().values()
        shown = ["–" if mean is None else f"{mean:.1f}" for mean in found]
        shown = [
            f"{UNPRUNED} {other}" if other else text
            for other, text in zip(same, shown, strict=True)
        ]
        means = [None if other else mean for other, mean in zip(same, found, strict=True)]
        lines.append((["mean", "", ""], shown, self.best(means)))
        return [*lines, (["trials", "", ""], self.trials(), [False] * len(means))]

    def best(self, values: Sequence[float | None]) -> list[bool]:
        """Which are the best as they are shown: equal digits are equally good."""
        from opnp.metrics.ranking import lower_is_better

        known = [round(value, 1) for value in values if value is not None]
        first = (min if lower_is_better(self.metric) else max)(known, default=None)
        return [value is not None and round(value, 1) == first for value in values]


def tabulate(
    runs: "list[DetectorRun]",
    metric: str,
    on: str,
    detectors: list[str] | None,
    data: str | None,
) -> Table:
    """Put runs, latest first, into a table.

    Raises:
        InputError: a metric, column, detector or data set is not in any of the runs.
    """
    from opnp.metrics.ranking import lower_is_better

    keys = {key.rpartition("/") for run in runs for key in run.metrics}
    known = {column for column, _, what in keys if what == "fpr95"}
    require("metric", metric, {what for column, _, what in keys if column in known})
    require("OOD set", on, {column for column, _, what in keys if what == metric})
    if data is not None:
        require("ID data", data, {name for run in runs for name in (run.data, short(run.data))})
        runs = [run for run in runs if data in (run.data, short(run.data))]
    for name in detectors or ():
        require("detector", name, {run.detector for run in runs})
    latest: dict[tuple[str, str, int], str] = {}
    for run in runs:
        latest.setdefault((run.backbone, run.data, run.seed), run.run)
    rows: dict[tuple[str, str], Row] = {}
    for backbone, of, seed in sorted(latest):
        row = rows.setdefault((backbone, of), Row(backbone, of, [], {}, {}, {}, {}))
        row.seeds.append(seed)
    key = f"{on}/{metric}"
    for run in runs:
        newest = latest[run.backbone, run.data, run.seed] == run.run
        if newest and key in run.metrics and run.detector in (detectors or [run.detector]):
            row = rows[run.backbone, run.data]
            row.values.setdefault(run.detector, []).append(run.metrics[key])
            row.pruned.setdefault(run.detector, []).append(run.metrics.get("pruned"))
            row.same.setdefault(run.detector, set()).add(run.same)
            if "trials" in run.metrics:
                row.trials.setdefault(run.detector, set()).add(int(run.metrics["trials"]))
    filled = [row for row in rows.values() if row.values]
    if not filled:
        raise InputError(f"No run has {metric} on {on} of these detectors: leave one choice out.")
    named = detectors or sorted({name for row in filled for name in row.values})
    if detectors is None:
        sign, means = 1 if lower_is_better(metric) else -1, Table(metric, on, named, filled).means()
        named.sort(key=lambda name: (means[name] is None, sign * (means[name] or 0)))
    return Table(metric, on, named, filled)


def require(what: str, name: str, known: set[str]) -> None:
    if name not in known:
        raise InputError(f"No run has the {what} {name!r}; {did_you_mean(name, known)}")


def short(data: str) -> str:
    """The name of ID data that may be a path or `torchvision:NAME`."""
    return Path(data).name.removeprefix("torchvision:")


def as_values(table: Table) -> dict[str, Any]:
    return {
        "metric": table.metric,
        "on": table.on,
        "rows": [
            {
                "backbone": row.backbone,
                "data": row.data,
                "seeds": row.seeds,
                "values": {name: row.mean(name) for name in table.detectors},
                "same": {n: other for n in table.detectors if (other := row.same_as(n))},
            }
            for row in table.rows
        ],
        "mean": table.means(),
        "trials": dict(zip(table.detectors, table.trials(), strict=True)),
    }


def as_markdown(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rows = [line(["backbone", "data", "seeds", *table.detectors])]
    rows.append(line(["---", "---"] + ["--:"] * (1 + len(table.detectors))))
    for heads, cells, best in table.lines():
        pairs = zip(cells, best, strict=True)
        rows.append(line([*heads, *(f"**{cell}**" if first else cell for cell, first in pairs)]))
    note = ["", f"{table.note}."] if table.note else []
    return "\n".join([f"{table.title}.", "", *rows, *note])


def show_table(table: Table) -> None:
    """Print the table, in as many parts as the terminal's width asks for."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    lines, heads = table.lines(), ("backbone", "data", "seeds")
    border = 3  # of each cell: a space on both sides, and the line
    widths = [
        border + max(len(name), *(len(cells[place]) for _, cells, _ in lines))
        for place, name in enumerate(table.detectors)
    ]
    fixed = 1 + sum(
        border + max(len(head), *(len(names[place]) for names, _, _ in lines))
        for place, head in enumerate(heads)
    )
    # A terminal too narrow for a single detector wraps the lines, which loses nothing.
    console = Console(width=max(Console().width, fixed + max(widths)))
    room = console.width - fixed
    print(table.title)
    start = 0
    while start < len(widths):
        stop = start + 1
        while stop < len(widths) and sum(widths[start : stop + 1]) <= room:
            stop += 1
        part = RichTable(box=SIMPLE_HEAD)
        for head in heads:
            part.add_column(head, no_wrap=True, justify="right" if head == "seeds" else "left")
        for name in table.detectors[start:stop]:
            part.add_column(Text(name), no_wrap=True, justify="right")
        for names, cells, best in lines:
            if names[0] in ("mean", "trials"):
                part.add_section()
            pairs = zip(cells[start:stop], best[start:stop], strict=True)
            part.add_row(*names, *(Text(cell, "bold" if first else "") for cell, first in pairs))
        console.print(part)
        start = stop
    if table.note:
        print(table.note)
