"""The backbone that `train` has written."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from opnp.backbones.backbone import Backbone, check_stated, load_backbone
from opnp.data.preprocessing import Preprocessing
from opnp.pipeline.results.reading import Array, read_columns, reading, select, stale
from opnp.runtime import tensors
from opnp.runtime.files import digest, read_json
from opnp.workspace import Workspace

if TYPE_CHECKING:
    from opnp.pipeline.results.run import Run

__all__ = ["About", "Training", "on_device", "read_about", "read_backbone", "read_training"]

ACCURACIES = ("train_accuracy", "validation_accuracy")


@dataclass(frozen=True)
class About:
    """What the file of a backbone says of it.

    Attributes:
        sha256: of the file.
        preprocessing: of the images that the backbone takes.
        classes: names of the K classes, in the order of the logits.
    """

    sha256: str
    preprocessing: Preprocessing
    classes: list[str]


@dataclass(frozen=True)
class Training:
    """How the backbone was trained, or loaded.

    Attributes:
        record: accuracies in percent, sizes, digests of the backbone and its checkpoint, and the
            threshold that SPCP learnt with it, if it was trained so.
        history: a value for each epoch by column; empty columns for a loaded checkpoint.
    """

    record: dict[str, Any]
    history: dict[str, Array]


def read_about(workspace: Workspace) -> About:
    """What the backbone is, without its weights.

    Raises:
        InputError: the file is missing or damaged, or does not hold a backbone.
    """
    path = workspace.backbone
    with reading(path, "train"):
        stated = tensors.metadata(path)
        check_stated(path, stated)
        preprocessing = Preprocessing.stated(stated["preprocessing"])
        return About(digest(path), preprocessing, stated["classes"])


def read_backbone(workspace: Workspace, factory: str) -> Backbone:
    """The backbone on the CPU, in evaluation mode.

    Args:
        workspace: of the run.
        factory: the ``package.module:factory`` that may be imported and called, as the parameters
            name it.

    Raises:
        InputError: the file is missing or damaged, or needs another factory.
    """
    with reading(workspace.backbone, "train"):
        return load_backbone(workspace.backbone, factory)


@lru_cache(maxsize=16)
def on_device(workspace: Workspace, sha256: str, device: torch.device, factory: str) -> Backbone:
    """The backbone on a device, loaded once in each process as long as its file stays the same.

    Args:
        workspace: of the run.
        sha256: of the backbone's file.
        device: where it computes.
        factory: see `read_backbone`.
    """
    backbone = read_backbone(workspace, factory)
    if device.type == "cuda":  # the faster order for its convolutions
        backbone.classifier.to(memory_format=torch.channels_last)
    backbone.classifier.to(device)
    return backbone


def read_training(run: "Run") -> Training:
    """How the backbone was trained.

    Raises:
        InputError: a file is missing or damaged, or of another backbone.
    """
    path, history = run.workspace.training, run.workspace.history
    keys = (*ACCURACIES, "parameters", "features", "classes", "checkpoint", "sha256")
    with reading(path, "train"):
        stated = read_json(path)
        record = select(stated, keys) | {"spcp_threshold": stated.get("spcp_threshold")}
    if record["sha256"] != run.backbone_stated.sha256:
        raise stale(path, "another backbone", "train")
    return Training(record, read_columns(history, "train", ("epoch", "loss", *ACCURACIES)))
