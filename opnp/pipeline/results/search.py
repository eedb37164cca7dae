"""The trials, the choices and the masks that `search` has written."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from opnp.pipeline.results.reading import read_table, reading, select, stale
from opnp.pruning.masks import PruningMask
from opnp.pruning.methods import METHODS
from opnp.runtime import tensors
from opnp.runtime.files import read_json

if TYPE_CHECKING:
    from opnp.pipeline.results.run import Run

__all__ = ["CANDIDATE", "read", "read_mask", "read_trials"]

CANDIDATE = ("weights_low", "weights_high", "neurons_low", "neurons_high", "neuron_sensitivity")
SETTING = ("clip", "threshold", "temperature")
FIGURES = ("fpr95", "auroc", "accuracy", "pruned")
CHOICE = ("interval", "within_noise", "instability")
COUNTS = ("candidates", "validation_samples", "training_samples")


def read(run: "Run") -> dict[str, Any]:
    """What the search has chosen for each method, and among what.

    Raises:
        InputError: the file is missing or damaged, or made with another backbone or other
            parameters.
    """
    path = run.workspace.search
    with reading(path, "search"):
        found: dict[str, Any] = read_json(path)
        chosen = select(found, METHODS, (*CANDIDATE, *SETTING, *FIGURES, *CHOICE))
        for each in chosen.values():
            select(each["interval"], ("low", "high"))
        select(found, ("unpruned", "backbone", "parameters", "families", "doubts", *COUNTS))
        select(found, ("proxies", "outliers"))
        select(found["unpruned"], (*CANDIDATE, *SETTING, *FIGURES))
    if found["backbone"] != run.backbone_stated.sha256:
        raise stale(path, "another backbone", "search")
    if found["parameters"] != run.parameters.search.model_dump():
        raise stale(path, "other parameters of the search", "search")
    return found


def read_trials(run: "Run") -> pa.Table:
    """Every candidate and its figures; the first is the unpruned head."""
    columns = (*CANDIDATE, *SETTING, "fpr95", "accuracy")
    return read_table(run.workspace.trials, "search", columns)


def read_mask(run: "Run") -> PruningMask:
    """The mask of OPNP.

    Raises:
        InputError: the file is missing or damaged, or made with another backbone.
    """
    path = run.workspace.mask
    with reading(path, "search"):
        mask, stated = PruningMask.load(path), tensors.metadata(path)
        if stated["backbone"] != run.backbone_stated.sha256:
            raise stale(path, "another backbone", "search")
    return mask
