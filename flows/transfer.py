"""What a run and its workers exchange through the storage; nothing where the run has none."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.runtime.storage import Storage
from opnp.workspace import Workspace

__all__ = ["bring", "check", "compute", "put", "put_images"]


def check(parameters: Parameters) -> None:
    """Refuse a storage that cannot be written to or read from, before any work.

    Raises:
        InputError: the bucket is missing, credentials do not suffice, or nothing answers.
    """
    if url := parameters.engine.storage:
        Storage(url).check()


def put(
    workspace: Workspace, parameters: Parameters, needed: Sequence[Sequence[Path]]
) -> list[dict[str, str]]:
    """Put the files that workers need for each part into the storage, every file once.

    Returns:
        For each part the digests under which workers find its files, by their paths in the
        workspace.
    """
    url = parameters.engine.storage
    if not url:
        return [{} for _ in needed]
    every = dict.fromkeys(path for paths in needed for path in paths)
    digests = {path: Storage(url).put(path) for path in every}
    return [{workspace.relative(path): digests[path] for path in paths} for paths in needed]


def put_images(workspace: Workspace, parameters: Parameters) -> None:
    """Put the images into the storage; workers read the rows that they need."""
    if url := parameters.engine.storage:
        storage = Storage(url)
        for name, entry in Run(workspace, parameters).manifest.sets.items():
            storage.put(workspace.images(name), entry.sha256)


def compute(
    stage: Any,
    workspace: Workspace,
    parameters: Parameters,
    part: Any,
    inputs: Mapping[str, str],
) -> tuple[bool, str]:
    """Compute a part of a stage: in the workspace, or in a folder that shares the storage with it.

    Args:
        stage: the stage's module, see `opnp.pipeline.stages`.
        workspace: of the run.
        parameters: of the run.
        part: of the stage's plan.
        inputs: what `put` has put for this part.

    Returns:
        Whether the part was computed, and the digest of its file in the storage, if there is one.
    """
    if not (url := parameters.engine.storage):
        return stage.compute(workspace, parameters, part), ""
    return Storage(url).compute(
        inputs,
        workspace.relative(stage.made(workspace, part)),
        lambda folder: stage.origin(Workspace(folder), parameters, part),
        lambda folder: stage.compute(Workspace(folder), parameters, part),
    )


def bring(
    parameters: Parameters, paths: Sequence[Path], parts: Iterable[tuple[bool, str]]
) -> Iterator[bool]:
    """Bring the files that workers have made to their places.

    Yields:
        For each file, whether it was computed.
    """
    url = parameters.engine.storage
    for path, (computed, sha256) in zip(paths, parts, strict=True):
        if url:
            Storage(url).get(sha256, path)
        yield computed
