"""How sensitive the energy is to each weight and each neuron of a linear head.

For features h (L,), logits f = W h + b and p = softmax(f/T), the energy E = −T·logsumexp(f/T) has

    ∂E/∂W_ij = −p_i h_j                          ∂E/∂h_j = −Σ_i p_i W_ij,

so that averages over m training samples need one matrix product for each batch and no backward
pass. With H (m, L) the features and P (m, K) the probabilities of all samples:

    parameter sensitivity      M_ij = (1/m) Σ_k |∂E(x_k)/∂W_ij| = (Pᵀ|H|)_ij / m
    neuron sensitivity, mean        N_j = (1/K) Σ_i M_ij
                        gradient    N_j = (1/m) Σ_k |Σ_i p_i W_ij|
                        taylor      N_j = (1/m) Σ_k |h_j Σ_i p_i W_ij|

Source: Chen et al., "Optimal Parameter and Neuron Pruning for Out-of-Distribution Detection",
NeurIPS 2023, arXiv 2402.10062. How the paper aggregates a neuron's weights is not stated in any
source that can be read, so all three definitions are a choice of the search.

The means of two parts of the training set do not give the mean of both, but sums do. So each part
contributes a sum and a count, `SensitivitySums`, and parts are merged by adding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Self, get_args

import torch
from torch import Tensor

from opnp.errors import InputError
from opnp.pruning.energy import check_head, logits
from opnp.pruning.inputs import Numbers, as_head
from opnp.pruning.settings import NeuronSensitivity

__all__ = [
    "NeuronSensitivity",
    "Sensitivity",
    "SensitivitySums",
    "added",
    "halved",
    "measure",
    "neuron_sensitivity",
    "of_halves",
    "parameter_sensitivity",
    "sums_of_halves",
]

BATCH = 1024  # rows per product: bounds the memory for any N, and fixes the order of summation


@dataclass(frozen=True)
class Sensitivity:
    """How sensitive the energy of one head is, averaged over training samples, all float64.

    Attributes:
        weights: M, shape (K, L).
        neurons_mean: N by the definition ``mean``, shape (L,).
        neurons_gradient: N by the definition ``gradient``, shape (L,).
        neurons_taylor: N by the definition ``taylor``, shape (L,).
        count: number of samples m.
        temperature: T of the energy.
        clip: value at which features were clipped from above, as ReAct does; None: no clip.
        halves: the same over each half of the samples. How much the halves differ shows how much
            the sensitivity depends on which samples were drawn.
    """

    weights: Tensor
    neurons_mean: Tensor
    neurons_gradient: Tensor
    neurons_taylor: Tensor
    count: int
    temperature: float = 1.0
    clip: float | None = None
    halves: "tuple[Sensitivity, Sensitivity] | None" = None

    def neurons(self, kind: NeuronSensitivity) -> Tensor:
        """N by the definition ``kind``, shape (L,).

        Raises:
            InputError: there is no such definition.
        """
        if kind not in get_args(NeuronSensitivity):
            raise InputError(
                f"There is no neuron sensitivity {kind!r}: "
                f"choose one of {', '.join(get_args(NeuronSensitivity))}."
            )
        tensor: Tensor = getattr(self, f"neurons_{kind}")
        return tensor


@dataclass(frozen=True)
class SensitivitySums:
    """What some training samples contribute: sums in float64, on the CPU, and their count.

    Adding the same parts in the same order gives the same bits, whichever worker computed each
    part and in whatever order they were finished.

    Attributes:
        weights: Σ_k |∂E(x_k)/∂W_ij|, shape (K, L).
        neurons_mean: Σ_k (1/K) Σ_i |∂E(x_k)/∂W_ij|, shape (L,).
        neurons_gradient: Σ_k |∂E(x_k)/∂h_j|, shape (L,).
        neurons_taylor: Σ_k |h_j · ∂E(x_k)/∂h_j|, shape (L,).
        count: number of samples.
        temperature: T of the energy.
        clip: value at which features were clipped from above; None: no clip.

    >>> h, W, b = torch.rand(6, 4), torch.randn(3, 4), torch.zeros(3)
    >>> parts = [SensitivitySums.of(part, W, b) for part in (h[:2], h[2:])]
    >>> (parts[0] + parts[1]).count
    6
    """

    weights: Tensor
    neurons_mean: Tensor
    neurons_gradient: Tensor
    neurons_taylor: Tensor
    count: int
    temperature: float = 1.0
    clip: float | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        features: Numbers,
        weight: Numbers,
        bias: Numbers,
        temperature: float = 1.0,
        clip: float | None = None,
    ) -> Self:
        """Sums over the samples of ``features``.

        They are computed in float64, on the device of ``features``: the smallest sensitivities
        decide which weights are pruned, and with float32 logits their sixth digit would be wrong.

        Args:
            features: h, shape (N, L), any floating dtype.
            weight: W, shape (K, L).
            bias: b, shape (K,).
            temperature: T of the energy.
            clip: value at which to clip features from above first, as ReAct does (Sun et al.,
                NeurIPS 2021); None: no clip.

        Raises:
            InputError: shapes disagree, values are not finite, or T is not positive.
        """
        features, weight, bias = as_head(features, weight, bias)
        weight = weight.to(features.device).double()
        m = torch.zeros_like(weight)
        gradient = torch.zeros_like(weight[0])
        taylor = torch.zeros_like(gradient)
        for h, p in probabilities(features, weight, bias, temperature, clip):
            dh = p @ weight  # −∂E/∂h, shape (B, L)
            m += p.T @ h.abs()  # Σ_k |−p_i h_j|, shape (K, L); p is never negative
            gradient += dh.abs().sum(dim=0)
            taylor += (h * dh).abs().sum(dim=0)
        return cls(
            m.cpu(),
            m.mean(dim=0).cpu(),
            gradient.cpu(),
            taylor.cpu(),
            len(features),
            temperature,
            clip,
        )

    def __add__(self, other: Self) -> Self:
        if self.weights.shape != other.weights.shape:
            raise InputError(
                f"Sums for a head {tuple(self.weights.shape)} and a head "
                f"{tuple(other.weights.shape)} cannot be added: they are of different models."
            )
        if (self.temperature, self.clip) != (other.temperature, other.clip):
            raise InputError(
                "Sums at different temperatures or clips cannot be added: "
                f"T = {self.temperature:g} and {other.temperature:g}, "
                f"clips {self.clip} and {other.clip}."
            )
        return replace(
            self,
            weights=self.weights + other.weights,
            neurons_mean=self.neurons_mean + other.neurons_mean,
            neurons_gradient=self.neurons_gradient + other.neurons_gradient,
            neurons_taylor=self.neurons_taylor + other.neurons_taylor,
            count=self.count + other.count,
        )

    def mean(self) -> Sensitivity:
        """The sensitivity: the sums divided by the count.

        Raises:
            InputError: there were no samples.
        """
        m = positive(self.count)
        return Sensitivity(
            self.weights / m,
            self.neurons_mean / m,
            self.neurons_gradient / m,
            self.neurons_taylor / m,
            m,
            self.temperature,
            self.clip,
        )


def positive(count: int) -> int:
    if count == 0:
        raise InputError("The sensitivity of no samples is undefined: the training set is empty.")
    return count


def probabilities(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    temperature: float = 1.0,
    clip: float | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of features h (B, L), clipped as the head sees them, and p = softmax(f/T) (B, K).

    Both are float64, on the device of ``features``.

    Raises:
        InputError: shapes disagree, values are not finite, or T is not positive.
    """
    check_head(features, weight, bias, temperature)
    weight, bias = (each.to(features.device).double() for each in (weight, bias))
    for h in features.split(BATCH):
        h = h.double() if clip is None else h.double().clamp(max=clip)
        yield h, torch.softmax(logits(h, weight, bias) / temperature, dim=1)


