"""Logits of a linear head and their energy score."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opnp.errors import InputError

__all__ = ["bias_of", "check_head", "energy_score", "linear_head", "logits"]


def logits(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The logits f = W h + b.

    Args:
        features: penultimate features h, shape (N, L): N samples of L features.
        weight: head weight W, shape (K, L), for K classes.
        bias: head bias b, shape (K,).

    Returns:
        f, shape (N, K).

    >>> logits(torch.ones(1, 3), torch.eye(2, 3), torch.zeros(2))
    tensor([[1., 1.]])
    """
    return F.linear(features, weight, bias)


def energy_score(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The energy score S = T·logsumexp(f/T). **A higher score means in-distribution (ID).**

    The energy of the literature is E = −S: high for outliers.

    Args:
        logits: f, shape (..., K).
        temperature: T, above 0.

    Returns:
        S, shape (...).

    Source: Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020, Eq. 4.

    >>> energy_score(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
    tensor([0.6931, 9.0001])
    """
    return temperature * torch.logsumexp(logits / temperature, dim=-1)


def check_head(features: Tensor, weight: Tensor, bias: Tensor, temperature: float = 1.0) -> None:
    """Refuse a head that does not fit the features, and values that are not finite.

    Args:
        features: h, shape (N, L).
        weight: W, shape (K, L).
        bias: b, shape (K,).
        temperature: T.

    Raises:
        InputError: shapes disagree, a value is NaN or infinite, or the temperature is not positive.
    """
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise InputError(
            f"The head needs weight (K, L) and bias (K,), not {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}."
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise InputError("The head holds NaN or infinite values: check the model's checkpoint.")
    if features.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise InputError(
            f"Features must have shape (N, {weight.shape[1]}) to fit the head, not "
            f"{tuple(features.shape)}."
        )
    if not temperature > 0:
        raise InputError(f"The temperature must be positive, not {temperature}.")
    if not torch.isfinite(features).all():
        row = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
        raise InputError(
            f"Features hold NaN or infinite values (first in row {row}): "
            "check the model's inputs and weights."
        )


def bias_of(head: nn.Linear) -> Tensor:
    """The head's bias (K,), detached; zeros for a head without one."""
    if head.bias is None:
        return head.weight.detach().new_zeros(head.out_features)
    return head.bias.detach()


def linear_head(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with copies of ``weight`` (K, L) and ``bias`` (K,), without gradients."""
    head = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head.requires_grad_(False)
