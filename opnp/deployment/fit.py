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
from opnp.data import proxies
from opnp.data.images import Images
from opnp.data.imagesets import unit
from opnp.deployment.detector import SavedDetector, provenance
from opnp.deployment.settings import FitSettings
from opnp.errors import InputError
from opnp.metrics.agreement import suspicion
from opnp.pruning.candidates import Trial, setting_of, trial_record
from opnp.pruning.clipping import clip_thresholds
from opnp.pruning.energy import bias_of
from opnp.pruning.search import SearchResult, choice_record, search_masks
from opnp.pruning.sensitivity import Sensitivity, SensitivitySums, halved
from opnp.runtime import tensors
from opnp.runtime.progress import counting, track

__all__ = ["Shards", "fit"]

logger = logging.getLogger(__name__)

SHARD = 1024  # images: the unit of work that a fit which was killed does not repeat


class Shards:
    """Features of images, each shard written once whole and verified when it is read.

    Args:
        folder: where they lie.
        backbone: makes them.
        device: on which.
        settings: of the fit.
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
            "model": sha.hexdigest(),
            "preprocessing": backbone.preprocessing.as_json(),
            "device": device.type,
            "torch": torch.__version__,
        }

    def of_images(self, name: str, images: Images) -> list[Path]:
        """Encode all images, a shard at a time; the paths of the shards.

        Raises:
            InputError: too many cannot be read, or none can.
        """
        rows, paths = range(len(images)), []
        with counting(f"features of {name} (images)", len(rows)) as advance:
            for start in rows[::SHARD]:
                part = rows[start : start + SHARD]
                path = self.folder / f"{name}-{start // SHARD:05d}.safetensors"
                origin = {"images": images.states(part)}
                work = partial(self.encode, images, part, advance)
                lost, made = self.write_once(path, origin, work)
                advance(0 if made else len(part))
                self.unreadable += lost
                if len(self.unreadable) > self.settings.max_unreadable:
                    raise InputError(
                        f"{len(self.unreadable)} images cannot be read, more than the "
                        f"{self.settings.max_unreadable} that are allowed; the last: {lost[-1]}"
                    )
                paths.append(path)
        if not any(len(h) for h, _ in map(self.read, paths)):
            raise InputError(f"No image of {images.source} can be read: replace them.")
        return paths

    def encode(
        self, images: Images, part: Sequence[int], advance: Callable[[int], None]
    ) -> tuple[Tensor, list[int], list[str]]:
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
        return torch.cat([empty, *parts]), rows, lost

    def of_proxies(self, family: str, images: np.ndarray[Any, Any], sha256: str) -> Path:
        """Encode the proxy outliers of a family, made of images in [0, 1], (N, C, H, W)."""
        seed, size = self.settings.seed, self.settings.batch_size

        def work() -> tuple[Tensor, list[int], list[str]]:
            rows = range(len(images))
            batches = (
                self.backbone.preprocessing.normalize(
                    torch.from_numpy(proxies.make(family, images, rows[at : at + size], seed))
                )
                for at in rows[::size]
            )
            return encode(self.backbone.classifier.encoder, batches, self.device), [*rows], []

        path = self.folder / f"proxies-{family}.safetensors"
        self.write_once(path, {"images": sha256, "seed": seed}, work)
        return path

    def write_once(
        self,
        path: Path,
        origin: dict[str, Any],
        work: Callable[[], tuple[Tensor, list[int], list[str]]],
    ) -> tuple[list[str], bool]:
        """Write what ``work`` gives, unless it is there, whole.

        Returns:
            The images that were left out, and whether there was work to do.
        """
        wanted = json.loads(json.dumps({**self.origin, **origin}))
        try:
            found, about = tensors.load(path)
            if about["origin"] == wanted and "features" in found:
                return about["unreadable"], False
        except (InputError, KeyError):
            pass
        h, rows, lost = work()
        if not torch.isfinite(h).all():
            raise InputError(
                f"The model gives features that are NaN or infinite ({path.stem}): check its "
                "weights and its preprocessing."
            )
        about = {"origin": wanted, "rows": rows, "unreadable": lost}
        tensors.save(path, {"features": h}, about)
        return lost, True

    def read(self, path: Path) -> tuple[Tensor, list[int]]:
        """The features (n, L) of a shard, and the rows of their images."""
        found, about = tensors.load(path)
        return found["features"], about["rows"]


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
    shards, head = Shards(folder, backbone, device, settings), backbone.classifier.head
    train_paths = shards.of_images("train", train)
    validation_paths = shards.of_images("validation", validation)
    measured, percentiles = sensitivities(shards, train_paths)

    parts = [shards.read(path) for path in validation_paths]
    h, rows = torch.cat([part for part, _ in parts]), [row for _, of in parts for row in of]
    predicted = head(h.to(device)).argmax(dim=1).cpu()
    truth = predicted if labels is None else torch.from_numpy(labels[rows])
    if doubt := suspicion(truth.numpy(), predicted.numpy(), backbone.classes):
        logger.warning("%s", doubt)

    places = evenly(len(rows), settings.search_images)
    result = search(
        shards, validation, [rows[place] for place in places], h[places], truth[places], measured
    )
    chosen = result.choices["all"]
    candidate = chosen.trial.candidate
    sensitivity = setting_of(measured, candidate)
    made = provenance() | {
        "by": "opnp fit",
        "search": {
            **choice_record(chosen, percentiles),
            "unpruned": trial_record(result.trials[0], percentiles),
            "candidates": len(result.trials),
            "proxies": list(settings.proxies),
            "outliers": [],
            "images": len(places),
            "max_accuracy_drop": settings.max_accuracy_drop,
        },
        "train": {"source": train.source, "images": sensitivity.count},
        "validation": {
            "source": validation.source,
            "images": len(h),
            "labels": "none: agreement with the unpruned model" if labels is None else "given",
            **({"also_training": shared} if shared else {}),
        },
        "unreadable": shards.unreadable,
        "device": device.type,
        "seed": settings.seed,
    }
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
    shards: Shards, paths: Sequence[Path]
) -> tuple[list[Sensitivity], dict[float | None, float | None]]:
    """The sensitivity at every clip and temperature, and each clip's percentile.

    Samples in even and in odd places of a shard are summed apart: two halves of the training set.
    """
    head, settings = shards.backbone.classifier.head, shards.settings
    wanted = [each for each in settings.clip if each is not None]
    values: list[float] = []
    if wanted:
        values = clip_thresholds(lambda: (shards.read(path)[0] for path in paths), wanted)
    # At two percentiles the activations may be the same: the first stands for both.
    percentiles: dict[float | None, float | None] = {None: None}
    for percentile, value in zip(wanted, values, strict=True):
        percentiles.setdefault(value, percentile)
    points = list(product(percentiles, settings.temperature))
    weight, bias = head.weight, bias_of(head)
    total: list[SensitivitySums] = []
    for path in track(paths, f"sensitivity (shards of {SHARD})", len(paths)):
        h = shards.read(path)[0].to(shards.device)
        sums = [
            SensitivitySums.of(half, weight, bias, temperature, clip)
            for clip, temperature in points
            for half in (h[::2], h[1::2])
        ]
        total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
    pairs = zip(total[::2], total[1::2], strict=True)
    return [halved(*pair) for pair in pairs], percentiles


def search(
    shards: Shards,
    validation: Images,
    rows: Sequence[int],
    h: Tensor,
    truth: Tensor,
    measured: Sequence[Sensitivity],
) -> SearchResult:
    """The best mask on some validation images and the proxy outliers made of them.

    Args:
        shards: encodes the proxies.
        validation: all ID validation images.
        rows: of those that serve here.
        h: their features, (n, L).
        truth: their labels, (n,).
        measured: the sensitivities.
    """
    settings, preprocessing = shards.settings, shards.backbone.preprocessing
    found = list(validation.batches(preprocessing, rows, settings.batch_size))
    pixels = np.stack([each for batch in found for each in batch.pixels])
    if lost := {row: str(error) for batch in found for row, error in batch.lost.items()}:
        # They could be read before, when their features were made.
        shards.unreadable += lost.values()
        kept = [at for at, row in enumerate(rows) if row not in lost]
        h, truth = h[kept], truth[kept]
    images, sha256 = unit(pixels).numpy(), hashlib.sha256(pixels.data).hexdigest()
    outliers = {
        family: shards.read(shards.of_proxies(family, images, sha256))[0].to(shards.device)
        for family in track(settings.proxies, "proxy outliers (families)", len(settings.proxies))
    }

    def progress(trials: Iterator[Trial], count: int) -> Iterable[Trial]:
        return track(trials, "search (masks)", count)

    return search_masks(
        shards.backbone.classifier.head,
        h.to(shards.device),
        outliers,
        measured,
        settings,
        labels=truth,
        seed=settings.seed,
        progress=progress,
    )


def evenly(n: int, count: int) -> list[int]:
    """``count`` of ``n`` places at most, evenly spaced."""
    return [place * n // count for place in range(count)] if count < n else list(range(n))
