"""The command `opnp fit`: a detector from your own model and images."""

from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated

import typer

from opnp.cli.options import AsJson, Device, option, takes
from opnp.cli.words import describe, device_named, find_own_code, here, read_classes, told
from opnp.deployment.settings import FitSettings
from opnp.errors import InputError

if TYPE_CHECKING:
    from opnp.deployment.detector import SavedDetector

__all__ = ["fit"]


@takes(FitSettings)
def fit(
    out: Annotated[Path, typer.Option(help="Folder to write the detector to.")],
    model: Annotated[
        str | None,
        typer.Option(help="torchvision:NAME, timm:NAME or module:factory, with ?option=value."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="The model's weights: FILE, FILE#KEY, or the library's name for its own."
        ),
    ] = None,
    id_train: Annotated[str | None, typer.Option(help="Training images, labelled or not.")] = None,
    id_val: Annotated[str | None, typer.Option(help="Other images of the same kind.")] = None,
    from_run: Annotated[
        bool, typer.Option("--from-run", help="Take all of it from the run in this folder.")
    ] = False,
    preprocessing: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with size, mode, mean and std, unless the weights state them."
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Text file with the name of a class on each line, in the logits' order."),
    ] = None,
    *,
    settings: FitSettings,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a detector.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a detector from a trained classifier and images.

    Images are a folder of images, of Parquet files or of IDX files, a manifest (.csv, .parquet),
    torchvision:NAME or pytorch-ood:NAME. From a source with splits, --id-train takes the training
    split, and --id-val takes the validation split or else the test split. If the classes of
    --id-val, such as its folders, are named like the model's, its images are labelled; otherwise
    agreement with the unpruned model stands in for accuracy. An interrupted fit resumes where it
    stopped.

    \b
    Example:
      opnp fit --model torchvision:resnet50 --weights resnet50.pth \\
        --id-train train --id-val val --out detector
    """
    from opnp.backbones.backbone import from_spec
    from opnp.data import images
    from opnp.data.preprocessing import Preprocessing
    from opnp.deployment import fit as fitting
    from opnp.deployment.folder import check_place

    check_place(out, overwrite)
    if from_run:
        made = of_run(settings, model, weights, id_train, id_val)
    else:
        if model is None or id_train is None or id_val is None:
            raise InputError("Give --model, --id-train and --id-val, or --from-run.")
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


def of_run(settings: FitSettings, *given: str | None) -> "SavedDetector":
    """The detector of the run in this folder.

    Raises:
        InputError: a model or images are given, the settings ask for a search, or the run lacks
            something.
    """
    from opnp.pipeline.detector import from_run
    from opnp.pipeline.parameters import load
    from opnp.pipeline.results import Run

    if named := [each for each in given if each is not None]:
        raise InputError(f"--from-run takes no model and no images: leave {named[0]} out.")
    if searched := sorted(settings.model_fields_set - {"accept"}):
        raise InputError(
            f"--from-run takes the mask that the run chose: leave {option(searched[0])} out."
        )
    workspace = here()
    return from_run(Run(workspace, load(workspace.parameters)), settings.accept)
