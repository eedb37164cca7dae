"""The penultimate features that `features` has written; no image and no weight is read here."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from opnp.backbones import shards
from opnp.data.families import besides
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results.images import proxy_family
from opnp.pipeline.results.reading import reading

if TYPE_CHECKING:
    from opnp.pipeline.results.run import Run

__all__ = ["expected", "load", "outlier_splits", "reported_splits", "shard_paths"]


def expected(run: "Run", split: str) -> dict[str, str]:
    """What the shards of a split must say of themselves, wherever they are read."""
    settings, backbone = run.parameters.features, run.backbone_stated
    proxy = proxy_family(split) is not None
    return {
        "backbone": backbone.sha256,
        "images": run.manifest.sets["validation" if proxy else split].sha256,
        "dtype": settings.dtype,
        "precision": settings.precision,
        "compiled": str(settings.compile),
        **({"seed": str(run.parameters.seed)} if proxy else {}),
        "preprocessing": json.dumps(backbone.preprocessing.as_json()),
    }


def shard_paths(run: "Run", split: str) -> list[Path]:
    """The shards of a split, in order.

    Raises:
        InputError: shards are missing, damaged, or made from something else than the run has now.
    """
    folder = run.workspace.shards(split)
    with reading(folder, "features"):
        return shards.shard_paths(folder, expected(run, split))


def load(run: "Run", split: str) -> tuple[Tensor, Tensor]:
    """Features, float32 (N, L), and labels, int64 (N,), of a split.

    Raises:
        InputError: shards are missing, damaged, or made from something else than the run has now.
    """
    wanted = expected(run, split)
    folder = run.workspace.shards(split)
    with reading(folder, "features"):
        return shards.load(folder, wanted)


def outlier_splits(parameters: Parameters) -> dict[str, str]:
    """The splits by name that masks and hyperparameters are chosen on besides ID validation."""
    settings = parameters.search
    splits = {family: f"proxies/{family}" for family in settings.proxies}
    return splits | {name: f"outliers/{name}" for name in settings.outliers}


def reported_splits(parameters: Parameters) -> dict[str, str]:
    """The splits by name that the chosen mask is reported on, and which do not decide."""
    families = besides(parameters.search.reported, parameters.search.proxies)
    return {family: f"proxies/{family}" for family in families}
