"""Fitted detectors: a classifier, its pruned head, and the score above which an image is OOD.

Scores are outlier scores, the energy −T·logsumexp(f/T) of the pruned head: **larger means OOD**. An
image is OOD if its score is above the threshold, which accepts a chosen share of ID validation
images. The class is the unpruned head's: pruning changes no prediction. Both heads share one pass
of the encoder, so scoring costs next to nothing beside classifying.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from opnp.backbones.backbone import Backbone, load_backbone, save_backbone
from opnp.backbones.specs import trusts
from opnp.data.imagesets import unit
from opnp.deployment.folder import (
    ABOUT,
    HEAD,
    MASK,
    MODEL,
    SENSITIVITY,
    UNPRUNED,
    ClassesBy,
    check_place,
    read_description,
    write_description,
)
from opnp.deployment.scorer import Scorer, Scores, opened, together
from opnp.deployment.threshold import Threshold
from opnp.errors import InputError
from opnp.pruning.candidates import Candidate
from opnp.pruning.energy import check_head
from opnp.pruning.inputs import Numbers, as_features, as_tensor
from opnp.pruning.masks import PruningMask
from opnp.pruning.sensitivity import Sensitivity
from opnp.runtime import tensors
from opnp.runtime.files import atomic_folder

__all__ = ["SavedDetector", "load"]

SENSITIVITIES = ("weights", "neurons_mean", "neurons_gradient", "neurons_taylor")
Picture = Image.Image | str | Path


@dataclass(frozen=True, eq=False)
class SavedDetector:
    """A classifier that tells which images are OOD; `opnp.load` reads one from its folder.

    Attributes:
        backbone: the classifier, unpruned, with its preprocessing and its classes.
        mask: the mask of its head.
        candidate: the percentages that made the mask, the clip and the temperature.
        sensitivity: sensitivity of the unpruned head at that clip and temperature.
        threshold: the score above which an image is OOD.
        made: how the detector was made: data, search, versions, time.
        classes_by: the head that predicts the class. Detectors of version 0.1 used the pruned one.
        digest: SHA-256 of the folder's description and, through it, of its files; it ignores the
            time of making, so equal detectors have equal digests. Empty before `save`.
    """

    backbone: Backbone
    mask: PruningMask
    candidate: Candidate
    sensitivity: Sensitivity
    threshold: Threshold
    made: dict[str, Any]
    classes_by: ClassesBy = UNPRUNED
    digest: str = ""
    scorer: Scorer = field(init=False)

    def __post_init__(self) -> None:
        scorer = scorer_of(self.backbone, self.mask, self.candidate, self.classes_by)
        object.__setattr__(self, "scorer", scorer)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        backbone: Backbone,
        mask: PruningMask,
        candidate: Candidate,
        sensitivity: Sensitivity,
        features: Tensor,
        made: dict[str, Any],
        accept: float = 95.0,
    ) -> Self:
        """A detector with a threshold set on ID validation features.

        Args:
            backbone: the classifier.
            mask: the mask of its head.
            candidate: what made the mask.
            sensitivity: what the mask was chosen by.
            features: penultimate features of ID validation images, not clipped, shape (N, L).
            made: how the detector was made.
            accept: percent of the validation images that the threshold accepts.

        Raises:
            InputError: the head or a score is not finite, or the names of classes do not fit.
        """
        scorer = scorer_of(backbone, mask, candidate)
        _, scores = scorer.judged(features.to(scorer.pruned.weight.device))
        threshold = Threshold.of(scores, accept)
        return cls(backbone, mask, candidate, sensitivity, threshold, made)

    @property
    def device(self) -> torch.device:
        return self.scorer.pruned.weight.device

    def to(self, device: torch.device | str) -> Self:
        """Move the detector's models to a device, and return the detector."""
        self.backbone.classifier.to(device)
        self.scorer.to(device)
        return self

    @torch.no_grad()
    def predict(self, images: Numbers) -> Scores:
        """Score preprocessed images.

        Args:
            images: in [0, 1], not normalized yet: a tensor or an array (N, C, H, W) of any
                floating-point type.

        Raises:
            InputError: the shape, the dtype or the range of values is wrong.
        """
        return self.scores_of(*self.scorer(self.checked(images)))

    def checked(self, images: Numbers) -> Tensor:
        """Images as the model takes them; refused if they were not preprocessed as it needs."""
        images = as_tensor(images, "Images")
        stated = self.backbone.preprocessing
        wanted = (stated.channels, stated.size, stated.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise InputError(
                f"The detector takes images (N, {', '.join(map(str, wanted))}), not "
                f"{tuple(images.shape)}: preprocess them as `describe()` states."
            )
        if not images.is_floating_point() or (
            images.numel() and not (images.min() >= 0 and images.max() <= 1)
        ):
            raise InputError(
                "The detector takes float images in [0, 1], before normalization: divide bytes by "
                "255, and leave the normalization to the detector."
            )
        return images.to(self.device, torch.float32)

    @torch.no_grad()
    def features(self, images: Numbers) -> Tensor:
        """Penultimate features (N, L), not clipped, of images as `predict` takes them."""
        return self.scorer.features(self.checked(images))

    @torch.no_grad()
    def predict_features(self, features: Numbers) -> Scores:
        """Score penultimate features, not clipped.

        Args:
            features: a tensor, an array or lists (N, L) of any real type.

        Raises:
            InputError: they are of another shape.
        """
        seen = as_features(features, self.scorer.pruned.weight)
        return self.scores_of(*self.scorer.judged(seen))

    def scores_of(self, logits: Tensor, scores: Tensor) -> Scores:
        score, label = scores.float().cpu().numpy(), logits.argmax(dim=1).cpu().numpy()
        classes = self.backbone.classes
        predicted = [classes[each] for each in label]
        return Scores(score, self.threshold.is_ood(score), label, predicted)

    def score(self, images: Picture | Iterable[Picture], batch_size: int = 64) -> Scores:
        """Preprocess and score images.

        Args:
            images: one image or many, each as Pillow's or as the path of a file.
            batch_size: images that go through the model at once.

        Raises:
            InputError: there are none, or one cannot be read.
        """
        parts = []

        # Each image is freed before the next is decoded; a generator expression would keep it.
        def prepared(image: Picture) -> NDArray[np.uint8]:
            return self.backbone.preprocessing.pixels(opened(image))

        pixels = map(prepared, [images] if isinstance(images, Picture) else images)
        while batch := list(islice(pixels, batch_size)):
            parts.append(self.predict(unit(np.stack(batch))))
        if not parts:
            raise InputError("There are no images to score: give at least one.")
        return together(parts)

    def describe(self) -> dict[str, Any]:
        """What the detector is and how it was made, in values that JSON can hold."""
        weight = self.scorer.pruned.weight
        # Left out where it was not written, so that the digests of older folders hold.
        by = {"classes_by": self.classes_by} if self.classes_by == UNPRUNED else {}
        return {
            "digest": self.digest,
            "model": self.backbone.spec,
            "classes": list(self.backbone.classes),
            **by,
            "features": weight.shape[1],
            "preprocessing": self.backbone.preprocessing.as_json(),
            "score": {
                "name": "energy of the pruned head",
                "larger_means": "OOD",
                "temperature": self.candidate.temperature,
                "clip": self.candidate.clip,
            },
            "threshold": self.threshold.model_dump(),
            "mask": self.candidate.record()
            | {"pruned": 100 * self.mask.pruned, "training_images": self.sensitivity.count},
            "made": self.made,
        }

    def save(self, folder: Path | str, overwrite: bool = False) -> Self:
        """Write the detector's folder atomically, and return the detector with its digest.

        Args:
            folder: the folder to write.
            overwrite: whether to replace a detector that is there.

        Raises:
            InputError: the folder is taken, or the disk is full.
        """
        folder = Path(folder)
        check_place(folder, overwrite)
        sensitivity = {name: getattr(self.sensitivity, name) for name in SENSITIVITIES}
        head = self.scorer.pruned
        with atomic_folder(folder) as temporary:
            save_backbone(temporary / MODEL, self.backbone)
            tensors.save(temporary / HEAD, {"weight": head.weight, "bias": head.bias}, {})
            self.mask.save(temporary / MASK)
            tensors.save(temporary / SENSITIVITY, sensitivity, {"count": self.sensitivity.count})
            about = {name: value for name, value in self.describe().items() if name != "digest"}
            sha256 = write_description(temporary, about)
        return replace(self, digest=sha256)


def scorer_of(
    backbone: Backbone, mask: PruningMask, candidate: Candidate, classes_by: ClassesBy = UNPRUNED
) -> Scorer:
    """The module that scores with a pruned head.

    Raises:
        InputError: the head is not finite, or the names of classes do not fit.
    """
    classifier = backbone.classifier
    pruned = mask.apply(classifier.head)
    check_head(pruned.weight[:0], pruned.weight, pruned.bias)
    if len(backbone.classes) != pruned.out_features:
        raise InputError(
            f"The model has {pruned.out_features} classes, but {len(backbone.classes)} names of "
            "classes are given: give one for each."
        )
    scorer = Scorer(
        backbone.preprocessing,
        classifier.encoder,
        classifier.head if classes_by == UNPRUNED else None,
        pruned,
        candidate.temperature,
        candidate.clip,
    )
    return scorer.eval().requires_grad_(False)


def load(
    folder: Path | str, device: torch.device | str = "cpu", trust: str | None = None
) -> SavedDetector:
    """Load a detector from its folder, once the folder is known to be undamaged.

    A folder never chooses the code that runs: if its model is made by a function of the user's, the
    caller must name that function.

    Args:
        folder: a folder that `SavedDetector.save` wrote.
        device: the device to run on.
        trust: the ``package.module:factory`` that may be imported and called.

    Raises:
        InputError: the folder is missing, damaged or not a detector, or its model's code is not
            trusted.
    """
    folder = Path(folder)
    about, stated = read_description(folder)
    if not trusts(stated.model.name, trust):
        raise InputError(
            f"{folder} wants to run the code of {stated.model.name}, which `trust` does not name.",
            "trust",
        )
    candidate = stated.candidate()
    tables, counted = tensors.load(folder / SENSITIVITY, "detector")
    head, _ = tensors.load(folder / HEAD, "detector")
    try:
        sensitivity = Sensitivity(
            weights=tables["weights"],
            neurons_mean=tables["neurons_mean"],
            neurons_gradient=tables["neurons_gradient"],
            neurons_taylor=tables["neurons_taylor"],
            count=counted["count"],
            temperature=candidate.temperature,
            clip=candidate.clip,
        )
        weight, bias = head["weight"], head["bias"]
    except KeyError as error:
        raise InputError(f"{folder} lacks the tensor {error}.", "detector") from None
    detector = SavedDetector(
        load_backbone(folder / MODEL, trust),
        PruningMask.load(folder / MASK),
        candidate,
        sensitivity,
        stated.threshold,
        stated.made,
        stated.classes_by,
        stated.digest,
    )
    pruned = detector.scorer.pruned
    if not (torch.equal(weight, pruned.weight) and torch.equal(bias, pruned.bias)):
        raise InputError(f"{folder / HEAD} is not its model's head, pruned.", "detector")
    described = json.loads(json.dumps(detector.describe()))
    if described != {key: about.get(key) for key in described}:
        raise InputError(f"{folder / ABOUT} does not match the other files.", "detector")
    return detector.to(device)
