"""Champion against challenger, on an evaluation set that stays as it is.

The set is a folder of what a run's test sets were when it was frozen: ``manifest.json``,
``test.parquet`` and ``ood/NAME.parquet``, as in `data/`.
"""

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opnp.data import imagesets
from opnp.data.imagesets import data_file, read_manifest
from opnp.deployment.detector import SavedDetector
from opnp.errors import InputError
from opnp.metrics.bootstrap import bootstrap_mean_fpr95, interval
from opnp.metrics.separation import fpr95_auroc
from opnp.runtime.files import atomic_folder, digest, read_json, write_json
from opnp.workspace import Workspace

__all__ = ["Verdict", "check_unseen", "compare", "freeze", "frozen_digest"]

ABOUT = "manifest.json"
BATCH = 64


@dataclass(frozen=True)
class Verdict:
    """What a comparison came to; in percent, FPR95 as a mean over the OOD sets.

    Attributes:
        promoted: whether the challenger is better beyond the interval and as accurate.
        fpr95: of the challenger.
        accuracy: of the challenger, on ID images.
        champion_fpr95: None where there is no champion.
        champion_accuracy: likewise.
        low: of the 95 % bootstrap interval of how much lower the challenger's FPR95 is.
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
        """What there is of the figures, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def freeze(workspace: Workspace, folder: Path) -> None:
    """Copy the test sets of a run's data to the folder, unless it is there already."""
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


def frozen(folder: Path) -> dict[str, Any]:
    """What a frozen set says of itself, compared with its files.

    Raises:
        InputError: it is damaged, or has been changed.
    """
    about = read_json(folder / ABOUT, "retrain")
    try:
        sets = {name: entry["sha256"] for name, entry in about["sets"].items()}
        classes = list(about["classes"])
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{folder / ABOUT} describes no evaluation set: restore it.") from None
    for name, expected in sets.items():
        path = data_file(name, folder)
        if not path.is_file() or digest(path) != expected:
            raise InputError(f"{path} is missing or not what was frozen.", "frozen")
    if "test" not in sets or len(sets) < 2:
        raise InputError(f"{folder} needs ID images and an OOD set to compare detectors on.")
    return {"classes": classes, "sets": list(sets)}


def frozen_digest(folder: Path) -> str:
    """SHA-256 of a frozen set, whose files are as it says; see `frozen`."""
    frozen(folder)
    return digest(folder / ABOUT)


def check_unseen(workspace: Workspace, folder: Path) -> None:
    """Refuse a challenger that was made from images it is to be judged on.

    Raises:
        InputError: an image of the frozen set is among those of training or validation.
    """

    def images(path: Path) -> set[bytes]:
        encoded = imagesets.read_encoded(path).encoded
        return {hashlib.sha256(each.as_py()).digest() for each in encoded}

    judged = images(data_file("test", folder))
    for split in ("train", "validation"):
        if seen := len(judged & images(workspace.images(split))):
            raise InputError(
                f"{seen} images of {folder} are in {workspace.images(split)}, so the challenger "
                "has seen what it is judged on.",
                "unseen",
            )


@torch.no_grad()
def judged(detector: SavedDetector, folder: Path, name: str) -> tuple[Tensor, float]:
    """Outlier scores (N,) of one set, and the accuracy in percent of its labels."""
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
    """Judge a challenger on a frozen set; without a champion it wins.

    Both score the same images, and each bootstrap draw is of the same images for both (paired).

    Args:
        challenger: what may replace the champion.
        champion: what is in use.
        folder: the frozen set.
        max_accuracy_drop: points of ID accuracy that a better challenger may lose.
        resamples: of the bootstrap.
        seed: of its draws.

    Raises:
        InputError: the set is damaged, or of other classes than a detector's.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.
    """
    about = frozen(folder)
    outside = [name for name in about["sets"] if name != "test"]
    rows, accuracies = [], []
    for detector in (challenger, champion):
        if detector is None:
            continue
        if list(detector.backbone.classes) != about["classes"]:
            raise InputError(
                f"{folder} has other classes than the detector {detector.digest[:12]}.",
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
