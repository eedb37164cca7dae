"""Run every stage that is not up to date, in one process and against one Prefect server, and record
the results with DVC and MLflow."""

import argparse
from functools import partial
from importlib import import_module
from pathlib import Path

from flows import engine, exchange, server, versions
from flows.program import program
from flows.stage import hide_what_is_told, timed, timings
from opnp import artifacts, parameters, stages, tracking
from opnp.errors import InputError
from opnp.files import digest, read_json
from opnp.parameters import Parameters

__all__ = ["STAGES", "pipeline"]

STAGES = ("fetch", "train", "features", "sensitivity", "search", "evaluate", "report")


def outdated(stage: str, chosen: Parameters) -> bool:
    """Whether a stage has to run, as DVC sees it."""
    if stage == "fetch":
        return versions.data_changed(stages.fetch.data_parameters(chosen))
    return versions.changed(stage) or (stage == "train" and checkpoint_changed(chosen))


def checkpoint_changed(chosen: Parameters) -> bool:
    """Whether another file lies where the checkpoint was; DVC does not know of that file."""
    path = Path(chosen.train.checkpoint) if chosen.train.checkpoint else None
    recorded = read_json(artifacts.TRAINING, "python -m flows.train")["checkpoint"]
    return path is not None and path.is_file() and digest(path) != recorded


def run_stages(chosen: Parameters) -> dict[str, float]:
    """Run the stages that are not up to date as subflows, recording each with DVC when it is done.

    Returns:
        The wall time in seconds of each stage that ran.
    """
    seconds = {}
    for stage in STAGES:
        if not outdated(stage, chosen):
            print(f"{stage}: up to date")
            continue
        flow = getattr(import_module(f"flows.{stage}"), stage)
        seconds[stage] = timed(stage, partial(engine.run, flow, chosen))
        if parameters.load() != chosen:
            raise InputError(
                f"{artifacts.PARAMETERS} was changed during the run, and {stage} is not recorded: "
                "run again with the new parameters."
            )
        tracking.begin()
        if stage != "fetch":  # which records its data itself
            versions.record(stage)
        print(f"{stage}: done in {seconds[stage]:.1f} s", flush=True)
    return seconds


def pipeline() -> None:
    """All stages, in order; nothing is done that is done already."""
    chosen = parameters.load()
    if any(outdated(stage, chosen) for stage in STAGES):
        server.start()  # it starts while the libraries are imported
        from prefect import Flow

        hide_what_is_told()
        # What the engine lacks is told here, not after hours of training.
        exchange.check(chosen)
        with server.running():
            engine.task_runner(chosen.engine)
            seconds = Flow(run_stages, name="pipeline")(chosen)
        tracking.record_run(chosen, seconds)
    else:
        print("Nothing has changed since the last run: there is nothing to do.")
        if tracking.begun():  # it ended before it was recorded
            tracking.stash(chosen, timings())
        tracking.log_or_wait()
    summarize()


def summarize() -> None:
    """Print the comparison and where to find everything."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from opnp import tables

    detectors = read_json(artifacts.METRICS, "python -m flows.evaluate")["detectors"]
    evaluation = read_json(artifacts.EVALUATION, "python -m flows.evaluate")
    kinds = {name: entry["kind"] for name, entry in evaluation["sets"].items()}
    console, uri, ranks = Console(), tracking.tracking_uri(), evaluation["ranks"]

    def comparison(columns: list[str]) -> Table:
        table = Table(title="FPR95 in %, lower is better", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("detector", no_wrap=True)
        for column in (*columns, "mean rank", "mean AUROC"):
            table.add_column(column, justify="right", overflow="fold", min_width=5)
        for name in tables.ranked(detectors, ranks):
            by = detectors[name]
            cells = []
            for column in columns:
                value = by[column]["fpr95"]
                best = value == min(other[column]["fpr95"] for other in detectors.values())
                cells.append(Text(f"{value:.1f}", "bold" if best else ""))
            table.add_row(name, *cells, f"{ranks[name]['mean']:.1f}", f"{by['mean']['auroc']:.1f}")
        return table

    whole = tables.columns(kinds)
    shown = comparison(whole)
    # Sets that do not fit are in the report; the means always are here.
    border, fixed = 3, max(map(len, detectors)) + 4
    if fixed + (5 + border) * (len(whole) + 2) > console.width:
        shown = comparison([column for column in whole if column not in kinds])
    console.print(shown)
    for name, reason in evaluation["unavailable"].items():
        told = Text(f"not compared: {name}: {' '.join(reason.split())}")
        console.print(told, soft_wrap=True)
    look = f"mlflow ui --backend-store-uri {uri}"
    for what, where in (
        ("report", artifacts.REPORT),
        ("mask", artifacts.MASK),
        ("MLflow", uri if uri.startswith("http") else f"{uri}  (to look: {look})"),
    ):
        console.print(f"{what:7} {where}", soft_wrap=True, highlight=False)


def main() -> None:
    argparse.ArgumentParser("python -m flows.pipeline", description=__doc__).parse_args()
    with program():
        pipeline()


if __name__ == "__main__":
    main()
