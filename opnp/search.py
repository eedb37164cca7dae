"""The search for the best mask, without real OOD data.

Every combination of percentages and neuron sensitivity is judged by how well the pruned head's
energy separates in-distribution (ID) validation features from proxy outliers: the mean FPR95 over
the outlier sets, AUROC breaking ties, under the constraint that ID accuracy may drop only so much.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from opnp.energy import bias_of, check_head, energy_score, logits
from opnp.errors import InputError
from opnp.masks import Percentages, PruningMask, check_percentages, keep
from opnp.metrics import fpr95_auroc
from opnp.sensitivity import NeuronSensitivity, Sensitivity

__all__ = ["Candidate", "Grid", "SearchResult", "Trial", "choose", "search_masks"]


@dataclass(frozen=True)
class Candidate:
    """Percentages to prune, and by which neuron sensitivity.

    Attributes:
        weights: (low, high) in percent.
        neurons: (low, high) in percent.
        neuron_sensitivity: ``mean``, ``gradient`` or ``taylor``; of no effect on (0, 0).
    """

    weights: Percentages = (0.0, 0.0)
    neurons: Percentages = (0.0, 0.0)
    neuron_sensitivity: NeuronSensitivity = "mean"

    def mask(self, sensitivity: Sensitivity) -> PruningMask:
        """The mask these percentages make of a head's sensitivity."""
        return PruningMask.from_sensitivity(
            sensitivity.weights,
            sensitivity.neurons(self.neuron_sensitivity),
            self.weights,
            self.neurons,
        )


@dataclass(frozen=True)
class Grid:
    """The candidates: every combination of the percentages, once.

    A pruned head is delicate at the high end (10 classes × 256 features are 2,560 weights, of which
    0.5 % are 13) and patient at the low end: make it fine there and coarse here.

    Attributes:
        weights_low: percentages of weights of lowest sensitivity.
        weights_high: percentages of weights of highest sensitivity.
        neurons_low: percentages of neurons of lowest sensitivity.
        neurons_high: percentages of neurons of highest sensitivity.
        neuron_sensitivity: the definitions to try.
    """

    weights_low: Sequence[float] = (0, 10, 30, 50)
    weights_high: Sequence[float] = (0, 0.2, 0.5, 1, 2, 3, 5)
    neurons_low: Sequence[float] = (0, 10, 30)
    neurons_high: Sequence[float] = (0, 1, 2, 5, 10, 20)
    neuron_sensitivity: Sequence[NeuronSensitivity] = ("mean", "gradient", "taylor")

    def candidates(self) -> list[Candidate]:
        """All candidates; the unpruned head is the first, whatever the grid.

        Raises:
            InputError: a combination is out of range.
        """
        found = {Candidate(): None}
        for kind, *cuts in product(
            self.neuron_sensitivity,
            self.weights_low,
            self.weights_high,
            self.neurons_low,
            self.neurons_high,
        ):
            wl, wh, nl, nh = map(float, cuts)
            check_percentages("weights", (wl, wh))
            check_percentages("neurons", (nl, nh))
            # Where no neuron is pruned, the definitions all give the same mask.
            found[Candidate((wl, wh), (nl, nh), kind if nl or nh else "mean")] = None
        return list(found)


@dataclass(frozen=True)
class Trial:
    """A candidate and what was measured of it, in percent.

    Attributes:
        candidate: the percentages.
        fpr95: of each outlier set, by name.
        auroc: of each outlier set, by name.
        accuracy: of the pruned head on the ID features; NaN without labels.
        pruned: share of the K·L weights that are zero.
    """

    candidate: Candidate
    fpr95: dict[str, float]
    auroc: dict[str, float]
    accuracy: float
    pruned: float

    @property
    def mean_fpr95(self) -> float:
        return sum(self.fpr95.values()) / len(self.fpr95)

    @property
    def mean_auroc(self) -> float:
        return sum(self.auroc.values()) / len(self.auroc)


@dataclass(frozen=True)
class SearchResult:
    """All trials, the best of them, and its mask."""

    trials: list[Trial]
    best: Trial
    mask: PruningMask


