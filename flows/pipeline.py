"""Run every stage that is not up to date, in one process and against one Prefect server, and record
the results with DVC and MLflow."""

from functools import partial
from importlib import import_module

from flows import dvc_repo, prefect_server, transfer, workers
from flows.process import command, hide_what_is_told, timed, timings
from opnp.backbones.checkpoints import file_of
from opnp.errors import InputError
from opnp.pipeline import parameters, records
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.pipeline.results.data import data_parameters
from opnp.runtime.files import digest
from opnp.tracking import mlflow_client
from opnp.workspace import Workspace

__all__ = ["STAGES", "pipeline"]

STAGES = ("fetch", "train", "features", "sensitivity", "search", "evaluate", "report")


def outdated(workspace: Workspace, stage: str, chosen: Parameters) -> bool:
    """Whether a stage has to run, as DVC sees it."""
    if stage == "fetch":
        return dvc_repo.data_changed(workspace, data_parameters(chosen))
    if dvc_repo.changed(workspace, stage):
        return True
    return stage == "train" and checkpoint_changed(Run(workspace, chosen))


def checkpoint_changed(run: Run) -> bool:
    """Whether another file lies where the checkpoint was; DVC does not know of that file."""
    if (checkpoint := run.parameters.train.checkpoint) is None:
        return False
    path = file_of(run.workspace.root / checkpoint)
    recorded = run.training.record["checkpoint"]
    return path is not None and path.is_file() and digest(path) != recorded


def run_stages(workspace: Workspace, chosen: Parameters) -> dict[str, float]:
    """Run the stages that are not up to date as subflows, recording each with DVC when it is done.

    Returns:
        The wall time in seconds of each stage that ran.
    """
    seconds = {}
    for stage in STAGES:
        if not outdated(workspace, stage, chosen):
            print(f"{stage}: up to date")
            continue
        flow = getattr(import_module("flows.stages"), stage)
        seconds[stage] = timed(stage, partial(workers.run, flow, workspace, chosen))
        if parameters.load(workspace.parameters) != chosen:
            raise InputError(
                f"{workspace.parameters} was changed during the run, and {stage} is not recorded: "
                "run again with the new parameters."
            )
        records.begin(workspace)
        if stage != "fetch":  # which records its data itself
            dvc_repo.record(workspace, stage)
        print(f"{stage}: done in {seconds[stage]:.1f} s", flush=True)
    return seconds


def pipeline(workspace: Workspace) -> None:
    """All stages, in order; nothing is done that is done already."""
    parameters.complete(workspace.parameters)
    chosen = parameters.load(workspace.parameters)
    if any(outdated(workspace, stage, chosen) for stage in STAGES):
        prefect_server.start()  # it starts while the libraries are imported
        from prefect import Flow

        hide_what_is_told()
        # What the engine lacks is told here, not after hours of training.
        transfer.check(chosen)
        with prefect_server.running():
            workers.task_runner(workspace, chosen.engine)
            seconds = Flow(run_stages, name="pipeline")(workspace, chosen)
        records.record_run(Run(workspace, chosen), seconds)
    else:
        print("Nothing has changed since the last run: there is nothing to do.")
        if records.begun(workspace):  # it ended before it was recorded
            records.stash(Run(workspace, chosen), timings())
        records.log_or_wait(workspace)
    summarize(Run(workspace, chosen))


def summarize(run: Run) -> None:
    """Print the comparison and where to find everything."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from opnp.metrics import ranking

    detectors, evaluation, workspace = run.metrics["detectors"], run.evaluation, run.workspace
    kinds = {name: entry["kind"] for name, entry in evaluation["sets"].items()}
    console, uri, ranks = Console(), mlflow_client.tracking_uri(workspace), evaluation["ranks"]
    order = ranking.ranked(detectors, ranks, same=evaluation["same"])

    def comparison(columns: list[str]) -> Table:
        table = Table(title="FPR95 in %, lower is better", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("detector", no_wrap=True)
        for column in (*columns, "mean rank", "mean AUROC", "trials"):
            table.add_column(column, justify="right", overflow="fold", min_width=5)
        for name in order:
            by = detectors[name]
            cells = []
            for column in columns:
                value = by[column]["fpr95"]
                best = value == min(other[column]["fpr95"] for other in detectors.values())
                cells.append(Text(f"{value:.1f}", "bold" if best else ""))
            ends = (f"{ranks[name]['mean']:.1f}", f"{by['mean']['auroc']:.1f}")
            table.add_row(name, *cells, *ends, str(evaluation["trials"][name]))
        return table

    whole = ranking.columns(kinds)
    shown = comparison(whole)
    # Sets that do not fit are in the report; the means always are here.
    border, fixed = 3, max(map(len, detectors)) + 4
    if fixed + (5 + border) * (len(whole) + 3) > console.width:
        shown = comparison([column for column in whole if column not in kinds])
    console.print(shown)
    if evaluation["same"]:
        same = ", ".join(f"{name} = {other}" for name, other in evaluation["same"].items())
        console.print(f"nothing pruned: {same}", soft_wrap=True, highlight=False)
    for name, reason in evaluation["unavailable"].items():
        told = Text(f"not compared: {name}: {' '.join(reason.split())}")
        console.print(told, soft_wrap=True)
    look = f"mlflow ui --backend-store-uri {uri}"
    for what, where in (
        ("report", workspace.relative(workspace.report)),
        ("mask", workspace.relative(workspace.mask)),
        ("MLflow", uri if uri.startswith("http") else f"{uri}  (to look: {look})"),
    ):
        console.print(f"{what:7} {where}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    command("pipeline")
