"""Scoring images with a detector: a table of scores, and metrics over sets of images."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from opnp.data.images import Batch, Images
from opnp.data.imagesets import unit
from opnp.deployment.detector import SavedDetector
from opnp.errors import InputError
from opnp.metrics.bootstrap import weighted_metrics
from opnp.metrics.separation import METRICS
from opnp.pruning.energy import energy_score
from opnp.runtime.files import atomic
from opnp.runtime.progress import track

__all__ = ["Summary", "evaluate", "score"]

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("score", pa.float32()),
        ("is_ood", pa.bool_()),
        ("predicted", pa.string()),
    ]
)


@dataclass
class Summary:
    """The outcome of scoring images.

    Attributes:
        images: number of scored images.
        ood: number of these above the threshold.
        unreadable: images that could not be read, each with the reason.
    """

    images: int = 0
    ood: int = 0
    unreadable: list[str] = field(default_factory=list)

    @property
    def flagged(self) -> float:
        """Percent of the scored images that are OOD."""
        return 100 * self.ood / self.images


def score(detector: SavedDetector, images: Images, out: Path, batch_size: int = 64) -> Summary:
    """Write the scores of images as Parquet, holding no more than a few batches in memory.

    The columns are ``file`` (or file#row), ``score``, ``is_ood`` and ``predicted``, the class.
    Images that cannot be read are left out.

    Args:
        detector: the detector to score with.
        images: the images.
        out: the file to write.
        batch_size: number of images that go through the model at once.

    Returns:
        The counts, and the images left out.

    Raises:
        InputError: no image can be read, or the disk is full.
    """
    summary = Summary()
    origin = {"detector": detector.digest, "threshold": str(detector.threshold.value)}
    with atomic(out) as temporary:
        with pq.ParquetWriter(temporary, SCHEMA.with_metadata(origin), compression="zstd") as file:
            for batch in batches(detector, images, batch_size, "score"):
                summary.unreadable += map(str, batch.lost.values())
                if batch.rows:
                    scores = detector.predict(unit(np.stack(batch.pixels)))
                    names = [images.name(row) for row in batch.rows]
                    columns = [names, scores.score, scores.is_ood, scores.predicted]
                    file.write_batch(pa.record_batch(columns, schema=file.schema))
                    summary.images += len(scores)
                    summary.ood += int(scores.is_ood.sum())
        if not summary.images:
            raise InputError(f"No image of {images.source} can be read: {summary.unreadable[0]}")
    return summary


def batches(detector: SavedDetector, images: Images, size: int, what: str) -> Iterator[Batch]:
    """All images in batches, while progress is shown."""
    found = images.batches(detector.backbone.preprocessing, range(len(images)), size)
    return track(found, f"{what} (batches of {size})", -(-len(images) // size))


@dataclass
class Judged:
    """What a detector and its unpruned model say of a set of images.

    Attributes:
        rows: rows of the images that could be read, (N,).
        scores: outlier scores of the detector, float32 (N,).
        energy: outlier scores of the unpruned model, −logsumexp of its logits, float32 (N,).
        label: classes that the detector predicts, (N,).
        label_unpruned: classes that the unpruned model predicts, (N,).
        unreadable: images that could not be read, each with the reason.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    energy: NDArray[np.float32]
    label: NDArray[np.int64]
    label_unpruned: NDArray[np.int64]
    unreadable: list[str]


@torch.no_grad()
def judge(detector: SavedDetector, images: Images, size: int, what: str) -> Judged:
    parts: list[tuple[NDArray[Any], ...]] = []
    rows: list[int] = []
    unreadable: list[str] = []
    head = detector.backbone.classifier.head
    for batch in batches(detector, images, size, what):
        unreadable += map(str, batch.lost.values())
        if batch.rows:
            rows += batch.rows
            features = detector.features(unit(np.stack(batch.pixels)))
            scores, logits = detector.predict_features(features), head(features)
            energy, label = -energy_score(logits), logits.argmax(dim=1)
            parts.append((scores.score, energy.cpu().numpy(), scores.label, label.cpu().numpy()))
            bad = ~np.isfinite(np.stack(parts[-1][:2])).all(axis=0)
            if bad.any():
                raise InputError(
                    f"The score of {images.name(batch.rows[int(bad.argmax())])} is NaN or "
                    "infinite: the model overflows, or its weights are damaged."
                )
    if not rows:
        raise InputError(f"No image of {images.source} can be read: {unreadable[0]}")
    scored, energies, labels, unpruned = map(np.concatenate, zip(*parts, strict=True))
    return Judged(np.array(rows), scored, energies, labels, unpruned, unreadable)


def evaluate(
    detector: SavedDetector, inside: Images, outside: Mapping[str, Images], batch_size: int = 64
) -> dict[str, Any]:
    """Measure how well a detector, and its unpruned model's energy, separate OOD sets from ID.

    Args:
        detector: the detector to evaluate.
        inside: ID images the detector has not seen; accuracy needs their labels.
        outside: OOD sets by name.
        batch_size: number of images that go through the model at once.

    Returns:
        In percent: ``id``, the share flagged as OOD and the accuracy with and without pruning
        (None without labels); ``ood``, for each set the share flagged, the metrics of
        `opnp.metrics.separation` and the same metrics of the ``energy``; ``mean``, over the sets.

    Raises:
        InputError: there is no OOD set, no image of a set can be read, all images of an OOD set are
            ID images, or only some of the ID images belong to the model's classes.
    """
    if not outside:
        raise InputError("An evaluation needs an OOD set.", "ood")
    for name, images in outside.items():
        check_outside(name, images, inside)
    labels = inside.labels(detector.backbone.classes)
    known = judge(detector, inside, batch_size, "ID images")
    flagged = detector.threshold.is_ood
    accuracies: list[float | None] = [None, None]
    if labels is not None:
        truth = labels[known.rows]
        accuracies = [100 * float((p == truth).mean()) for p in (known.label, known.label_unpruned)]
    sets = {}
    for name, images in outside.items():
        found = judge(detector, images, batch_size, name)
        sets[name] = {
            **of_set(images, found),
            "flagged": 100 * float(flagged(found.scores).mean()),
            **separation(known.scores, found.scores),
            "energy": separation(known.energy, found.energy),
        }
    shared = ("flagged", *METRICS)
    return {
        "detector": detector.digest,
        "threshold": detector.threshold.model_dump(),
        "id": {
            **of_set(inside, known),
            "flagged": 100 * float(flagged(known.scores).mean()),
            "accuracy": accuracies[0],
            "accuracy_unpruned": accuracies[1],
        },
        "ood": sets,
        "mean": {name: fmean(of[name] for of in sets.values()) for name in shared}
        | {"energy": {m: fmean(of["energy"][m] for of in sets.values()) for m in METRICS}},
    }


def check_outside(name: str, images: Images, inside: Images) -> None:
    """Warn of images of an OOD set that are ID images as well.

    Raises:
        InputError: all of them are.
    """
    shared, what = len(images.also_in(inside)), f"images of the OOD set {name} ({images.source})"
    if shared == len(images):
        raise InputError(f"All {shared} {what} are ID images as well: name others.")
    if shared:
        logger.warning("%d of the %d %s are ID images as well", shared, len(images), what)


def of_set(images: Images, found: Judged) -> dict[str, Any]:
    return {
        "source": images.source,
        "images": len(found.rows),
        "unreadable": found.unreadable,
    }


def separation(inside: NDArray[np.float32], outside: NDArray[np.float32]) -> dict[str, float]:
    """The metrics of `ood_metrics`, without importing pytorch-ood, which takes seconds."""
    once = [np.ones((1, len(scores)), np.int64) for scores in (inside, outside)]
    found = weighted_metrics(inside.astype(np.float64), outside.astype(np.float64), *once)
    return {name: float(value[0]) for name, value in found.items()}
