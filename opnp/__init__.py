"""OOD detection for trained image classifiers by optimal parameter and neuron pruning.

The names below are imported on first use, so that a command that needs only one of them does not
wait for the libraries behind the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opnp.deployment.detector import SavedDetector, load
    from opnp.detectors.opnp import OPNP
    from opnp.errors import InputError
    from opnp.pruning.candidates import Grid
    from opnp.pruning.masks import PruningMask
    from opnp.pruning.search import search_masks
    from opnp.pruning.sensitivity import neuron_sensitivity, parameter_sensitivity

__all__ = [
    "OPNP",
    "Grid",
    "InputError",
    "PruningMask",
    "SavedDetector",
    "load",
    "neuron_sensitivity",
    "parameter_sensitivity",
    "search_masks",
]

__version__ = "0.1.0"

HOMES = {
    "OPNP": "detectors.opnp",
    "Grid": "pruning.candidates",
    "InputError": "errors",
    "PruningMask": "pruning.masks",
    "SavedDetector": "deployment.detector",
    "load": "deployment.detector",
    "neuron_sensitivity": "pruning.sensitivity",
    "parameter_sensitivity": "pruning.sensitivity",
    "search_masks": "pruning.search",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'opnp' has no attribute {name!r}")
    return getattr(import_module(f"opnp.{HOMES[name]}"), name)
