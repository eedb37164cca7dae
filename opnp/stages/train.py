"""Train: the backbone, trained here or loaded with its weights."""

from pathlib import Path
from typing import Any

import torch

from opnp import artifacts, backbones, datasets, devices, sources, training
from opnp.backbones import Backbone, Preprocessing
from opnp.datasets import data_file
from opnp.files import digest, write_csv, write_json
from opnp.networks import NETWORKS
from opnp.parameters import Parameters
from opnp.stages import fetch


def run(parameters: Parameters) -> dict[str, Any]:
    """Train the backbone, or load its weights, and record how well it classifies."""
    settings, data, device = parameters.train, parameters.data, devices.device()
    fetch.manifest_of(parameters)
    classes = sources.class_names(data_file("train"))
    read = {
        split: datasets.read(data_file(split), data.mode, data.image_size)
        for split in ("train", "validation")
    }
    measured = Preprocessing.measured(read["train"][0], data.resize, data.interpolation)
    with devices.deterministic(settings.threads):
        torch.manual_seed(parameters.seed)
        backbone = (loaded if settings.checkpoint else untrained)(parameters, classes, measured)
        model = backbone.classifier.to(device)
        both = {
            split: (
                backbone.preprocessing.normalize(datasets.unit(pixels)).to(device),
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
    model.cpu()
    backbones.save(artifacts.BACKBONE, backbone)
    file = backbones.file_of(settings.checkpoint)
    record |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "features": model.head.in_features,
        "classes": model.head.out_features,
        "checkpoint": digest(file) if file else settings.checkpoint,
        "sha256": digest(artifacts.BACKBONE),
    }
    write_csv(
        artifacts.HISTORY, ["epoch", "loss", "train_accuracy", "validation_accuracy"], history
    )
    write_json(artifacts.TRAINING, record)
    return record


def options_of(parameters: Parameters) -> dict[str, Any]:
    """What a backbone is built with besides its name: a small network's width and depth."""
    settings = parameters.train
    small = settings.backbone in NETWORKS
    return {"width": settings.width, "depth": settings.depth} if small else {}


def stated(parameters: Parameters) -> Preprocessing | None:
    """The preprocessing that train.preprocessing states, if it names a file."""
    path = parameters.train.preprocessing
    return None if path is None else Preprocessing.stated(Path(path))


def untrained(parameters: Parameters, classes: list[str], measured: Preprocessing) -> Backbone:
    """The backbone to train, with the preprocessing measured on the training images if none."""
    preprocessing = stated(parameters) or measured
    fetch.check_images(parameters, preprocessing)
    spec = {"name": parameters.train.backbone, **options_of(parameters)}
    model = backbones.build(
        channels=preprocessing.channels, classes=len(classes), size=preprocessing.size, **spec
    )
    return Backbone(model, preprocessing, classes, spec)


def loaded(parameters: Parameters, classes: list[str], measured: Preprocessing) -> Backbone:
    """The backbone with the weights that train.checkpoint names.

    A small network whose weights state no preprocessing is taken for one that was trained here.

    Raises:
        InputError: they are not for this model, or of other classes or another preprocessing.
    """
    name, weights = parameters.train.backbone, str(parameters.train.checkpoint)
    preprocessing = stated(parameters)
    if preprocessing is None and name in NETWORKS:
        file = backbones.file_of(weights) or Path(weights)
        preprocessing = None if backbones.read_weights(file)[1] else measured
    options = options_of(parameters)
    backbone = backbones.from_spec(name, weights, preprocessing, classes, **options)
    fetch.check_images(parameters, backbone.preprocessing)
    return backbone