@torch.no_grad()
def search_masks(
    head: nn.Linear,
    id_features: Tensor,
    outliers: dict[str, Tensor],
    sensitivity: Sensitivity,
    grid: Grid | None = None,
    *,
    labels: Tensor | None = None,
    max_accuracy_drop: float = 1.0,
    temperature: float = 1.0,
    progress: Callable[[Sequence[Candidate]], Iterable[Candidate]] = iter,
) -> SearchResult:
    """Try every mask of a grid and choose the best.

    Args:
        head: the classifier's last layer, weight (K, L).
        id_features: ID validation features, (N, L); never test features.
        outliers: features of each outlier set, (N_i, L), by name.
        sensitivity: of ``head``, over the training samples.
        grid: what to try.
        labels: of ``id_features``, (N,); without them accuracy is not constrained.
        max_accuracy_drop: how far ID accuracy may fall below the unpruned head's, in points.
        temperature: T of the energy.
        progress: wraps the list of candidates while they are tried.

    Raises:
        InputError: shapes disagree, a set is empty, or the grid is out of range.
    """
    weight, bias = head.weight.detach(), bias_of(head)
    if not outliers:
        raise InputError("The search needs at least one set of outliers.")
    for name, features in {"ID validation": id_features, **outliers}.items():
        check_head(features, weight, bias, temperature)
        if len(features) == 0:
            raise InputError(f"The set {name!r} is empty: the search needs samples in every set.")
    if labels is not None and labels.shape != id_features.shape[:1]:
        raise InputError(
            f"There are {tuple(labels.shape)} labels for {len(id_features)} ID features: "
            "give one for each."
        )
    if sensitivity.weights.shape != weight.shape:
        raise InputError(
            f"The sensitivity is of a head {tuple(sensitivity.weights.shape)}, this one is "
            f"{tuple(weight.shape)}: measure this head's."
        )
    trials = list(
        measure(
            weight, bias, id_features, outliers, sensitivity, labels, temperature,
            progress((grid or Grid()).candidates()),
        )
    )  # fmt: skip
    best = choose(trials, max_accuracy_drop)
    return SearchResult(trials, best, best.candidate.mask(sensitivity))


def measure(
    weight: Tensor,
    bias: Tensor,
    id_features: Tensor,
    outliers: dict[str, Tensor],
    sensitivity: Sensitivity,
    labels: Tensor | None,
    temperature: float,
    candidates: Iterable[Candidate],
) -> Iterator[Trial]:
    """Measure candidates one by one: a product of all features with each pruned head."""
    samples = torch.cat([id_features, *outliers.values()])
    sizes = [len(features) for features in outliers.values()]
    n = len(id_features)
    for candidate in candidates:
        kept = keep(sensitivity.weights, candidate.weights) & keep(
            sensitivity.neurons(candidate.neuron_sensitivity), candidate.neurons
        )
        f = logits(samples, weight * kept.to(weight.device), bias)
        outlier_score = -energy_score(f, temperature)
        fpr95, auroc = fpr95_auroc(outlier_score[:n], outlier_score[n:], sizes)
        yield Trial(
            candidate,
            dict(zip(outliers, fpr95.tolist(), strict=True)),
            dict(zip(outliers, auroc.tolist(), strict=True)),
            float("nan")
            if labels is None
            else 100 * float((f[:n].argmax(dim=1) == labels).double().mean()),
            1 - float(kept.double().mean()),
        )


def choose(
    trials: Sequence[Trial],
    max_accuracy_drop: float,
    allowed: Callable[[Candidate], bool] = lambda _: True,
) -> Trial:
    """The trial of lowest mean FPR95 among those that keep the accuracy.

    AUROC breaks ties, then the smaller pruned share, then the order of the grid.

    Args:
        trials: the first is the unpruned head, which accuracy is compared with.
        max_accuracy_drop: in points.
        allowed: restricts the choice, to weight pruning alone, say.
    """
    floor = trials[0].accuracy - max_accuracy_drop
    # Without labels accuracies are NaN, and no comparison with NaN holds: nothing is excluded.
    accurate = [t for t in trials if allowed(t.candidate) and not t.accuracy < floor - 1e-9]
    return min(accurate, key=lambda t: (round(t.mean_fpr95, 9), -round(t.mean_auroc, 9), t.pruned))
