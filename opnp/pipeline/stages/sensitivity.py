"""Sensitivity: sums over every training shard, merged in shard order."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from opnp import workspace
from opnp.backbones import shards
from opnp.errors import InputError
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.stages import features
from opnp.pruning import energy
from opnp.pruning import sensitivity as sensitivity_module
from opnp.pruning.clipping import clip_thresholds
from opnp.pruning.sensitivity import Sensitivity, SensitivitySums, halved
from opnp.runtime import devices, tensors
from opnp.runtime.files import digest, read_json, remove_others, write_json
from opnp.runtime.progress import track

SENSITIVITIES = ("weights", "neurons_mean", "neurons_gradient", "neurons_taylor")


def run(parameters: Parameters) -> list[Sensitivity]:
    """Measure the sensitivities of the head over all training features, shard by shard."""
    paths = plan(parameters)
    for path in track(paths, "sensitivity (shards)", len(paths)):
        compute(parameters, path)
    return merge(paths)


def plan(parameters: Parameters) -> list[Path]:
    """The feature shards of the training split, in order; where to clip is written down first.

    Raises:
        InputError: they are missing, damaged, of something else, or not the whole split.
    """
    expected = features.expected_metadata(parameters, "train")
    paths = shards.shard_paths("train", expected)
    clips: dict[str, float] = {}
    if percentiles := [each for each in parameters.search.clip if each is not None]:
        thresholds = clip_thresholds(
            lambda: (shards.read_shard(path)[0] for path in paths), percentiles
        )
        clips = dict(zip(map(str, percentiles), thresholds, strict=True))
        if len(set(clips.values())) < len(clips):
            raise InputError(
                "search.clip: at two of its percentiles the training activations are the same "
                f"({', '.join(f'{name} %: {at:g}' for name, at in clips.items())}): keep one."
            )
    write_json(workspace.CLIPS, clips)
    return paths


def settings_of(parameters: Parameters) -> list[dict[str, Any]]:
    """Every clip (percentile and threshold) and temperature that the search tries, in its order."""
    clips = read_json(workspace.CLIPS, "stage:sensitivity")
    search = parameters.search
    if set(clips) != {str(each) for each in search.clip if each is not None}:
        raise InputError(f"{workspace.CLIPS} is of another search.clip.", "stage:sensitivity")
    return [
        {"clip": clip, "threshold": clips.get(str(clip)), "temperature": temperature}
        for clip, temperature in product(search.clip, search.temperature)
    ]


def sums_file(path: Path) -> Path:
    return workspace.SENSITIVITY.parent / "shards" / f"{path.stem}.safetensors"


def compute(parameters: Parameters, path: Path) -> bool:
    """Sum one shard's contributions; say False if that was already done and the file is whole.

    Rows in even and in odd places are summed apart: two halves of the training samples.
    """
    h, _, shard = shards.read_shard(path)
    metadata, file = origin_of(parameters, path, shard), sums_file(path)
    try:
        if file.exists() and read_sums(file)[1] == metadata:
            return False
    except InputError:
        print(f"sensitivity: {file} is damaged, and made again", flush=True)
    device = devices.device()
    model, _ = features.backbone_on(metadata["backbone"], device, parameters.train.backbone)
    weight, bias = model.head.weight, energy.bias_of(model.head)
    halves = (h[::2].to(device), h[1::2].to(device))
    with devices.deterministic(threads=1):
        sums = [
            SensitivitySums.of(half, weight, bias, setting["temperature"], setting["threshold"])
            for setting in metadata["settings"]
            for half in halves
        ]
    write_sums(file, sums, metadata)
    return True


def origin_of(parameters: Parameters, path: Path, shard: dict[str, str]) -> dict[str, Any]:
    """What the sums of a shard, whose metadata are ``shard``, are made from."""
    return {
        "backbone": shard["backbone"],
        "rows": shard["rows"],
        "features": digest(path),
        "settings": settings_of(parameters),
        "code": features.code_digest(energy, sensitivity_module),
    }


def write_sums(path: Path, sums: Sequence[SensitivitySums], metadata: dict[str, Any]) -> None:
    """Write the sums of two halves for each setting: tensors SETTING/HALF/NAME."""
    named = {
        f"{place // 2}/{place % 2}/{name}": getattr(each, name)
        for place, each in enumerate(sums)
        for name in SENSITIVITIES
    }
    tensors.save(path, named, {**metadata, "counts": [each.count for each in sums]})


def read_sums(path: Path) -> tuple[list[SensitivitySums], dict[str, Any]]:
    """The sums of either half for each setting, and what they were made from.

    Raises:
        InputError: the file is missing, damaged or holds something else.
    """
    again = "stage:sensitivity"
    found, metadata = tensors.load(path, again)
    try:
        settings, counts = metadata["settings"], metadata.pop("counts")
        sums = [
            SensitivitySums(
                **{name: found[f"{place // 2}/{place % 2}/{name}"] for name in SENSITIVITIES},
                count=count,
                temperature=settings[place // 2]["temperature"],
                clip=settings[place // 2]["threshold"],
            )
            for place, count in enumerate(counts)
        ]
    except (KeyError, IndexError, TypeError):
        sums = []
    if len(sums) * len(SENSITIVITIES) != len(found) or not sums:
        raise InputError(f"{path} does not hold sensitivities and their counts.", again)
    return sums, metadata


def merge(planned: list[Path]) -> list[Sensitivity]:
    """Add the sums of all shards, in shard order, and write them as the sums of the whole."""
    total, metadata = read_sums(sums_file(planned[0]))
    for path in planned[1:]:
        total = [a + b for a, b in zip(total, read_sums(sums_file(path))[0], strict=True)]
    kept = {key: metadata[key] for key in ("backbone", "settings")}
    write_sums(workspace.SENSITIVITY, total, kept)
    remove_others(
        workspace.SENSITIVITY.parent,
        {workspace.SENSITIVITY, workspace.CLIPS, *(sums_file(path) for path in planned)},
    )
    return halves_together(total)


def halves_together(sums: list[SensitivitySums]) -> list[Sensitivity]:
    """The sensitivity at each setting, of the sums of either half at each."""
    return [halved(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]


def read(parameters: Parameters) -> list[Sensitivity]:
    """The merged sensitivities at every clip and temperature, in the order of `settings_of`.

    Raises:
        InputError: missing, damaged, of another backbone or of other clips and temperatures.
    """
    again = "stage:sensitivity"
    total, metadata = read_sums(workspace.SENSITIVITY)
    if metadata["backbone"] != digest(workspace.BACKBONE):
        raise InputError(f"{workspace.SENSITIVITY} is of another backbone.", again)
    if metadata["settings"] != settings_of(parameters):
        raise InputError(
            f"{workspace.SENSITIVITY} is of another search.clip or search.temperature.", again
        )
    return halves_together(total)
