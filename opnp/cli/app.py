"""The program `opnp`: detectors for one's own model and images, and the runs in MLflow compared.

Exit codes: 0, done; 1, the input is at fault, told in one sentence; 2, wrong options; 3, done, but
some images could not be read.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from opnp.cli.compare import as_markdown, as_values, show_table, tabulate
from opnp.cli.fit import fit
from opnp.cli.options import AsJson, Device
from opnp.cli.remedies import called_as, tell
from opnp.cli.words import (
    describe,
    find_own_code,
    loaded,
    show_evaluation,
    told,
    unreadable,
)
from opnp.errors import InputError
from opnp.runtime import malloc
from opnp.runtime.files import write_json

__all__ = ["app", "main"]


class Command(TyperCommand):
    """A command that tells what is wrong with its input in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        with called_as(ctx.command_path):
            try:
                return super().invoke(ctx)
            except InputError as error:
                sys.exit(f"error: {tell(error)}")


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def program() -> None:
    """OOD detection by optimal parameter and neuron pruning; `make run` runs the pipeline.

    Exit codes: 0, done; 1, the input is at fault; 2, wrong options; 3, done, but some images could
    not be read.
    """


@app.command(cls=Command)
def compare(
    metric: Annotated[
        str, typer.Option(help="fpr95, fpr95_ood_positive, auroc, aupr_in, aupr_out or rank.")
    ] = "fpr95",
    on: Annotated[str, typer.Option(help="mean, near, far or an OOD set.")] = "mean",
    experiment: Annotated[
        str | None, typer.Option(help="The experiment in MLflow; else that of the pipeline.")
    ] = None,
    detectors: Annotated[
        str | None, typer.Option(help="Some detectors, as msp,energy,opnp; else all.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The ID data; else all.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a GitHub table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the detectors over backbones and data, from the runs in MLflow.

    Of each backbone, data and seed the latest run counts; seeds are averaged.
    """
    if markdown and as_json:
        raise InputError("--markdown and --json exclude each other: choose one.")
    from opnp.tracking import history, mlflow_client

    runs = history.detector_runs(experiment or mlflow_client.experiment_name())
    table = tabulate(runs, metric, on, detectors.split(",") if detectors else None, data)
    if as_json:
        print(json.dumps(as_values(table), indent=2))
    elif markdown:
        print(as_markdown(table))
    else:
        show_table(table)


Detector = Annotated[Path, typer.Option(help="A detector's folder, made by `opnp fit`.")]
Trust = Annotated[
    str | None, typer.Option(help="The module:factory that may run, if the model is one.")
]
BatchSize = Annotated[int, typer.Option(help="Images that go through the model at once.", min=1)]


app.command(cls=Command)(fit)


@app.command(cls=Command)
def score(
    paths: Annotated[list[str], typer.Argument(help="Images: files, or sources of them.")],
    detector: Detector,
    out: Annotated[Path, typer.Option(help="The table to write, .parquet.")],
    trust: Trust = None,
    device: Device = None,
    batch_size: BatchSize = 64,
    as_json: AsJson = False,
) -> None:
    """Score images: a table of file (or file#row), score, is_ood and predicted class.

    Images are single files, or what `opnp fit` takes; of a divided source the split test. Larger
    scores mean OOD. Images that cannot be read are named and left out: exit code 3.

    Example: opnp score --detector detector today/ extra.png --out scores.parquet
    """
    if out.suffix != ".parquet":
        raise InputError(f"{out} is no .parquet file: name one with --out.")
    from opnp.data import images
    from opnp.deployment import score as scoring

    found = images.find(*paths)
    summary = scoring.score(loaded(detector, trust, device), found, out, batch_size)
    record = asdict(summary) | {"flagged": summary.flagged, "out": str(out)}
    told(record, as_json, lambda of: f"{of['images']} images, {of['flagged']:.1f} % OOD: {out}")
    unreadable(summary.unreadable)


@app.command(cls=Command)
def evaluate(
    detector: Detector,
    id_images: Annotated[str, typer.Option("--id", help="ID images that fit has not seen.")],
    ood: Annotated[list[str], typer.Option(help="NAME=PATH of an OOD set; may be repeated.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    trust: Trust = None,
    device: Device = None,
    batch_size: BatchSize = 64,
) -> None:
    """Measure how well a detector tells OOD images from ID ones, beside the unpruned energy.

    FPR95 is the share of OOD images that a threshold which keeps 95 % of the ID images lets pass.
    Images are what `opnp fit` takes; of a divided source the split test.

    Example: opnp evaluate --detector detector --id test --ood sketches=sketches --ood noise=noise
    --json evaluation.json
    """
    from opnp.data import images
    from opnp.deployment import score as scoring

    places = {name: path for name, _, path in (entry.partition("=") for entry in ood)}
    if len(places) < len(ood) or not all(places) or not all(places.values()):
        raise InputError("Every --ood is NAME=PATH, and every NAME another.")
    sets = {name: images.find(path, asked=f"--ood {name}") for name, path in places.items()}
    inside = images.find(id_images, asked="--id")
    found = scoring.evaluate(loaded(detector, trust, device), inside, sets, batch_size)
    if json_file:
        write_json(json_file, found)
    show_evaluation(found)
    unreadable([each for of in (found["id"], *found["ood"].values()) for each in of["unreadable"]])


@app.command(cls=Command)
def show(
    detector: Annotated[Path, typer.Argument(help="A detector's folder.")],
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Say what a detector is and how it was made; the folder is verified first.

    Example: opnp show detector
    """
    told(loaded(detector, trust, "cpu").describe(), as_json, describe)


@app.command(cls=Command)
def export(
    detector: Detector,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    format: Annotated[str, typer.Option(help="torch (.pt2) or onnx.")] = "torch",
    trust: Trust = None,
) -> None:
    """Write a detector as one program from images to logits and scores, compared with it.

    It takes images in [0, 1], float32 (N, C, H, W), not normalized, any N.

    Example: opnp export --detector detector --format onnx --out detector.onnx
    """
    from opnp.deployment import export as exporting

    exporting.export(loaded(detector, trust, "cpu"), out, format)
    print(f"{out}: images (N, C, H, W) → logits, score")


@app.command(cls=Command)
def register(
    detector: Detector,
    alias: Annotated[str, typer.Option(help="What the version is named.")] = "challenger",
    trust: Trust = None,
) -> None:
    """Log a detector as an MLflow model and register it.

    Example: opnp register --detector detector
    """
    from opnp.tracking import registry

    if trust is not None:
        find_own_code()
    print(f"version {registry.register(detector, alias, trust=trust)} is {alias}")


@app.command(cls=Command)
def promote(
    version: Annotated[str | None, typer.Argument(help="Else the challenger.")] = None,
) -> None:
    """Make a registered version champion, and remember the one before.

    Example: opnp promote
    """
    from opnp.tracking import registry

    print(f"version {registry.promote(version)} is champion")


@app.command(cls=Command)
def rollback() -> None:
    """Bring back the champion before this one.

    Example: opnp rollback
    """
    from opnp.tracking import registry

    print(f"version {registry.rollback()} is champion")


@app.command(cls=Command)
def serve(
    alias: Annotated[str, typer.Option(help="Which registered version.")] = "champion",
    host: Annotated[str, typer.Option(help="0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where it listens.", min=1, max=65535)] = 5000,
    max_bytes: Annotated[int, typer.Option(help="Of a request.", min=1)] = 50_000_000,
) -> None:
    """Answer MLflow's protocol over HTTP, with a limit on the size of requests.

    Example: opnp serve --port 5000
    """
    from opnp.deployment import http
    from opnp.tracking import registry

    http.serve(registry.uri(alias), host, port, max_bytes)


def main() -> None:
    """Run the program; what is wrong with the input is told in one sentence."""
    malloc.keep()
    app(prog_name="opnp")
