"""What a fitted detector knows, as tensors and JSON, so that a file can hold it.

Detectors differ in what fitting leaves behind: class means, a bank of features, thresholds. All of
it is found among a detector's attributes, as tensors and numbers, alone or in lists, tuples and
dictionaries. What else a detector has (the head, functions) its maker gives it anew, so that a file
never chooses the code that runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from math import isfinite
from typing import Any

import numpy as np
import torch
from pytorch_ood.api import Detector
from torch import Tensor

from opnp.detectors import base
from opnp.detectors.base import TrainedModel
from opnp.errors import InputError, UnavailableError

__all__ = ["State", "restored", "state_of"]

OURS = "opnp.detectors."  # the package whose dataclasses a state may hold

# How a value that JSON lacks is written: an object with one of these keys alone, or with `CLASS`.
TENSOR, ARRAY, TUPLE, DICT, FLOAT, CLASS = "tensor", "array", "tuple", "dict", "float", "class"


@dataclass(frozen=True, eq=False)
class State:
    """What a fitted detector knows.

    Attributes:
        tensors: by the place where they belong, such as ``means`` or ``scale.0``.
        values: the attributes as JSON, which names the tensors.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Unsaved(TypeError):
    """A value of a kind that a state does not hold."""


def state_of(detector: Detector, key: str, model: TrainedModel) -> State:
    """Take what a fitted detector knows.

    Args:
        detector: fitted, or one that needs no fit.
        key: its name, by which it is made.
        model: that it was made for.

    Raises:
        UnavailableError: it keeps something that is neither tensors nor numbers, or scores depend
            on something else than its attributes.

    >>> from torch import nn
    >>> model = TrainedModel(nn.Linear(4, 2))
    >>> detector = base.make("nci", model)
    >>> _ = detector.fit_features(torch.rand(9, 4), torch.arange(9) % 2)
    >>> state_of(detector, "nci", model).values
    {'alpha': 0.0, 'global_mean': {'tensor': 'global_mean'}}
    """
    fresh = vars(base.make(key, model))
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in vars(detector).items():
        # Left out is what the maker gives anyway: spaces of hyperparameters, the head's weights.
        if name in fresh and same(value, fresh[name]):
            continue
        try:
            values[name] = written(value, name, tensors)
        except Unsaved as error:
            if type(fresh.get(name)) is not type(value):
                raise UnavailableError(
                    f"{key} cannot be saved: what it has fitted ({name}) is {error}."
                ) from None
    state = State(tensors, values)
    probe = torch.rand(8, model.head.in_features, generator=torch.Generator().manual_seed(0))
    probe = probe.to(model.head.weight.device, model.head.weight.dtype)
    own = base.predict(detector, model, probe)
    try:
        same_scores = torch.equal(base.predict(restored(key, model, state), model, probe), own)
    except Exception:  # what is missing may end in an error of any kind
        same_scores = False
    if not same_scores:
        raise UnavailableError(
            f"{key} cannot be saved: made again from its tensors and numbers, it scores otherwise."
        )
    return state


def restored(key: str, model: TrainedModel, state: State) -> Detector:
    """Make a detector that knows what ``state`` holds; it scores as the one it was taken of.

    Args:
        key: name of the detector.
        model: that the detector is for.
        state: from `state_of`.

    Raises:
        InputError: there is no such detector, or the state is damaged.
    """
    made, device = base.make(key, model), model.head.weight.device
    for name, value in state.values.items():
        try:
            setattr(made, name, read(value, state.tensors, device))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"The state of the detector {key} is damaged at {name} ({error!r})."
            ) from None
    return made


def written(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors are put into ``tensors``."""
    if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
        tensors[place] = value.detach().cpu().clone().contiguous()
        return {TENSOR: place}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        tensors[place] = torch.from_numpy(np.ascontiguousarray(value).copy())
        return {ARRAY: place}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not isfinite(value):
        return {FLOAT: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        found = [written(each, f"{place}.{at}", tensors) for at, each in enumerate(value)]
        return found if isinstance(value, list) else {TUPLE: found}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {DICT: {name: written(v, f"{place}.{name}", tensors) for name, v in value.items()}}
    if is_dataclass(value) and type(value).__module__.startswith(OURS):
        parts = {
            each.name: written(getattr(value, each.name), f"{place}.{each.name}", tensors)
            for each in fields(value)
        }
        return {CLASS: f"{type(value).__module__}:{type(value).__name__}", DICT: parts}
    raise Unsaved(f"of the type {type(value).__name__}")


def read(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The value that `written` wrote."""
    if isinstance(value, list):
        return [read(each, tensors, device) for each in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]].to(device)
    if ARRAY in value:
        return tensors[value[ARRAY]].numpy()
    if FLOAT in value:
        return float(value[FLOAT])
    if TUPLE in value:
        return tuple(read(each, tensors, device) for each in value[TUPLE])
    parts = {name: read(each, tensors, device) for name, each in value[DICT].items()}
    if CLASS not in value:
        return parts
    module, _, name = value[CLASS].partition(":")
    if not module.startswith(OURS):
        raise ValueError(f"{value[CLASS]} is not of {OURS}")
    found = getattr(import_module(module), name)
    if not is_dataclass(found) or not isinstance(found, type):
        raise ValueError(f"{value[CLASS]} is not a dataclass")
    return found(**parts)


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values of an attribute are known to be equal."""
    if isinstance(ours, Tensor):
        return isinstance(theirs, Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, np.ndarray) or type(ours) is not type(theirs):
        return False
    try:
        return bool(ours == theirs)
    except (RuntimeError, ValueError):  # containers of tensors
        return False
