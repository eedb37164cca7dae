"""Candidates of the mask search, the grid they come from, and the trial of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from opnp.pruning.masks import Percentages, PruningMask, check_percentages
from opnp.pruning.sensitivity import NeuronSensitivity, Sensitivity

__all__ = ["Candidate", "Grid", "Trial", "candidate_record", "trial_record"]


@dataclass(frozen=True)
class Candidate:
    """Percentages to prune, and by which neuron sensitivity.

    Attributes:
        weights: (low, high) in percent.
        neurons: (low, high) in percent.
        neuron_sensitivity: ``mean``, ``gradient`` or ``taylor``; of no effect on (0, 0).
        clip: features are clipped at this value from above first, as ReAct does; None: not.
        temperature: T of the energy.
    """

    weights: Percentages = (0.0, 0.0)
    neurons: Percentages = (0.0, 0.0)
    neuron_sensitivity: NeuronSensitivity = "mean"
    clip: float | None = None
    temperature: float = 1.0

    @classmethod
    def stated(cls, record: Mapping[str, Any]) -> "Candidate":
        """The candidate of a record that `candidate_record` made.

        Raises:
            KeyError: it lacks something.
        """
        return cls(
            (record["weights_low"], record["weights_high"]),
            (record["neurons_low"], record["neurons_high"]),
            record["neuron_sensitivity"],
            record["threshold"],
            record["temperature"],
        )

    def record(self) -> dict[str, float | str]:
        """What it prunes, under the names of `Grid`."""
        (weights_low, weights_high), (neurons_low, neurons_high) = self.weights, self.neurons
        return {
            "weights_low": weights_low,
            "weights_high": weights_high,
            "neurons_low": neurons_low,
            "neurons_high": neurons_high,
            "neuron_sensitivity": self.neuron_sensitivity,
        }

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

    @property
    def rank(self) -> tuple[float, float]:
        """What trials are put in order by, the best first: mean FPR95, then mean AUROC."""
        return round(self.mean_fpr95, 9), -round(self.mean_auroc, 9)


def candidates_of(measured: Sequence[Sensitivity], grid: Grid) -> list[Candidate]:
    """Every candidate of the grid at the clip and temperature of every sensitivity."""
    percentages = grid.candidates()
    return [
        replace(candidate, clip=each.clip, temperature=each.temperature)
        for each in measured
        for candidate in percentages
    ]


def setting_of(measured: Sequence[Sensitivity], candidate: Candidate) -> Sensitivity:
    """The sensitivity at a candidate's clip and temperature."""
    setting = (candidate.clip, candidate.temperature)
    return next(s for s in measured if (s.clip, s.temperature) == setting)


def candidate_record(
    candidate: Candidate, percentiles: Mapping[float | None, float | None]
) -> dict[str, Any]:
    """A candidate as files have it; ``percentiles`` names the clips by their thresholds."""
    return candidate.record() | {
        "clip": percentiles[candidate.clip],
        "threshold": candidate.clip,
        "temperature": candidate.temperature,
    }


def trial_record(trial: Trial, percentiles: Mapping[float | None, float | None]) -> dict[str, Any]:
    return candidate_record(trial.candidate, percentiles) | {
        "fpr95": trial.mean_fpr95,
        "auroc": trial.mean_auroc,
        "accuracy": trial.accuracy,
        "pruned": 100 * trial.pruned,
    }
