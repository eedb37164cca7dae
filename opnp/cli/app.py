"""The program `opnp`: detectors for one's own model and images, and the runs in MLflow compared.

Exit codes: 0, done; 1, the input is at fault, told in one sentence; 2, wrong options; 3, done, but
some images could not be read.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from opnp.cli.compare import as_markdown, as_values, show_table, tabulate
from opnp.cli.remedies import called_as, tell
from opnp.cli.words import (
    describe,
    device_named,
    find_own_code,
    loaded,
    numbers,
    read_classes,
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
Device = Annotated[str | None, typer.Option(help="cpu or cuda; else the GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(help="Images that go through the model at once.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(cls=Command)
def fit(
    out: Annotated[Path, typer.Option(help="The detector's folder.")],
    model: Annotated[str | None, typer.Option(help="torchvision:NAME, module:factory, …")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The model's weights: .safetensors, .pt or .pth.")
    ] = None,
    id_train: Annotated[str | None, typer.Option(help="Training images, labelled or not.")] = None,
    id_val: Annotated[str | None, typer.Option(help="Other images of the same kind.")] = None,
    from_run: Annotated[
        bool, typer.Option("--from-run", help="Take it all from the pipeline's run in this folder.")
    ] = False,
    preprocessing: Annotated[
        Path | None, typer.Option(help="JSON: size, mode, mean, std; else the weights' own.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Names of the classes, one a line, in the logits' order.")
    ] = None,
    accept: Annotated[float, typer.Option(help="% of ID images the threshold accepts.")] = 95.0,
    clip: Annotated[str, typer.Option(help="Percentiles to clip features at.")] = "none,80,90",
    temperature: Annotated[str, typer.Option(help="Temperatures of the energy.")] = "1,2",
    weights_low: Annotated[
        str, typer.Option(help="% of the weights of lowest sensitivity to prune.")
    ] = "0,10,30,50",
    weights_high: Annotated[str, typer.Option(help="Of highest.")] = "0,0.2,0.5,1,2,3,5",
    neurons_low: Annotated[str, typer.Option(help="The same of neurons.")] = "0,10,30",
    neurons_high: Annotated[str, typer.Option(help="Of highest.")] = "0,1,2,5,10,20",
    max_accuracy_drop: Annotated[
        float, typer.Option(help="Points of ID accuracy that pruning may cost.", min=0)
    ] = 1.0,
    search_images: Annotated[
        int, typer.Option(help="Validation images to choose the mask on at most.", min=1)
    ] = 1000,
    max_unreadable: Annotated[
        int, typer.Option(help="Images that may be left out as unreadable.", min=0)
    ] = 10,
    seed: Annotated[int, typer.Option(help="Of proxy outliers and bootstraps.", min=0)] = 0,
    device: Device = None,
    batch_size: BatchSize = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a detector.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a detector of a trained classifier and images.

    Images are a folder of them, of Parquet or of IDX files, a manifest (.csv, .parquet),
    torchvision:NAME or pytorch-ood:NAME. Of a divided source --id-train takes the split train,
    --id-val validation, else test. If classes of --id-val, such as folders, are named like the
    model's, its images are labelled; else agreement with the unpruned model stands in for accuracy.
    A fit that was stopped goes on where it was.

    Example: opnp fit --model torchvision:resnet50 --weights resnet50.pth --id-train train
    --id-val val --out detector
    """
    from opnp.backbones.backbone import from_spec
    from opnp.data import images
    from opnp.data.preprocessing import Preprocessing
    from opnp.deployment import fit as fitting
    from opnp.deployment.detector import check_place
    from opnp.pruning.candidates import Grid

    check_place(out, overwrite)
    if from_run:
        if given := [path for path in (model, weights, id_train, id_val) if path is not None]:
            raise InputError(f"--from-run takes no model and no images: leave {given[0]} out.")
        from opnp.pipeline.parameters import load as load_parameters
        from opnp.pipeline.stages import detector as of_run

        made = of_run.from_run(load_parameters(), accept)
    else:
        if model is None or id_train is None or id_val is None:
            raise InputError("Give --model, --id-train and --id-val, or --from-run.")
        settings = fitting.Settings(
            grid=Grid(
                numbers("weights-low", weights_low),
                numbers("weights-high", weights_high),
                numbers("neurons-low", neurons_low),
                numbers("neurons-high", neurons_high),
            ),
            clips=[
                None if word == "none" else numbers("clip", word)[0] for word in clip.split(",")
            ],
            temperatures=numbers("temperature", temperature),
            accept=accept,
            max_accuracy_drop=max_accuracy_drop,
            search_images=search_images,
            max_unreadable=max_unreadable,
            seed=seed,
            batch_size=batch_size,
        )
        train = images.find(id_train, part="train", asked="--id-train")
        validation = images.find(id_val, part="validation", asked="--id-val")
        if train.source == validation.source:
            raise InputError(
                f"--id-train and --id-val are both {id_val}, which is not divided: keep some "
                "images out of training, and name them with --id-val."
            )
        find_own_code()
        backbone = from_spec(
            model,
            weights=weights,
            preprocessing=Preprocessing.stated(preprocessing) if preprocessing else None,
            classes=read_classes(classes),
        )
        features = out.with_name(f".{out.name}.features")
        made = fitting.fit(backbone, train, validation, features, settings, device_named(device))
    made = made.save(out, overwrite)
    if not from_run:
        rmtree(features)
    told(made.describe(), as_json, describe)


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
