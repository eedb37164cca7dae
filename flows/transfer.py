"""What a run and its workers tell each other through the storage; nothing where there is none."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opnp.data.imagesets import data_file, read_manifest
from opnp.pipeline.parameters import Parameters
from opnp.runtime.storage import Storage

__all__ = ["bring", "check", "compute", "put", "put_images"]


def check(parameters: Parameters) -> None:
    """Refuse a storage that cannot be written to or read from, before any work.

    Raises:
        InputError: the bucket is missing, credentials do not suffice, or nothing answers.
    """
    if url := parameters.engine.storage:
        Storage(url).check()


def put(parameters: Parameters, *paths: Path) -> dict[Path, str]:
    """Put what workers need into the storage; the digests under which they find it."""
    url = parameters.engine.storage
    return {path: Storage(url).put(path) for path in paths} if url else {}


def put_images(parameters: Parameters) -> None:
    """Put the images into the storage, of which workers read the rows that they need."""
    if url := parameters.engine.storage:
        storage = Storage(url)
        for name, entry in read_manifest().sets.items():
            storage.put(data_file(name), entry.sha256)


def compute(
    parameters: Parameters,
    inputs: Mapping[Path, str],
    path: Path,
    origin: Callable[[], dict[str, Any]],
    function: Callable[[], bool],
) -> tuple[bool, str]:
    """Compute a part of a stage, here or as `Storage.compute` does."""
    if url := parameters.engine.storage:
        return Storage(url).compute(inputs, path, origin, function)
    return function(), ""


def bring(
    parameters: Parameters, paths: Sequence[Path], parts: Iterable[tuple[bool, str]]
) -> Iterator[bool]:
    """Bring what workers made to its place here; for each file, whether it was computed."""
    url = parameters.engine.storage
    for path, (computed, sha256) in zip(paths, parts, strict=True):
        if url:
            Storage(url).get(sha256, path)
        yield computed
