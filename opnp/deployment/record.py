"""The record of how a detector was made, the same for a fit and for a run of the pipeline."""

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

__all__ = ["record"]

LIBRARIES = ("opnp", "torch", "torchvision", "numpy", "pillow")


def record(
    by: str,
    search: Mapping[str, Any],
    choice: str,
    *,
    images: int,
    max_accuracy_drop: float | None,
    train: tuple[str, int],
    validation: Mapping[str, Any],
    unreadable: Sequence[str],
    seed: int,
    **details: Any,
) -> dict[str, Any]:
    """Describe how a detector was made, as JSON has it.

    Args:
        by: what made it.
        search: `opnp.pruning.search.search_record`, with the names of the ``proxies`` and of the
            real ``outliers`` that it searched on.
        choice: whose mask the detector has, a choice in ``search``.
        images: number of ID validation images that the mask was chosen on.
        max_accuracy_drop: percentage points of accuracy that the pruned head was allowed to lose;
            None for any.
        train: source and number of the images that the sensitivity was measured on.
        validation: source, number and labels of the images that the threshold was set on.
        unreadable: the images that could not be read.
        seed: seed of the proxies and the bootstraps.
        details: what else is known.
    """
    keys = ("unpruned", "candidates", "proxies", "outliers", "families", "doubts")
    shared = {key: search[key] for key in keys}
    allowed = {"images": images, "max_accuracy_drop": max_accuracy_drop}
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {library: version(library) for library in LIBRARIES},
        "by": by,
        "search": {**search[choice], **shared, **allowed},
        "train": {"source": train[0], "images": train[1]},
        "validation": dict(validation),
        "unreadable": list(unreadable),
        "seed": seed,
        **details,
    }
