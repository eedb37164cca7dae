"""Trained classifiers: their encoder and linear head, weights, training, cached features.

The names below are imported on first use, since torch takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opnp.backbones.backbone import Backbone, from_spec, load_backbone, save_backbone
    from opnp.data.preprocessing import Preprocessing

__all__ = ["Backbone", "Preprocessing", "from_spec", "load_backbone", "save_backbone"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "opnp.data.preprocessing" if name == "Preprocessing" else "opnp.backbones.backbone"
    return getattr(import_module(home), name)