def halved(first: SensitivitySums, second: SensitivitySums) -> Sensitivity:
    """The sensitivity over two halves of the training samples, which keeps that of each half.

    Raises:
        InputError: there were no samples, or the halves are of different heads or settings.
    """
    total = (first + second).mean()
    if first.count == 0 or second.count == 0:
        return total
    return replace(total, halves=(first.mean(), second.mean()))


def sums_of_halves(
    features: Tensor, weight: Tensor, bias: Tensor, points: Sequence[tuple[float | None, float]]
) -> list[SensitivitySums]:
    """The sums over the samples in even places and over those in odd places, at several settings.

    Args:
        features: penultimate features of a part of the training samples, (N, L), not clipped.
        weight: W of the head, (K, L).
        bias: b of the head, (K,).
        points: clip (None: do not clip) and temperature of each setting.

    Returns:
        Two sums for each setting, one after the other; `added` joins those of two parts, and
        `of_halves` makes sensitivities of them.

    Raises:
        InputError: shapes disagree, or values are not finite.
    """
    return [
        SensitivitySums.of(half, weight, bias, temperature, clip)
        for clip, temperature in points
        for half in (features[::2], features[1::2])
    ]


def added(
    first: Sequence[SensitivitySums], second: Sequence[SensitivitySums]
) -> list[SensitivitySums]:
    """The sums of two parts of the training samples, at the same settings."""
    return [a + b for a, b in zip(first, second, strict=True)]


