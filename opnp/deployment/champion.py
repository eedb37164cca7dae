"""Comparing a challenger with the champion, on an evaluation set that never changes.

The set is a folder with copies of a run's test sets, laid out like a run's data:
``manifest.json``, ``test.parquet`` and ``ood/NAME.parquet``.
"""

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from opnp.data import imagesets
from opnp.data.imagesets import data_file, read_manifest
from opnp.deployment.detector import SavedDetector
from opnp.errors import InputError
from opnp.metrics.bootstrap import bootstrap_mean_fpr95, interval
from opnp.metrics.separation import fpr95_auroc
from opnp.runtime.files import atomic_folder, digest, read_json, write_json
from opnp.runtime.settings import validated
from opnp.workspace import Workspace

__all__ = ["Verdict", "check_unseen", "compare", "freeze", "frozen_digest"]

ABOUT = "manifest.json"
BATCH = 64


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison, in percent. FPR95 is the mean over the OOD sets.

    Attributes:
        promoted: whether the challenger is better beyond chance, and accurate enough.
        fpr95: FPR95 of the challenger.
        accuracy: accuracy of the challenger on ID images.
        champion_fpr95: FPR95 of the champion; None without a champion, like all that follow.
        champion_accuracy: accuracy of the champion on ID images.
        low: lower end of the 95 % bootstrap interval of the champion's FPR95 minus the
            challenger's.
        high: its upper end.
    """

    promoted: bool
    fpr95: float
    accuracy: float
    champion_fpr95: float | None = None
    champion_accuracy: float | None = None
    low: float | None = None
    high: float | None = None

    def figures(self) -> dict[str, Any]:
        """The figures that exist, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class FrozenSet(BaseModel):
    sha256: str


class Frozen(BaseModel):
    """The manifest of an evaluation set."""

    classes: list[str]
    sets: dict[str, FrozenSet]


def freeze(workspace: Workspace, folder: Path) -> None:
    """Copy the test sets of a run's data to a folder, unless the folder exists."""
    if folder.exists():
        return
    manifest = read_manifest(workspace.data)
    kept = {
        name: {"sha256": entry.sha256, "count": entry.count}
        for name, entry in manifest.sets.items()
        if name == "test" or name.startswith("ood/")
    }
    with atomic_folder(folder) as temporary:
        for name in kept:
            target = data_file(name, temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(workspace.images(name), target)
        write_json(temporary / ABOUT, {"classes": manifest.classes, "sets": kept})


def frozen(folder: Path) -> Frozen:
    """Read the manifest of an evaluation set, and compare the files with it.

    Raises:
        InputError: the set is damaged, has been changed, or lacks ID or OOD images.
    """
    path = folder / ABOUT
    manifest = validated(Frozen, read_json(path, "retrain"), str(path), "evaluation")
    for name, entry in manifest.sets.items():
        file = data_file(name, folder)
        if not file.is_file() or digest(file) != entry.sha256:
            raise InputError(f"{file} is missing or not what was frozen.", "evaluation")
    if "test" not in manifest.sets or len(manifest.sets) < 2:
        raise InputError(f"{folder} does not hold ID images and an OOD set.", "evaluation")
    return manifest


def frozen_digest(folder: Path) -> str:
    """SHA-256 of an evaluation set, once its files are known to be undamaged; see `frozen`."""
    frozen(folder)
    return digest(folder / ABOUT)


def check_unseen(workspace: Workspace, folder: Path) -> None:
    """Refuse to judge a challenger on images that it was made from.

    Args:
        workspace: the run that made the challenger.
        folder: the evaluation set.

    Raises:
        InputError: an image of the evaluation set is also a training or validation image.
    """

    def images(path: Path) -> set[bytes]:
        encoded = imagesets.read_encoded(path).encoded
        return {hashlib.sha256(each.as_py()).digest() for each in encoded}

    judged = images(data_file("test", folder))
    for split in ("train", "validation"):
        if seen := len(judged & images(workspace.images(split))):
            raise InputError(
                f"{seen} images of {folder} are also in {workspace.images(split)}, so the "
                "challenger has seen what it is judged on.",
                "unseen",
            )


@torch.no_grad()
def judged(detector: SavedDetector, folder: Path, name: str) -> tuple[Tensor, float]:
    """Outlier scores (N,) of the images of one set, and the accuracy in percent."""
    stated = detector.backbone.preprocessing
    encoded = imagesets.read_encoded(data_file(name, folder))
    scores, right = [], 0
    for start in range(0, len(encoded.labels), BATCH):
        rows = encoded.rows[start : start + BATCH]
        found = detector.predict(imagesets.unit(encoded.decode(rows, stated.mode, stated.size)))
        scores.append(torch.from_numpy(found.score))
        right += int((found.label == encoded.labels[start : start + BATCH]).sum())
    together = torch.cat(scores)
    if together.isnan().any():
        raise InputError(f"The detector scores images of {data_file(name, folder)} as NaN.")
    return together, 100 * right / len(together)


def compare(
    challenger: SavedDetector,
    champion: SavedDetector | None,
    folder: Path,
    max_accuracy_drop: float = 0.0,
    resamples: int = 1000,
    seed: int = 0,
) -> Verdict:
    """Compare a challenger with the champion on an evaluation set.

    Both score the same images, and share each bootstrap resample (a paired comparison). Without a
    champion, the challenger is promoted.

    Args:
        challenger: the detector that may replace the champion.
        champion: the detector in use, if any.
        folder: the evaluation set.
        max_accuracy_drop: percentage points of ID accuracy that a better challenger may lose.
        resamples: number of bootstrap resamples.
        seed: of the resamples.

    Raises:
        InputError: the set is damaged, or its classes are not those of a detector.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.
    """
    manifest = frozen(folder)
    outside = [name for name in manifest.sets if name != "test"]
    rows, accuracies = [], []
    for detector in (challenger, champion):
        if detector is None:
            continue
        if list(detector.backbone.classes) != manifest.classes:
            raise InputError(
                f"The classes of {folder} are not those of the detector {detector.digest[:12]}.",
                "evaluation",
            )
        inside, accuracy = judged(detector, folder, "test")
        rows.append((inside, [judged(detector, folder, name)[0] for name in outside]))
        accuracies.append(accuracy)
    sizes = [len(scores) for scores in rows[0][1]]
    known = torch.stack([inside for inside, _ in rows])
    others = torch.stack([torch.cat(sets) for _, sets in rows])
    values = fpr95_auroc(known, others, sizes)[0].mean(dim=1).tolist()
    if champion is None:
        return Verdict(True, values[0], accuracies[0])
    drawn = bootstrap_mean_fpr95(known, others, sizes, resamples, seed)
    low, high = interval(np.asarray(drawn[1] - drawn[0]))
    kept = accuracies[0] >= accuracies[1] - max_accuracy_drop
    return Verdict(low > 0 and kept, values[0], accuracies[0], values[1], accuracies[1], low, high)
