"""`opnp show`, `score`, `evaluate` and `export`: what a saved detector is, says and becomes."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from opnp.cli.options import AsJson, BatchSize, Detector, Device, Trust
from opnp.cli.words import describe, loaded, show_evaluation, told, unreadable
from opnp.errors import InputError
from opnp.runtime.files import write_json

__all__ = ["evaluate", "export", "score", "show"]


def show(
    detector: Annotated[Path, typer.Argument(help="Folder of the detector.")],
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Describe a detector and how it was made, after verifying its files.

    \b
    Example:
      opnp show detector
    """
    told(loaded(detector, trust, "cpu").describe(), as_json, describe)


def score(
    paths: Annotated[
        list[str], typer.Argument(help="Image files, or sources of images as for `opnp fit`.")
    ],
    detector: Detector,
    out: Annotated[Path, typer.Option(help="Parquet file to write the scores to.")],
    trust: Trust = None,
    device: Device = None,
    batch_size: BatchSize = 64,
    as_json: AsJson = False,
) -> None:
    """Score images, and write a table of the scores.

    Its columns are file (or file#row), score, is_ood and predicted class. Larger scores mean OOD.
    A source with splits gives its test split. Images that cannot be read are named and left out.

    \b
    Example:
      opnp score --detector detector today/ extra.png --out scores.parquet
    """
    if out.suffix != ".parquet":
        raise InputError(f"{out} is not a .parquet file: name one with --out.")
    from opnp.data import images
    from opnp.deployment import score as scoring

    found = images.find(*paths)
    summary = scoring.score(loaded(detector, trust, device), found, out, batch_size)
    record = asdict(summary) | {"flagged": summary.flagged, "out": str(out)}
    told(record, as_json, lambda of: f"{of['images']} images, {of['flagged']:.1f} % OOD: {out}")
    unreadable(summary.unreadable)


def evaluate(
    detector: Detector,
    id_images: Annotated[
        str, typer.Option("--id", help="ID images that were not used to make the detector.")
    ],
    ood: Annotated[
        list[str],
        typer.Option(metavar="NAME=PATH", help="An OOD set. Repeat the option for more sets."),
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    trust: Trust = None,
    device: Device = None,
    batch_size: BatchSize = 64,
) -> None:
    """Measure how well a detector tells OOD images from ID images.

    The unpruned model's energy is measured for comparison. FPR95 is the percentage of OOD images
    that pass a threshold which keeps 95 % of the ID images. Images are given as for `opnp fit`; a
    source with splits gives its test split. Images that cannot be read are named and left out.

    \b
    Example:
      opnp evaluate --detector detector --id test \\
        --ood sketches=sketches --ood noise=noise --json evaluation.json
    """
    from opnp.data import images
    from opnp.deployment import score as scoring

    places = {name: path for name, _, path in (entry.partition("=") for entry in ood)}
    if len(places) < len(ood) or not all(places) or not all(places.values()):
        raise InputError("--ood takes NAME=PATH, with another NAME each time.")
    sets = {name: images.find(path, asked=f"--ood {name}") for name, path in places.items()}
    inside = images.find(id_images, asked="--id")
    found = scoring.evaluate(loaded(detector, trust, device), inside, sets, batch_size)
    if json_file:
        write_json(json_file, found)
    show_evaluation(found)
    unreadable([each for of in (found["id"], *found["ood"].values()) for each in of["unreadable"]])


def export(
    detector: Detector,
    out: Annotated[Path, typer.Option(help="File to write.")],
    format: Annotated[
        str, typer.Option(metavar="torch|onnx", help="torch writes a .pt2 file.")
    ] = "torch",
    trust: Trust = None,
) -> None:
    """Export a detector as one program that maps images to logits and scores.

    The program takes a batch of images in [0, 1], float32 (N, C, H, W), not normalized. Its
    results are compared with the detector's before the file is written.

    \b
    Example:
      opnp export --detector detector --format onnx --out detector.onnx
    """
    from opnp.deployment import export as exporting

    exporting.export(loaded(detector, trust, "cpu"), out, format)
    print(f"{out}: images (N, C, H, W) → logits, score")
