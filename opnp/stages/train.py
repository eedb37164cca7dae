"""Train: the backbone, trained here or loaded from its checkpoint."""

from pathlib import Path
from typing import Any

import torch

from opnp import artifacts, backbones, datasets, devices, training
from opnp.datasets import data_file
from opnp.decoding import class_names
from opnp.errors import InputError
from opnp.files import digest, write_csv, write_json
from opnp.parameters import Parameters
from opnp.stages import fetch


def run(parameters: Parameters) -> dict[str, Any]:
    """Train the backbone, or load its checkpoint, and record how well it classifies."""
    settings, data, device = parameters.train, parameters.data, devices.device()
    fetch.manifest_of(parameters)
    classes = class_names(data_file("train"))
    read = {
        split: datasets.read(data_file(split), data.mode, data.image_size)
        for split in ("train", "validation")
    }
    spec: dict[str, object] = {
        "name": settings.backbone,
        "width": settings.width,
        "depth": settings.depth,
    }
    with devices.deterministic(settings.threads):
        torch.manual_seed(parameters.seed)
        model = backbones.build(
            channels=len(data.mode),
            classes=len(classes),
            size=data.image_size,
            **spec,  # type: ignore[arg-type]
        )
        preprocessing = backbones.Preprocessing.measured(read["train"][0])
        if settings.checkpoint:
            path = Path(settings.checkpoint)
            preprocessing = load_checkpoint(model, path, classes, preprocessing)
        model.to(device)
        both = {
            split: (
                preprocessing.normalize(datasets.unit(pixels)).to(device),
                torch.from_numpy(labels).to(device),
            )
            for split, (pixels, labels) in read.items()
        }
        history = []
        if not settings.checkpoint:
            history = training.fit(
                model,
                both["train"],
                both["validation"],
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                shift_pixels=settings.shift_pixels,
                seed=parameters.seed,
                optimizer=settings.optimizer,
                precision=settings.precision,
                spcp=settings.spcp,
            )
        model.eval()
        record: dict[str, Any] = {
            f"{split}_accuracy": training.accuracy(model, *both[split]) for split in both
        }
    backbones.save(model.cpu(), artifacts.BACKBONE, preprocessing, classes, spec)
    record |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "features": model.head.in_features,
        "classes": model.head.out_features,
        "checkpoint": digest(Path(settings.checkpoint)) if settings.checkpoint else None,
        "sha256": digest(artifacts.BACKBONE),
    }
    write_csv(
        artifacts.HISTORY, ["epoch", "loss", "train_accuracy", "validation_accuracy"], history
    )
    write_json(artifacts.TRAINING, record)
    return record


def load_checkpoint(
    model: backbones.Classifier,
    path: Path,
    classes: list[str],
    measured: backbones.Preprocessing,
) -> backbones.Preprocessing:
    """Load a checkpoint, and return the preprocessing it states, else the one measured here.

    Raises:
        InputError: it is not for this model, or states other classes or another size of images.
    """
    stated = backbones.load_weights(model, path)
    if stated.get("classes", classes) != classes:
        raise InputError(
            f"Checkpoint {path} is of the classes {', '.join(stated['classes'])}, the data are of "
            f"{', '.join(classes)}: take the data it was trained on."
        )
    if "preprocessing" not in stated:
        return measured
    preprocessing = backbones.Preprocessing.stated(stated["preprocessing"])
    if (preprocessing.size, preprocessing.mode) != (measured.size, measured.mode):
        raise InputError(
            f"Checkpoint {path} wants images of {preprocessing.size} pixels in mode "
            f"{preprocessing.mode}: set data.image_size and data.mode so."
        )
    return preprocessing
