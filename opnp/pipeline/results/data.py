"""The image sets that `fetch` has written."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opnp.data import imagesets
from opnp.data.imagesets import Manifest
from opnp.data.parquet import class_names
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results.reading import reading, stale
from opnp.workspace import Workspace

__all__ = [
    "check_preprocessing",
    "data_parameters",
    "read_classes",
    "read_manifest",
    "read_pixels",
]


def data_parameters(parameters: Parameters) -> dict[str, Any]:
    """The parameters that decide what the images are, as the manifest records them."""
    outliers = parameters.search.outliers
    images = parameters.data.model_dump(exclude={"max_unreadable", "missing"})
    for key in ("resize", "interpolation"):  # absent from manifests where they have their defaults
        if images[key] == type(parameters.data).model_fields[key].default:
            del images[key]
    return images | ({"outliers": outliers} if outliers else {})


def read_manifest(workspace: Workspace, parameters: Parameters) -> Manifest:
    """The manifest of the data, if they were fetched with these parameters.

    Raises:
        InputError: the manifest is missing or damaged, a file that it names is missing, or the data
            were fetched with other parameters.
    """
    with reading(workspace.manifest, "fetch"):
        elsewhere = parameters.engine.storage is not None
        manifest = imagesets.read_manifest(workspace.data, elsewhere)
    if manifest.parameters != data_parameters(parameters):
        raise stale(workspace.data, "other data parameters or other outlier sets", "fetch")
    return manifest


def read_classes(workspace: Workspace) -> list[str]:
    """Names of the classes, in the order of their labels."""
    path = workspace.images("train")
    with reading(path, "fetch"):
        return class_names(path)


def read_pixels(
    workspace: Workspace,
    split: str,
    mode: str,
    size: int,
    start: int = 0,
    stop: int | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of a split from row ``start`` to ``stop``, uint8 (N, H, W, C), and labels, (N,).

    Raises:
        InputError: the file is missing or damaged, or holds fewer images.
    """
    path = workspace.images(split)
    with reading(path, "fetch"):
        return imagesets.read(path, mode, size, start, stop)


def check_preprocessing(parameters: Parameters, wanted: Preprocessing) -> None:
    """Refuse a backbone whose images are prepared in another way than those of the data.

    Raises:
        InputError: they are.
    """
    data = parameters.data
    both = {
        "image_size": (wanted.size, data.image_size),
        "mode": (wanted.mode, data.mode),
        "resize": (wanted.resize, data.resize),
        "interpolation": (wanted.interpolation, data.interpolation),
    }
    others = {key: theirs for key, (theirs, ours) in both.items() if theirs != ours}
    if others:
        needed = " and ".join(f"{key} {json.dumps(value)}" for key, value in others.items())
        raise InputError(
            f"The backbone {parameters.train.backbone} needs images prepared with {needed}.",
            f"data.{next(iter(others))}",
        )
