"""Masks: which weights and neurons of a head stay, by the rank of their sensitivity.

Source: Chen et al., "Optimal Parameter and Neuron Pruning for Out-of-Distribution Detection",
NeurIPS 2023, arXiv 2402.10062.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import floor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from opnp.errors import InputError
from opnp.pruning.energy import bias_of, linear_head
from opnp.runtime import tensors

__all__ = [
    "Percentages",
    "PruningMask",
    "check_percentages",
    "keep",
    "pruned_count",
    "warn_of_fractions",
]

logger = logging.getLogger(__name__)

Percentages = tuple[float, float]
"""(low, high): percent with the lowest sensitivity to prune, and percent with the highest."""


def check_percentages(name: str, percentages: Percentages) -> None:
    """Refuse percentages that are negative or that together prune everything.

    Args:
        name: what the error calls them.
        percentages: (low, high).

    Raises:
        InputError: they are out of range.
    """
    low, high = percentages
    if not (low >= 0 and high >= 0 and low + high < 100):
        raise InputError(
            f"{name}=({low:g}, {high:g}) prunes {low + high:g} %: percentages must not be negative "
            "and must sum to less than 100."
        )


def warn_of_fractions(what: str, percentages: Iterable[float]) -> None:
    """Warn where percentages look like fractions: all below 1, and not all 0.

    Args:
        what: the percentages in words.
        percentages: their values.
    """
    if 0 < max(percentages, default=0) < 1:
        logger.warning(
            "%s: these are percentages, all below 1 %%. If fractions are meant, multiply by 100.",
            what,
        )


@lru_cache(maxsize=4096)  # a search asks for the same few thousands of times
def pruned_count(n: int, percentage: float) -> int:
    """How many of ``n`` weights or neurons a percentage prunes; a half is rounded up.

    >>> pruned_count(2560, 0.5)
    13
    """
    # Exact, from the decimal as it was written: 9.2 % of 375 is 34.5, but a float falls below it.
    return floor(n * Fraction(str(percentage)) / 100 + Fraction(1, 2))


def keep(sensitivity: Tensor, percentages: Percentages) -> Tensor:
    """True where the sensitivity is neither among the lowest nor among the highest.

    Values are chosen by rank, and of equal ones the earlier ranks lower, so that the number removed
    is exact: `pruned_count` of each percentage.

    Args:
        sensitivity: n values, any shape.
        percentages: (low, high).

    Returns:
        A boolean tensor of the same shape.

    >>> keep(torch.tensor([0.0, 5.0, 1.0, 9.0]), (25, 25))
    tensor([False,  True,  True, False])
    """
    n = sensitivity.numel()
    low, high = (pruned_count(n, percentage) for percentage in percentages)
    order = torch.argsort(sensitivity.flatten(), stable=True)
    kept = torch.zeros(n, dtype=torch.bool, device=sensitivity.device)
    kept[order[low : n - high]] = True
    return kept.reshape(sensitivity.shape)


@dataclass(frozen=True, eq=False)
class PruningMask:
    """Which weights and neurons of a linear head stay.

    Attributes:
        weights: True where the weight W_ij stays, bool, shape (K, L).
        neurons: True where the neuron h_j stays, bool, shape (L,). Pruning a neuron sets its whole
            column of W to zero.

    >>> M, N = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 2.0])
    >>> PruningMask.from_sensitivity(M, N, weights=(0, 25)).kept
    tensor([[ True,  True],
            [ True, False]])
    """

    weights: Tensor
    neurons: Tensor

    @classmethod
    def from_sensitivity(
        cls,
        parameter_sensitivity: Tensor,
        neuron_sensitivity: Tensor,
        weights: Percentages = (0.0, 0.0),
        neurons: Percentages = (0.0, 0.0),
    ) -> Self:
        """Prune the lowest and highest ``weights`` % of M and ``neurons`` % of N.

        Args:
            parameter_sensitivity: M, shape (K, L).
            neuron_sensitivity: N, shape (L,).
            weights: (low, high), percent of the K·L weights; OPP prunes weights only.
            neurons: (low, high), percent of the L neurons; ONP prunes neurons only.

        Returns:
            The mask. With (0, 0) and (0, 0) everything stays.

        Raises:
            InputError: shapes disagree, a sensitivity is NaN, or percentages are out of range.
        """
        if (
            parameter_sensitivity.ndim != 2
            or neuron_sensitivity.shape != parameter_sensitivity.shape[1:]
        ):
            raise InputError(
                "Sensitivities must have shapes (K, L) and (L,), not "
                f"{tuple(parameter_sensitivity.shape)} and {tuple(neuron_sensitivity.shape)}."
            )
        if parameter_sensitivity.isnan().any() or neuron_sensitivity.isnan().any():
            raise InputError("A sensitivity is NaN: measure it on features that are finite.")
        check_percentages("weights", weights)
        check_percentages("neurons", neurons)
        return cls(keep(parameter_sensitivity, weights), keep(neuron_sensitivity, neurons))

    @property
    def kept(self) -> Tensor:
        """True where a weight survives both weight and neuron pruning, bool, shape (K, L)."""
        return self.weights & self.neurons

    @property
    def pruned_weights(self) -> float:
        """Share of the K·L weights pruned by their own sensitivity, from 0 to 1."""
        return 1 - self.weights.double().mean().item()

    @property
    def pruned_neurons(self) -> float:
        """Share of the L neurons pruned, from 0 to 1."""
        return 1 - self.neurons.double().mean().item()

    @property
    def pruned(self) -> float:
        """Share of the K·L weights that either kind of pruning sets to zero, from 0 to 1."""
        return 1 - self.kept.double().mean().item()

    def apply(self, head: nn.Linear) -> nn.Linear:
        """A pruned copy of ``head``, with the same bias; ``head`` itself is not changed.

        Args:
            head: the classifier's last layer, weight (K, L).

        Raises:
            InputError: the mask is for a head of another shape.
        """
        if head.weight.shape != self.weights.shape:
            raise InputError(
                f"The mask is for a head of shape {tuple(self.weights.shape)}, but this head has "
                f"{tuple(head.weight.shape)}: make a mask for this head."
            )
        kept = self.kept.to(head.weight.device)
        return linear_head(head.weight.detach() * kept, bias_of(head))

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write the mask as a safetensors file, uint8, 1 where a weight or neuron stays.

        Args:
            path: the file; it is replaced in one step, so that no reader sees half of it.
            metadata: what to record beside it.
        """
        kept = {"weights": self.weights, "neurons": self.neurons}
        tensors.save(
            Path(path), {name: t.to(torch.uint8) for name, t in kept.items()}, metadata or {}
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a mask that `save` wrote.

        Raises:
            InputError: the file is missing, damaged or not a mask.
        """
        found, _ = tensors.load(Path(path))
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        weights, neurons = shapes.get("weights", ()), shapes.get("neurons", ())
        if len(weights) != 2 or neurons != weights[1:]:
            raise InputError(
                f"{path} holds {shapes} instead of weights (K, L) and neurons (L,): make the mask "
                "again."
            )
        return cls(found["weights"].bool(), found["neurons"].bool())
