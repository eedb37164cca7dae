"""`opnp run`, `stage`, `retrain` and `monitor`: the one place where `opnp` calls `flows`.

``python -m flows.NAME`` runs these commands too. Prefect and DVC, which `flows` needs, are an
extra, and are imported only when a command runs.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from opnp.cli.program import EXIT_CODES, Command, new_app
from opnp.cli.words import here
from opnp.errors import InputError

__all__ = ["STAGES", "add_to"]

PANEL = "Pipeline"
STAGES = {
    "fetch": "Fetch the images into data/ and record them with DVC.",
    "train": "Train the backbone, or load its checkpoint.",
    "features": "Compute the features of every set of images, shard by shard.",
    "sensitivity": "Measure how sensitive the energy is to each weight and neuron.",
    "search": "Search for the best mask on validation features and proxy outliers.",
    "evaluate": "Compare the detectors on the test sets.",
    "report": "Write the report.",
}
BEYOND = 4  # exit code of the monitor
INTERRUPTED = "130 or 143, interrupted by a signal: run again to continue"
CODES = f"{EXIT_CODES[:-1]}; {INTERRUPTED}."
MONITOR_CODES = (
    f"{EXIT_CODES[:-1]}; {BEYOND}, more images are flagged than retrain.max_flagged allows; "
    f"{INTERRUPTED}."
)

Serve = Annotated[
    bool,
    typer.Option(
        "--serve",
        help="Stay and run on a schedule, which the Prefect server that PREFECT_API_URL names "
        "keeps. Give --cron or --interval with it.",
    ),
]
Cron = Annotated[
    str | None, typer.Option(metavar='"0 2 * * *"', help="When to run, as a cron line in UTC.")
]
Interval = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Time from one run to the next.")
]


def add_to(app: typer.Typer) -> None:
    """Add the pipeline's commands to the program."""
    for command, codes in ((run, CODES), (retrain, CODES), (monitor, MONITOR_CODES)):
        app.command(cls=Command, rich_help_panel=PANEL, epilog=codes)(command)
        if command is run:
            app.add_typer(stages(), name="stage", rich_help_panel=PANEL)


def run() -> None:
    """Run every stage of the pipeline that is not up to date.

    Reads params.yaml in the current folder and records what it makes with DVC and MLflow. The
    comparison of the detectors is printed at the end.
    """
    with pipeline_of("run"):
        from flows import pipeline, process
    with process.program():
        pipeline.pipeline(here())


def stages() -> typer.Typer:
    app = new_app(help="Run one stage of the pipeline, whether or not it is up to date.")

    def stage(name: str) -> Callable[[], None]:
        return lambda: run_stage(name)

    for name, summary in STAGES.items():
        command = fetch if name == "fetch" else stage(name)
        app.command(name, cls=Command, help=summary, epilog=CODES)(command)
    return app


def fetch(
    accept: Annotated[
        bool,
        typer.Option(
            "--accept", help="Record the data even if data.dvc records others for these parameters."
        ),
    ] = False,
) -> None:
    run_stage("fetch", accept=accept)


def run_stage(name: str, **chosen: bool) -> None:
    with pipeline_of("stage"):
        from flows import process
    process.run_stage(name, **chosen)


def retrain(serve: Serve = False, cron: Cron = None, interval: Interval = None) -> None:
    """Fetch, train, compare with the champion, and promote the new detector if it is better."""
    check_schedule(serve, cron, interval)
    with pipeline_of("retrain"):
        from flows import process, schedule
        from flows import retrain as flow
    if serve:
        check_server()
        schedule.serve(flow.retrain, cron, interval)
    else:
        with process.program():
            flow.retrained(here())


def monitor(
    folder: Annotated[Path, typer.Argument(help="Folder of recent production images.")],
    serve: Serve = False,
    cron: Cron = None,
    interval: Interval = None,
) -> None:
    """Score new production images, and ask for a retraining if too many are flagged as OOD."""
    check_schedule(serve, cron, interval)
    with pipeline_of("monitor"):
        from flows import monitor as flow
        from flows import process, schedule
        from opnp.pipeline import parameters
    if serve:
        check_server()
        schedule.serve(flow.monitor, cron, interval, folder=str(folder))
        return
    with process.program(flow.LOCK):
        workspace = here()
        beyond = flow.watch(workspace, folder, parameters.load(workspace.parameters))
    if beyond:
        raise typer.Exit(BEYOND)


def check_schedule(serve: bool, cron: str | None, interval: float | None) -> None:
    """Refuse options that do not go together."""
    if not serve and (cron is not None or interval is not None):
        raise typer.BadParameter("--cron and --interval need --serve.")
    if serve and (cron is None) == (interval is None):
        raise typer.BadParameter("--serve needs either --cron or --interval.")
    if interval is not None and not 0 < interval < float("inf"):
        raise typer.BadParameter("--interval takes a number of seconds above 0.")


def check_server() -> None:
    from flows import prefect_server

    if not prefect_server.named():
        raise typer.BadParameter("--serve needs a Prefect server: name it in PREFECT_API_URL.")


@contextmanager
def pipeline_of(command: str) -> Iterator[None]:
    """Import the modules of `flows` that a command needs in the block.

    Raises:
        InputError: Prefect, DVC or `flows` is not installed.
    """
    if not all(find_spec(name) for name in ("flows", "prefect", "dvc")):
        raise InputError(f"`opnp {command}` needs the pipeline: pip install 'opnp[pipeline]'.")
    import flows

    sys.path.append("")  # as for `python -m`: train.backbone may name a module of this folder
    before = flows.take_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