def of_halves(sums: Sequence[SensitivitySums]) -> list[Sensitivity]:
    """The sensitivity at each setting, which keeps that of each half; see `sums_of_halves`."""
    return [halved(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]


def measure(
    features: Numbers,
    weight: Numbers,
    bias: Numbers,
    temperatures: Sequence[float] = (1.0,),
    clips: Sequence[float | None] = (None,),
) -> list[Sensitivity]:
    """The sensitivity at every temperature and clip, for `opnp.pruning.search.search_masks`.

    Each keeps that of two halves of the samples: those in even and those in odd places.

    Args:
        features: penultimate features of the training samples, shape (N, L), N ≥ 1.
        weight: head weight W, shape (K, L).
        bias: head bias b, shape (K,).
        temperatures: values of T of the energy.
        clips: values at which to clip features from above, which
            `opnp.pruning.clipping.clip_threshold` gives; None: no clip.

    Returns:
        One sensitivity for each clip and temperature; those of the first clip come first.

    Raises:
        InputError: shapes disagree, N = 0, values are not finite, or T is not positive.

    >>> h, W, b = torch.rand(100, 8), torch.randn(3, 8), torch.zeros(3)
    >>> [(each.clip, each.temperature) for each in measure(h, W, b, [1.0, 2.0], [None, 0.9])]
    [(None, 1.0), (None, 2.0), (0.9, 1.0), (0.9, 2.0)]
    """
    features, weight, bias = as_head(features, weight, bias)
    points = [*product(clips, temperatures)]
    return of_halves(sums_of_halves(features, weight, bias, points))


def parameter_sensitivity(
    features: Numbers, weight: Numbers, bias: Numbers, temperature: float = 1.0
) -> Tensor:
    """The parameter sensitivity M_ij = (1/m) Σ_k |∂E(x_k)/∂W_ij|, without a backward pass.

    Args:
        features: penultimate features of the training samples, shape (N, L), N ≥ 1.
        weight: head weight W, shape (K, L).
        bias: head bias b, shape (K,).
        temperature: T of the energy.

    Returns:
        M, shape (K, L), float64, on the CPU.

    Raises:
        InputError: shapes disagree, N = 0, values are not finite, or T is not positive.

    Source: Chen et al., NeurIPS 2023, arXiv 2402.10062.

    >>> h, W, b = torch.rand(100, 8), torch.randn(3, 8), torch.zeros(3)
    >>> parameter_sensitivity(h, W, b).shape
    torch.Size([3, 8])
    """
    features, weight, bias = as_head(features, weight, bias)
    total = torch.zeros(weight.shape, dtype=torch.float64, device=features.device)
    for h, p in probabilities(features, weight, bias, temperature):
        total += p.T @ h.abs()
    return total.cpu() / positive(len(features))


def neuron_sensitivity(
    features: Numbers,
    weight: Numbers,
    bias: Numbers,
    temperature: float = 1.0,
    kind: NeuronSensitivity = "mean",
) -> Tensor:
    """The neuron sensitivity N by one of three definitions, whose formulas are above.

    Args:
        features: penultimate features of the training samples, shape (N, L), N ≥ 1.
        weight: head weight W, shape (K, L).
        bias: head bias b, shape (K,).
        temperature: T of the energy.
        kind: ``mean``, ``gradient`` or ``taylor``.

    Returns:
        N, shape (L,), float64, on the CPU.

    Raises:
        InputError: as `parameter_sensitivity`, or the kind is unknown.

    Source: Chen et al., NeurIPS 2023, arXiv 2402.10062.

    >>> h, W, b = torch.rand(100, 8), torch.randn(3, 8), torch.zeros(3)
    >>> neuron_sensitivity(h, W, b, kind="gradient").shape
    torch.Size([8])
    """
    return SensitivitySums.of(features, weight, bias, temperature).mean().neurons(kind)
