"""Everything that the stages of a run have written, in one place."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from opnp.backbones.backbone import Backbone
from opnp.data.imagesets import Manifest
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import backbone, data, evaluation, features, images, search, sensitivity
from opnp.pipeline.results.backbone import About, Training
from opnp.pipeline.results.reading import Array
from opnp.pruning.masks import PruningMask
from opnp.pruning.sensitivity import Sensitivity
from opnp.workspace import Workspace

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """A run, read from its files when a part of it is asked for; what is small is read once.

    Every part refuses a file that is missing, damaged, or made with something else than the
    workspace and the parameters hold now, with an `InputError` whose ``about`` names the stage that
    makes it again.

    Attributes:
        workspace: where the files lie.
        parameters: that they must be made with.
    """

    workspace: Workspace
    parameters: Parameters

    @cached_property
    def manifest(self) -> Manifest:
        """The image sets of the data."""
        return data.read_manifest(self.workspace, self.parameters)

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes of the training images, in the order of their labels."""
        return data.read_classes(self.workspace)

    def pixels(
        self, split: str, mode: str, size: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images of a split, uint8 (N, H, W, C), and their labels, int64 (N,)."""
        return data.read_pixels(self.workspace, split, mode, size, start, stop)

    @cached_property
    def backbone_stated(self) -> About:
        """What the backbone is, without its weights."""
        return backbone.read_about(self.workspace)

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone on the CPU, in evaluation mode."""
        return backbone.read_backbone(self.workspace, self.parameters.train.backbone)

    def backbone_on(self, device: torch.device) -> Backbone:
        """The backbone on a device, loaded once in each process as long as its file is the same."""
        sha256, factory = self.backbone_stated.sha256, self.parameters.train.backbone
        return backbone.on_device(self.workspace, sha256, device, factory)

    @cached_property
    def training(self) -> Training:
        """How the backbone was trained, or loaded."""
        return backbone.read_training(self)

    def images(self, split: str, stop: int) -> Tensor:
        """The first ``stop`` images of a split, normalized, float32 (N, C, H, W)."""
        load, _ = images.open_images(self, split, 0, stop)
        return load(range(stop))

    def feature_shards(self, split: str) -> list[Path]:
        """The feature shards of a split, in order."""
        return features.shard_paths(self, split)

    def features(self, split: str) -> tuple[Tensor, Tensor]:
        """Penultimate features, float32 (N, L), and labels, int64 (N,), of a split."""
        return features.load(self, split)

    @cached_property
    def outlier_splits(self) -> dict[str, str]:
        """The splits by name that masks are chosen on besides ID validation."""
        return features.outlier_splits(self.parameters)

    @cached_property
    def reported_splits(self) -> dict[str, str]:
        """The splits by name that the chosen mask is reported on, and which do not decide."""
        return features.reported_splits(self.parameters)

    @cached_property
    def settings(self) -> list[dict[str, Any]]:
        """Every clip (percentile and threshold) and temperature that the search tries."""
        return sensitivity.read_settings(self)

    @property
    def percentiles(self) -> dict[float | None, float | None]:
        """The percentile of each threshold that features are clipped at."""
        return {each["threshold"]: each["clip"] for each in self.settings}

    @cached_property
    def sensitivities(self) -> list[Sensitivity]:
        """The sensitivity at each of the settings."""
        return sensitivity.read(self)

    @cached_property
    def search(self) -> dict[str, Any]:
        """What the search has chosen for each method, and among what."""
        return search.read(self)

    @cached_property
    def trials(self) -> pa.Table:
        """Every candidate of the search and its figures; the first is the unpruned head."""
        return search.read_trials(self)

    @cached_property
    def mask(self) -> PruningMask:
        """The mask of OPNP."""
        return search.read_mask(self)

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """What each detector tried, its ranks, and the test sets."""
        return evaluation.read(self)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Metrics of each detector, and the calibration of the heads on the ID test set."""
        return evaluation.read_metrics(self)

    @cached_property
    def intervals(self) -> dict[str, Any]:
        """The 95 % intervals of the metrics."""
        return evaluation.read_intervals(self)

    @cached_property
    def scores(self) -> dict[str, dict[str, Array]]:
        """Outlier scores by detector and test set."""
        return evaluation.read_scores(self)

    @cached_property
    def roc(self) -> dict[str, Array]:
        """Mean ROC curves in percent."""
        return evaluation.read_roc(self)
