"""Sensitivity: sums over every training shard, merged in shard order."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opnp.backbones import shards
from opnp.errors import InputError
from opnp.pipeline.code import code_digest
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.pipeline.results.reading import reading
from opnp.pipeline.results.sensitivity import NAMES, read_sums
from opnp.pruning import energy
from opnp.pruning import sensitivity as formulas
from opnp.pruning.clipping import clip_thresholds
from opnp.pruning.sensitivity import (
    Sensitivity,
    SensitivitySums,
    added,
    of_halves,
    sums_of_halves,
)
from opnp.runtime import devices, tensors
from opnp.runtime.files import digest, remove_others, write_json
from opnp.runtime.progress import track
from opnp.workspace import Workspace

logger = logging.getLogger(__name__)


def run(workspace: Workspace, parameters: Parameters) -> list[Sensitivity]:
    """Measure the sensitivities of the head over all training features, shard by shard."""
    planned = plan(workspace, parameters)
    for name in track(planned, "sensitivity (shards)", len(planned)):
        compute(workspace, parameters, name)
    return finish(workspace, planned)


def plan(workspace: Workspace, parameters: Parameters) -> list[str]:
    """The names of the feature shards of the training split, in order.

    The thresholds to clip features at are written first, since every shard is summed with them.

    Raises:
        InputError: shards are missing, damaged, or made from something else.
    """
    paths = Run(workspace, parameters).feature_shards("train")
    clips: dict[str, float] = {}
    if percentiles := [each for each in parameters.search.clip if each is not None]:
        with reading(workspace.shards("train"), "features"):
            thresholds = clip_thresholds(
                lambda: (shards.read_shard(path).features for path in paths), percentiles
            )
        clips = dict(zip(map(str, percentiles), thresholds, strict=True))
    write_json(workspace.clips, clips)
    return [path.stem for path in paths]


def needed(workspace: Workspace, name: str) -> list[Path]:
    """The files that a worker needs in its workspace to sum a shard."""
    return [workspace.backbone, workspace.clips, features_of(workspace, name)]


def made(workspace: Workspace, name: str) -> Path:
    """The file of a shard's sums."""
    return workspace.sums / f"{name}.safetensors"


def features_of(workspace: Workspace, name: str) -> Path:
    return workspace.shards("train") / f"{name}.arrow"


def origin(workspace: Workspace, parameters: Parameters, name: str) -> dict[str, Any]:
    """What the sums of a shard are made from."""
    path = features_of(workspace, name)
    with reading(path, "features"):
        shard = shards.read_metadata(path)
    return {
        "backbone": shard["backbone"],
        "rows": shard["rows"],
        "features": digest(path),
        "settings": Run(workspace, parameters).settings,
        "code": code_digest(energy, formulas),
    }


def compute(workspace: Workspace, parameters: Parameters, name: str) -> bool:
    """Sum the contributions of one shard on this worker's device.

    Rows in even and in odd places are summed apart, as two halves of the training samples.

    Returns:
        False if the sums were there already, whole.
    """
    file, source = made(workspace, name), origin(workspace, parameters, name)
    try:
        if file.exists() and read_sums(file)[1] == source:
            return False
    except InputError:
        logger.warning("%s is damaged and is made again", file)
    device = devices.device()
    head = Run(workspace, parameters).backbone_on(device).classifier.head
    path = features_of(workspace, name)
    with reading(path, "features"):
        h = shards.read_shard(path).features.to(device)
    points = [(each["threshold"], each["temperature"]) for each in source["settings"]]
    with devices.deterministic(threads=1):
        sums = sums_of_halves(h, head.weight, energy.bias_of(head), points)
    write_sums(file, sums, source)
    return True


def finish(workspace: Workspace, planned: Sequence[str]) -> list[Sensitivity]:
    """Add the sums of all shards, in shard order, and write them as the sums of the whole."""
    files = [made(workspace, name) for name in planned]
    total, metadata = read_sums(files[0])
    for file in files[1:]:
        total = added(total, read_sums(file)[0])
    kept = {key: metadata[key] for key in ("backbone", "settings")}
    write_sums(workspace.sensitivity, total, kept)
    remove_others(workspace.sensitivity.parent, {workspace.sensitivity, workspace.clips, *files})
    return of_halves(total)


def write_sums(path: Path, sums: Sequence[SensitivitySums], metadata: dict[str, Any]) -> None:
    """Write the sums over two halves at each setting: tensors SETTING/HALF/NAME."""
    named = {
        f"{place // 2}/{place % 2}/{name}": getattr(each, name)
        for place, each in enumerate(sums)
        for name in NAMES
    }
    tensors.save(path, named, {**metadata, "counts": [each.count for each in sums]})
