"""The images of a split as the backbone takes them: of the data, or proxies made of them."""

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opnp.data import imagesets, proxies
from opnp.data.preprocessing import Preprocessing
from opnp.pipeline.results.reading import reading
from opnp.runtime.storage import RemoteFile, Storage
from opnp.workspace import Workspace

if TYPE_CHECKING:
    from opnp.pipeline.results.run import Run

__all__ = ["open_images", "proxy_family"]


def proxy_family(split: str) -> str | None:
    """The family of a split of proxy outliers; None for a split of the data."""
    family = split.removeprefix("proxies/")
    return None if family == split else family


def open_images(
    run: "Run", split: str, start: int, stop: int
) -> tuple[Callable[[range], Tensor], NDArray[np.int64]]:
    """Open rows ``start`` to ``stop`` of a split.

    Returns:
        A function that gives the normalized images of some of these rows, float32 (N, C, H, W), and
        the labels of all of them, int64 (N,): −1 for images from outside the distribution.

    Raises:
        InputError: the file is missing or damaged, or holds fewer images.
        UnavailableError: the storage could not be reached.
    """
    workspace, storage = run.workspace, run.parameters.engine.storage
    preprocessing, family = run.backbone_stated.preprocessing, proxy_family(split)
    if family is not None:
        sha256 = run.manifest.sets["validation"].sha256
        with one_at_a_time:
            validation = validation_images(workspace, storage, sha256, preprocessing)

        def made(rows: range) -> Tensor:
            images = proxies.make(family, validation, rows, run.parameters.seed)
            return preprocessing.normalize(torch.from_numpy(images))

        return made, np.full(stop - start, -1, np.int64)
    sha256 = run.manifest.sets[split].sha256
    with reading(workspace.images(split), "fetch"):
        file = encoded_file(workspace, storage, split, sha256)
        found = imagesets.read_encoded(file, start, stop)

    def decoded(rows: range) -> Tensor:
        with reading(workspace.images(split), "fetch"):
            pixels = found.decode(rows, preprocessing.mode, preprocessing.size)
        return preprocessing.normalize(imagesets.unit(pixels))

    return decoded, found.labels


def encoded_file(
    workspace: Workspace, storage: str | None, split: str, sha256: str
) -> Path | RemoteFile:
    """The file of a split in the workspace, or else in the storage at a URL."""
    path = workspace.images(split)
    return path if storage is None or path.is_file() else Storage(storage).open(sha256)


one_at_a_time = threading.Lock()  # tasks that start together must not all decode all images


@lru_cache(maxsize=1)
def validation_images(
    workspace: Workspace, storage: str | None, sha256: str, preprocessing: Preprocessing
) -> NDArray[Any]:
    """All validation images in [0, 1], (N, C, H, W), which proxies are made of."""
    with reading(workspace.images("validation"), "fetch"):
        file = encoded_file(workspace, storage, "validation", sha256)
        pixels, _ = imagesets.read(file, preprocessing.mode, preprocessing.size)
    return imagesets.unit(pixels).numpy()
