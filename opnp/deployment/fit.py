"""Fitting a detector to a trained classifier: features, sensitivity, proxies, search, threshold.

What the stages of the pipeline do, in one process, for a user's own model and images. Features
(4·L bytes for each image) are kept in shards in a folder beside the detector until it is finished:
a fit that was killed goes on from them, and only those of validation are ever in memory together.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opnp.backbones.backbone import Backbone, check
from opnp.backbones.encoding import encode
from opnp.backbones.shards import Encoded, Shard, divide, read_shard, write_once
from opnp.data import proxies
from opnp.data.families import besides
from opnp.data.images import Images
from opnp.data.imagesets import unit
from opnp.deployment.detector import SavedDetector
from opnp.deployment.record import record
from opnp.deployment.settings import FitSettings
from opnp.errors import InputError
from opnp.metrics.agreement import suspicion
from opnp.pruning.candidates import Trial, setting_of
from opnp.pruning.clipping import by_threshold, clip_thresholds
from opnp.pruning.energy import bias_of
from opnp.pruning.search import SearchResult, search_masks, search_record
from opnp.pruning.sensitivity import (
    Sensitivity,
    SensitivitySums,
    added,
    of_halves,
    sums_of_halves,
)
from opnp.runtime.progress import counting, track

__all__ = ["Features", "fit"]

logger = logging.getLogger(__name__)

SHARD = 1024  # images: the unit of work that a fit which was killed does not repeat


class Features:
    """The penultimate features of a fit, in shards that a fit which is started again takes over.

    Args:
        folder: where the shards lie.
        backbone: encodes the images.
        device: where it runs.
        settings: settings of the fit.

    Attributes:
        unreadable: the images that could not be read, each with the reason.
    """

    def __init__(
        self, folder: Path, backbone: Backbone, device: torch.device, settings: FitSettings
    ):
        self.folder, self.backbone, self.device = folder, backbone, device
        self.settings = settings
        self.unreadable: list[str] = []
        sha = hashlib.sha256()
        for tensor in backbone.classifier.state_dict().values():
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.origin = {
            "spec": json.dumps(backbone.spec, sort_keys=True),  # some options are in no weight
            "model": sha.hexdigest(),
            "preprocessing": json.dumps(backbone.preprocessing.as_json()),
            "device": device.type,
            "torch": torch.__version__,
        }

    def of_images(self, name: str, images: Images) -> list[Path]:
        """Encode all images, a shard at a time, and return the shards.

        Raises:
            InputError: too many images cannot be read, or none can.
        """
        paths = []
        with counting(f"features of {name} (images)", len(images)) as advance:
            for shard in divide(name, len(images), SHARD):
                part, path = range(shard.start, shard.stop), shard.path(self.folder)
                states = json.dumps(images.states(part)).encode()
                origin = {**self.origin, "images": hashlib.sha256(states).hexdigest()}
                made = write_once(path, shard, origin, partial(self.encode, images, part, advance))
                advance(0 if made else len(part))
                paths.append(path)
                self.left_out(read_shard(path).unreadable)
        if not any(len(read_shard(path).rows) for path in paths):
            raise InputError(f"No image of {images.source} can be read: replace them.")
        return paths

    def left_out(self, unreadable: Sequence[str]) -> None:
        """Remember images that could not be read.

        Raises:
            InputError: there are more of them than the settings allow.
        """
        self.unreadable += unreadable
        if len(self.unreadable) > self.settings.max_unreadable:
            raise InputError(
                f"{len(self.unreadable)} images cannot be read, more than the "
                f"{self.settings.max_unreadable} that are allowed; the last: {self.unreadable[-1]}"
            )

    def encode(
        self, images: Images, part: Sequence[int], advance: Callable[[int], None]
    ) -> Encoded:
        """Features of some of the images; ``advance`` is told how many images are done."""
        rows: list[int] = []
        lost: list[str] = []

        def batches() -> Iterator[Tensor]:
            for batch in images.batches(
                self.backbone.preprocessing, part, self.settings.batch_size
            ):
                rows.extend(batch.rows)
                lost.extend(map(str, batch.lost.values()))
                if batch.rows:
                    yield self.backbone.preprocessing.normalize(unit(np.stack(batch.pixels)))
                advance(len(batch.rows) + len(batch.lost))

        classifier = self.backbone.classifier
        empty = torch.empty(0, classifier.head.in_features)
        parts = [encode(classifier.encoder, [batch], self.device) for batch in batches()]
        return Encoded(torch.cat([empty, *parts]), images.split.labels[rows], rows, lost)

    def of_proxies(self, family: str, images: np.ndarray[Any, Any], sha256: str) -> Tensor:
        """Features of the proxy outliers of a family, made from images in [0, 1], (N, C, H, W)."""
        seed, size, rows = self.settings.seed, self.settings.batch_size, range(len(images))

        def work() -> Encoded:
            batches = (
                self.backbone.preprocessing.normalize(
                    torch.from_numpy(proxies.make(family, images, rows[at : at + size], seed))
                )
                for at in rows[::size]
            )
            found = encode(self.backbone.classifier.encoder, batches, self.device)
            return Encoded(found, np.full(len(rows), -1))

        shard = Shard(f"proxies/{family}", 0, 0, len(rows), len(rows))
        path = shard.path(self.folder)
        write_once(path, shard, {**self.origin, "images": sha256, "seed": str(seed)}, work)
        return read_shard(path).features


def fit(
    backbone: Backbone,
    train: Images,
    validation: Images,
    folder: Path,
    settings: FitSettings | None = None,
    device: torch.device | str = "cpu",
) -> SavedDetector:
    """Make a detector of a trained classifier; no label is needed, and no OOD image.

    Validation images are labelled where their source's classes are the model's. Without labels
    accuracy is agreement with the unpruned model.

    Args:
        backbone: the classifier with its preprocessing.
        train: ID images that the sensitivity is measured on; the more, and the more of the classes,
            the better.
        validation: other ID images, on which mask and threshold are chosen.
        folder: for the features, until the detector is finished; left to the caller to remove.
        settings: what to choose from.
        device: where the model runs.

    Raises:
        InputError: images cannot be read, some of them only are of the model's classes, all
            validation images are training images, features are not finite, or the model could not
            be loaded again, see `opnp.backbones.backbone.check`.
    """
    settings, device = settings or FitSettings(), torch.device(device)
    check(backbone)
    labels = validation.labels(backbone.classes)
    shared = check_apart(train, validation)
    backbone.classifier.eval().requires_grad_(False).to(device)
    features, head = Features(folder, backbone, device, settings), backbone.classifier.head
    train_shards = features.of_images("train", train)
    parts = [read_shard(path) for path in features.of_images("validation", validation)]
    measured, percentiles = sensitivities(features, train_shards)

    h = torch.cat([part.features for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    predicted = head(h.to(device)).argmax(dim=1).cpu()
    truth = predicted if labels is None else torch.from_numpy(labels[rows])
    if doubt := suspicion(truth.numpy(), predicted.numpy(), backbone.classes):
        logger.warning("%s", doubt)

    places = evenly(len(rows), settings.search_images)
    result = search(features, validation, rows[places].tolist(), h[places], truth[places], measured)
    for doubt in result.doubts:
        logger.warning("%s", doubt)
    candidate = result.best.candidate
    sensitivity = setting_of(measured, candidate)
    chosen_among = {"proxies": list(settings.proxies), "outliers": []}
    made = record(
        "opnp fit",
        search_record(result, percentiles, ["all"]) | chosen_among,
        "all",
        images=len(places),
        max_accuracy_drop=settings.max_accuracy_drop,
        train=(train.source, sensitivity.count),
        validation={
            "source": validation.source,
            "images": len(h),
            "labels": "none: agreement with the unpruned model" if labels is None else "given",
            **({"also_training": shared} if shared else {}),
        },
        unreadable=features.unreadable,
        seed=settings.seed,
        device=device.type,
    )
    return SavedDetector.of(backbone, result.mask, candidate, sensitivity, h, made, settings.accept)


def check_apart(train: Images, validation: Images) -> int:
    """How many validation images are training images as well; a warning says so.

    Raises:
        InputError: all of them are.
    """
    shared = len(validation.also_in(train))
    if shared == len(validation):
        raise InputError(
            f"All {shared} validation images ({validation.source}) are training images as well, so "
            "that mask and threshold would be chosen on images that the model has seen: keep some "
            "images out of training."
        )
    if shared:
        logger.warning(
            "%d of the %d validation images (%s) are training images as well (%s)",
            *(shared, len(validation), validation.source, train.source),
        )
    return shared


def sensitivities(
    features: Features, paths: Sequence[Path]
) -> tuple[list[Sensitivity], dict[float | None, float | None]]:
    """The sensitivity at every clip and temperature, and each clip's percentile.

    Samples in even and in odd places of a shard are summed apart: two halves of the training set.
    """
    head, settings = features.backbone.classifier.head, features.settings
    wanted = [each for each in settings.clip if each is not None]
    values: list[float] = []
    if wanted:
        values = clip_thresholds(lambda: (read_shard(path).features for path in paths), wanted)
    percentiles = by_threshold(wanted, values)
    points = [*product(percentiles, settings.temperature)]
    total: list[SensitivitySums] = []
    for path in track(paths, f"sensitivity (shards of {SHARD})", len(paths)):
        h = read_shard(path).features.to(features.device)
        sums = sums_of_halves(h, head.weight, bias_of(head), points)
        total = added(total, sums) if total else sums
    return of_halves(total), percentiles


def search(
    features: Features,
    validation: Images,
    rows: Sequence[int],
    h: Tensor,
    truth: Tensor,
    measured: Sequence[Sensitivity],
) -> SearchResult:
    """The best mask on some validation images and the proxy outliers made of them.

    Args:
        features: encodes the proxies.
        validation: all ID validation images.
        rows: of those that serve here.
        h: their features, (n, L).
        truth: their labels, (n,).
        measured: the sensitivities.
    """
    settings, preprocessing = features.settings, features.backbone.preprocessing
    found = list(validation.batches(preprocessing, rows, settings.batch_size))
    pixels = np.stack([each for batch in found for each in batch.pixels])
    if lost := {row: str(error) for batch in found for row, error in batch.lost.items()}:
        # They could be read before, when their features were made.
        features.unreadable += lost.values()
        kept = [at for at, row in enumerate(rows) if row not in lost]
        h, truth = h[kept], truth[kept]
    images, sha256 = unit(pixels).numpy(), hashlib.sha256(pixels.data).hexdigest()
    others = besides(settings.reported, settings.proxies)
    families = (*settings.proxies, *others)
    outliers = {
        family: features.of_proxies(family, images, sha256).to(features.device)
        for family in track(families, "proxy outliers (families)", len(families))
    }

    def progress(trials: Iterator[Trial], count: int) -> Iterable[Trial]:
        return track(trials, "search (masks)", count)

    return search_masks(
        features.backbone.classifier.head,
        h.to(features.device),
        {family: outliers[family] for family in settings.proxies},
        measured,
        settings,
        labels=truth,
        reported={family: outliers[family] for family in others},
        seed=settings.seed,
        progress=progress,
    )


def evenly(n: int, count: int) -> list[int]:
    """``count`` of ``n`` places at most, evenly spaced."""
    return [place * n // count for place in range(count)] if count < n else list(range(n))
