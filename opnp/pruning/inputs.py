"""What a caller hands over, as tensors: features and labels of torch, NumPy or plain lists."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from opnp.errors import InputError, first_line

__all__ = ["Numbers", "as_features", "as_head", "as_labels", "as_tensor"]

Numbers = Tensor | ArrayLike
"""A tensor, an array, or lists of numbers."""


def as_tensor(values: Numbers, what: str) -> Tensor:
    """Numbers as a tensor; a tensor stays as it is.

    Args:
        values: a tensor, an array, a data frame's values, or lists of numbers or of tensors.
        what: names them in errors, such as "Features".

    Raises:
        InputError: they are not numbers, or of different lengths.

    >>> as_tensor([[1.0, 2.0]], "Features")
    tensor([[1., 2.]], dtype=torch.float64)
    """
    if isinstance(values, Tensor):
        return values
    try:
        if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
            return torch.stack(list(values))
        array = np.ascontiguousarray(values) if np.ndim(values) else np.asarray(values)
        native = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
        return torch.from_numpy(native)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{what} must be a tensor, an array or lists of numbers, not "
            f"{type(values).__name__} ({first_line(error)})."
        ) from None


def as_head(features: Numbers, weight: Numbers, bias: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """Features, and the weight and the bias of a head, as tensors."""
    named = (("Features", features), ("The head's weight", weight), ("The head's bias", bias))
    found, w, b = (as_tensor(each, what).detach() for what, each in named)
    return found, w, b


def as_features(features: Numbers, weight: Tensor) -> Tensor:
    """Features as a head takes them.

    Args:
        features: penultimate features, shape (N, L), of any real type.
        weight: head weight, shape (K, L).

    Returns:
        Shape (N, L), with the weight's type and on its device.

    Raises:
        InputError: they are not real numbers, or their shape does not fit the head.
    """
    found = as_tensor(features, "Features")
    if found.is_complex() or found.dtype == torch.bool:
        raise InputError(f"Features must be real numbers, not {name_of(found)}.")
    if found.ndim != 2 or found.shape[1] != weight.shape[1]:
        raise InputError(
            f"Features must have shape (N, {weight.shape[1]}) to fit the head, not "
            f"{tuple(found.shape)}."
        )
    return found.to(weight.device, weight.dtype)


def as_labels(
    labels: Numbers, count: int, classes: int, device: torch.device | None = None
) -> Tensor:
    """Labels as classes.

    Args:
        labels: whole numbers of any type, shape (N,) or (N, 1); or one-hot rows, shape (N, K).
            Below zero: of no class.
        count: N.
        classes: K.
        device: where they are to be; None for where they are.

    Returns:
        int64, shape (N,).

    Raises:
        InputError: their shape is another, or they are not numbers of classes.
    """
    found = as_tensor(labels, "Labels")
    if found.shape == (count, classes):
        once = ((found == 1).sum(dim=1) == 1) & ((found == 0).sum(dim=1) == classes - 1)
        if not once.all():
            raise InputError(
                f"Labels of shape {tuple(found.shape)} must be one-hot, with a single 1 in each "
                f"row; row {int((~once).nonzero()[0])} is not."
            )
        found = found.int().argmax(dim=1)
    elif found.shape == (count, 1):
        found = found[:, 0]
    if found.ndim != 1:
        raise InputError(
            f"Labels must have shape (N,), (N, 1) or, one-hot, (N, {classes}), not "
            f"{tuple(found.shape)}."
        )
    if len(found) != count:
        raise InputError(f"There are {len(found)} labels for {count} samples.")
    if found.dtype == torch.bool or found.is_complex():
        raise InputError(f"Labels must be numbers of classes, not {name_of(found)}.")
    whole = found.long()
    if found.is_floating_point() and not (whole == found).all():
        raise InputError("Labels must be whole numbers.")
    if count and int(whole.max()) >= classes:
        raise InputError(
            f"There is a label {int(whole.max())}, but the classes of the head are 0 to "
            f"{classes - 1}."
        )
    return whole if device is None else whole.to(device)


def name_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
