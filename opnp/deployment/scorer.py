"""A detector as one module, from images to logits and outlier scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from opnp.data.decoding import decode, printable
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError
from opnp.pruning.energy import energy_score

__all__ = ["Scorer", "Scores"]


@dataclass(frozen=True)
class Scores:
    """What a detector says of N images.

    Attributes:
        score: outlier scores, float32 (N,); larger means OOD.
        is_ood: whether the score is above the threshold, bool (N,).
        label: number of the class that the classifier predicts, int64 (N,).
        predicted: name of that class, for each image.
    """

    score: NDArray[np.float32]
    is_ood: NDArray[np.bool_]
    label: NDArray[np.int64]
    predicted: list[str]

    def __len__(self) -> int:
        return len(self.score)


class Scorer(nn.Module):
    """Maps images to logits and outlier scores, as one module that can be exported.

    Two heads share one pass of the encoder: the classifier's own gives the logits, so that pruning
    changes no prediction, and the pruned one gives the scores.

    Args:
        preprocessing: preprocessing of the images; only its normalization happens here.
        encoder: maps normalized images (N, C, H, W) to features (N, L).
        head: the head that gives the logits; None for the pruned head, on clipped features, as in
            detectors of version 0.1.
        pruned: the pruned head.
        temperature: temperature T of the energy.
        clip: value at which the pruned head's features are clipped from above; None does not clip.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        encoder: nn.Module,
        head: nn.Linear | None,
        pruned: nn.Linear,
        temperature: float,
        clip: float | None,
    ):
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name), dtype=torch.float32)
            self.register_buffer(name, values[:, None, None])
        self.encoder = encoder
        self.head = head
        self.pruned = pruned
        self.temperature = temperature
        self.clip = clip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and outlier scores (N,) of images in [0, 1], float32 (N, C, H, W)."""
        return self.judged(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (N, L), not clipped, of images in [0, 1]."""
        normalized = (images - self.get_buffer("mean")) / self.get_buffer("std")
        features: Tensor = self.encoder(normalized)
        return features

    def judged(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and outlier scores (N,) of features (N, L)."""
        pruned = self.pruned(features if self.clip is None else features.clamp(max=self.clip))
        logits = pruned if self.head is None else self.head(features)
        return logits, -energy_score(pruned, self.temperature)


def opened(image: Image.Image | str | Path) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, str | Path):
        raise InputError(
            f"An image must be a path or an image of Pillow's, not {type(image).__name__}; "
            "`PIL.Image.fromarray` makes one of an array."
        )
    return decode(Path(image), printable(image))


def together(parts: Sequence[Scores]) -> Scores:
    return Scores(
        np.concatenate([part.score for part in parts]),
        np.concatenate([part.is_ood for part in parts]),
        np.concatenate([part.label for part in parts]),
        [name for part in parts for name in part.predicted],
    )
