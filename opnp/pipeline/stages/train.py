"""Train: the backbone, trained here or loaded with its weights."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opnp.backbones import specs, training
from opnp.backbones.backbone import Backbone, build, from_spec, save_backbone
from opnp.backbones.checkpoints import file_of, read_weights
from opnp.backbones.networks import NETWORKS
from opnp.backbones.spcp import Rectifier
from opnp.data import imagesets
from opnp.data.preprocessing import Preprocessing
from opnp.metrics.agreement import suspicion
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.pipeline.results.data import check_preprocessing
from opnp.runtime import devices
from opnp.runtime.files import digest, write_csv, write_json
from opnp.workspace import Workspace

logger = logging.getLogger(__name__)

PART = 2048  # images: two row groups of their file


def run(workspace: Workspace, parameters: Parameters) -> dict[str, Any]:
    """Train the backbone, or load its weights, and record how well it classifies."""
    settings, device, run = parameters.train, devices.device(), Run(workspace, parameters)
    manifest, classes = run.manifest, run.classes
    with devices.deterministic(settings.threads):
        torch.manual_seed(parameters.seed)
        rectifier = None if settings.spcp is None else Rectifier(settings.spcp)
        if settings.checkpoint is not None:
            backbone, history, rectifier = loaded(run, classes), [], None
        else:
            backbone = untrained(run, classes)
            history = trained(run, backbone, device, rectifier)
        model = backbone.classifier.to(device).eval()
        record: dict[str, Any] = {}
        for split in ("train", "validation"):
            count = manifest.sets[split].count
            truth, found = predictions(run, backbone, split, count, device)
            record[f"{split}_accuracy"] = 100 * int((found == truth).sum()) / len(truth)
        if doubt := suspicion(truth, found, classes):
            logger.warning("%s", doubt)
    model.cpu()
    save_backbone(workspace.backbone, backbone)
    file = file_of(checkpoint(run))
    record |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "features": model.head.in_features,
        "classes": model.head.out_features,
        "checkpoint": digest(file) if file else settings.checkpoint,
        "spcp_threshold": rectifier and float(rectifier.threshold or 0.0),
        "sha256": digest(workspace.backbone),
    }
    write_csv(
        workspace.history, ["epoch", "loss", "train_accuracy", "validation_accuracy"], history
    )
    write_json(workspace.training, record)
    return record


def options_of(parameters: Parameters) -> dict[str, Any]:
    """What a backbone is built with besides its name: the width and depth of a small network."""
    settings = parameters.train
    small = settings.backbone in NETWORKS
    return {"width": settings.width, "depth": settings.depth} if small else {}


def stated(run: Run) -> Preprocessing | None:
    """The preprocessing in the file that the parameters name; None if they name no file."""
    path = run.parameters.train.preprocessing
    return None if path is None else Preprocessing.stated(run.workspace.root / path)


def measured(run: Run) -> Preprocessing:
    """The preprocessing measured on the training images, all of which are read for it."""
    data = run.parameters.data
    pixels, _ = run.pixels("train", data.mode, data.image_size)
    return Preprocessing.measured(pixels, data.resize, data.interpolation)


def untrained(run: Run, classes: list[str]) -> Backbone:
    """The backbone to train; its preprocessing is stated in a file, or else measured."""
    preprocessing = stated(run) or measured(run)
    check_preprocessing(run.parameters, preprocessing)
    name, options = specs.parse(run.parameters.train.backbone)
    spec = {"name": name, **options, **options_of(run.parameters)}
    model = build(
        channels=preprocessing.channels, classes=len(classes), size=preprocessing.size, **spec
    )
    return Backbone(model, preprocessing, classes, spec)


def trained(
    run: Run, backbone: Backbone, device: torch.device, rectifier: Rectifier | None
) -> list[dict[str, float]]:
    """Train the backbone on images that are all in memory, perhaps with clipped contributions.

    Returns:
        The loss and the accuracies of each epoch.
    """
    settings, wanted = run.parameters.train, backbone.preprocessing

    def images_of(split: str) -> tuple[Tensor, Tensor]:
        pixels, labels = run.pixels(split, wanted.mode, wanted.size)
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
        seed=run.parameters.seed,
        optimizer=settings.optimizer,
        precision=settings.precision,
        spcp=rectifier,
    )


def predictions(
    run: Run, backbone: Backbone, split: str, count: int, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels and predicted labels of the ``count`` images of a split, few of them in memory at
    once."""
    wanted, truth, found = backbone.preprocessing, [], []
    for start in range(0, count, PART):
        stop = min(start + PART, count)
        pixels, labels = run.pixels(split, wanted.mode, wanted.size, start, stop)
        images = wanted.normalize(imagesets.unit(pixels)).to(device)
        truth.append(labels)
        found.append(training.predict(backbone.classifier, images).cpu().numpy())
    return np.concatenate(truth), np.concatenate(found)


def loaded(run: Run, classes: list[str]) -> Backbone:
    """The backbone with the weights that the parameters name.

    Weights of a small network that state no preprocessing are taken to be trained on these images.

    Raises:
        InputError: the weights are for another model, other classes or another preprocessing.
    """
    name, weights = run.parameters.train.backbone, checkpoint(run) or ""
    preprocessing = stated(run)
    if preprocessing is None and name in NETWORKS:
        preprocessing = None if read_weights(weights)[1] else measured(run)
    options = options_of(run.parameters)
    backbone = from_spec(name, weights, preprocessing, classes, **options)
    check_preprocessing(run.parameters, backbone.preprocessing)
    return backbone


def checkpoint(run: Run) -> str | Path | None:
    """The weights that the parameters name: a file, or one of the library's own by its name."""
    weights = run.parameters.train.checkpoint
    if weights is None:
        return None
    path = run.workspace.root / weights
    return path if file_of(weights) is not None or path.is_file() else weights
