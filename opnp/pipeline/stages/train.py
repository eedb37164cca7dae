"""Train: the backbone, trained here or loaded with its weights."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opnp import workspace
from opnp.backbones import specs, training
from opnp.backbones.backbone import Backbone, build, from_spec, save_backbone
from opnp.backbones.checkpoints import file_of, read_weights
from opnp.backbones.networks import NETWORKS
from opnp.data import imagesets
from opnp.data.imagesets import data_file
from opnp.data.parquet import class_names
from opnp.data.preprocessing import Preprocessing
from opnp.metrics.agreement import suspicion
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.stages import fetch
from opnp.runtime import devices
from opnp.runtime.files import digest, write_csv, write_json

logger = logging.getLogger(__name__)

PART = 2048  # images: two row groups of their file


def run(parameters: Parameters) -> dict[str, Any]:
    """Train the backbone, or load its weights, and record how well it classifies."""
    settings, device = parameters.train, devices.device()
    manifest = fetch.manifest_of(parameters)
    classes = class_names(data_file("train"))
    with devices.deterministic(settings.threads):
        torch.manual_seed(parameters.seed)
        if settings.checkpoint is not None:
            backbone, history = loaded(parameters, classes), []
        else:
            backbone = untrained(parameters, classes)
            history = trained(parameters, backbone, device)
        model = backbone.classifier.to(device).eval()
        record: dict[str, Any] = {}
        for split in ("train", "validation"):
            truth, found = predictions(backbone, split, manifest.sets[split].count, device)
            record[f"{split}_accuracy"] = 100 * int((found == truth).sum()) / len(truth)
        if doubt := suspicion(truth, found, classes):
            logger.warning("%s", doubt)
    model.cpu()
    save_backbone(workspace.BACKBONE, backbone)
    file = file_of(settings.checkpoint)
    record |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "features": model.head.in_features,
        "classes": model.head.out_features,
        "checkpoint": digest(file) if file else settings.checkpoint,
        "sha256": digest(workspace.BACKBONE),
    }
    write_csv(
        workspace.HISTORY, ["epoch", "loss", "train_accuracy", "validation_accuracy"], history
    )
    write_json(workspace.TRAINING, record)
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


def measured(parameters: Parameters) -> Preprocessing:
    """The preprocessing measured on the training images, which are all read for it."""
    data = parameters.data
    pixels, _ = imagesets.read(data_file("train"), data.mode, data.image_size)
    return Preprocessing.measured(pixels, data.resize, data.interpolation)


def untrained(parameters: Parameters, classes: list[str]) -> Backbone:
    """The backbone to train, with the preprocessing measured on the training images if none."""
    preprocessing = stated(parameters) or measured(parameters)
    fetch.check_images(parameters, preprocessing)
    name, options = specs.parse(parameters.train.backbone)
    spec = {"name": name, **options, **options_of(parameters)}
    model = build(
        channels=preprocessing.channels, classes=len(classes), size=preprocessing.size, **spec
    )
    return Backbone(model, preprocessing, classes, spec)


def trained(
    parameters: Parameters, backbone: Backbone, device: torch.device
) -> list[dict[str, float]]:
    """Train the backbone on images that are all in memory; what each epoch came to."""
    settings = parameters.train

    def images_of(split: str) -> tuple[Tensor, Tensor]:
        wanted = backbone.preprocessing
        pixels, labels = imagesets.read(data_file(split), wanted.mode, wanted.size)
        images = wanted.normalize(imagesets.unit(pixels))
        return images.to(device), torch.from_numpy(labels).to(device)

    return training.fit(
        backbone.classifier.to(device),
        images_of("train"),
        images_of("validation"),
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


def predictions(
    backbone: Backbone, split: str, count: int, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels and predicted labels of a split's ``count`` images, a part of them in memory at a
    time."""
    wanted, truth, found = backbone.preprocessing, [], []
    for start in range(0, count, PART):
        stop = min(start + PART, count)
        pixels, labels = imagesets.read(data_file(split), wanted.mode, wanted.size, start, stop)
        images = wanted.normalize(imagesets.unit(pixels)).to(device)
        truth.append(labels)
        found.append(training.predict(backbone.classifier, images).cpu().numpy())
    return np.concatenate(truth), np.concatenate(found)


def loaded(parameters: Parameters, classes: list[str]) -> Backbone:
    """The backbone with the weights that train.checkpoint names.

    A small network whose weights state no preprocessing is taken for one that was trained here.

    Raises:
        InputError: they are not for this model, or of other classes or another preprocessing.
    """
    name, weights = parameters.train.backbone, parameters.train.checkpoint or ""
    preprocessing = stated(parameters)
    if preprocessing is None and name in NETWORKS:
        preprocessing = None if read_weights(weights)[1] else measured(parameters)
    options = options_of(parameters)
    backbone = from_spec(name, weights, preprocessing, classes, **options)
    fetch.check_images(parameters, backbone.preprocessing)
    return backbone
