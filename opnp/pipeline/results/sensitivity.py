"""The sensitivities of the head that `sensitivity` has written."""

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opnp.errors import InputError
from opnp.pipeline.results.reading import reading, stale
from opnp.pruning.clipping import by_threshold
from opnp.pruning.sensitivity import Sensitivity, SensitivitySums, of_halves
from opnp.runtime import tensors
from opnp.runtime.files import read_json

if TYPE_CHECKING:
    from opnp.pipeline.results.run import Run

__all__ = ["NAMES", "read", "read_settings", "read_sums"]

NAMES = ("weights", "neurons_mean", "neurons_gradient", "neurons_taylor")
"""The tensors of each half of the training samples at each setting."""


def read_settings(run: "Run") -> list[dict[str, Any]]:
    """Every clip (percentile and threshold) and temperature that the search tries, in its order.

    Raises:
        InputError: the thresholds are missing, or are those of other percentiles.
    """
    path, search = run.workspace.clips, run.parameters.search
    with reading(path, "sensitivity"):
        thresholds = dict(read_json(path))
    wanted = [each for each in search.clip if each is not None]
    if set(thresholds) != set(map(str, wanted)):
        raise stale(path, "other percentiles to clip at", "sensitivity")
    clips = by_threshold(wanted, [thresholds[str(each)] for each in wanted])
    return [
        {"clip": clip, "threshold": threshold, "temperature": temperature}
        for (threshold, clip), temperature in product(clips.items(), search.temperature)
    ]


def read_sums(path: Path) -> tuple[list[SensitivitySums], dict[str, Any]]:
    """The sums over either half of the samples at each setting, and what they were made from.

    Raises:
        InputError: the file is missing or damaged, or holds something else.
    """
    with reading(path, "sensitivity"):
        found, metadata = tensors.load(path)
        try:
            settings, counts = metadata["settings"], metadata.pop("counts")
            sums = [
                SensitivitySums(
                    **{name: found[f"{place // 2}/{place % 2}/{name}"] for name in NAMES},
                    count=count,
                    temperature=settings[place // 2]["temperature"],
                    clip=settings[place // 2]["threshold"],
                )
                for place, count in enumerate(counts)
            ]
        except (KeyError, IndexError, TypeError):
            sums = []
        if len(sums) * len(NAMES) != len(found) or not sums:
            raise InputError(f"{path} does not hold sensitivities and their counts.")
    return sums, metadata


def read(run: "Run") -> list[Sensitivity]:
    """The sensitivity at every clip and temperature, in the order of `read_settings`.

    Raises:
        InputError: the file is missing or damaged, or made with another backbone, or with other
            clips or temperatures.
    """
    path = run.workspace.sensitivity
    total, metadata = read_sums(path)
    with reading(path, "sensitivity"):
        backbone, settings = metadata["backbone"], metadata["settings"]
    if backbone != run.backbone_stated.sha256:
        raise stale(path, "another backbone", "sensitivity")
    if settings != run.settings:
        raise stale(path, "other clips or temperatures", "sensitivity")
    return of_halves(total)
