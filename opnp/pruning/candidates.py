"""What the mask search tries: candidates, the grid they form, and the trial of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from opnp.pruning.masks import Percentages, PruningMask
from opnp.pruning.sensitivity import Sensitivity
from opnp.pruning.settings import HIGHEST, NeuronSensitivity, SearchSettings

__all__ = ["Candidate", "Trial", "candidate_record", "candidates_of", "grid", "trial_record"]


@dataclass(frozen=True)
class Candidate:
    """One way to prune and score: percentages, neuron sensitivity, clip and temperature.

    Attributes:
        weights: percent of the weights with the lowest and with the highest sensitivity to prune.
        neurons: the same for the neurons.
        neuron_sensitivity: ``mean``, ``gradient`` or ``taylor``; no effect if no neuron is pruned.
        clip: value at which features are clipped from above first, as ReAct does; None: no clip.
        temperature: T of the energy.

    >>> Candidate(weights=(10, 1)).record()["weights_high"]
    1
    """

    weights: Percentages = (0.0, 0.0)
    neurons: Percentages = (0.0, 0.0)
    neuron_sensitivity: NeuronSensitivity = "mean"
    clip: float | None = None
    temperature: float = 1.0

    @classmethod
    def stated(cls, record: Mapping[str, Any]) -> "Candidate":
        """Read a candidate from a record that `candidate_record` made.

        Raises:
            KeyError: the record lacks a key.
        """
        return cls(
            (record["weights_low"], record["weights_high"]),
            (record["neurons_low"], record["neurons_high"]),
            record["neuron_sensitivity"],
            record["threshold"],
            record["temperature"],
        )

    def record(self) -> dict[str, float | str]:
        """What the candidate prunes, under the names of `SearchSettings`."""
        (weights_low, weights_high), (neurons_low, neurons_high) = self.weights, self.neurons
        return {
            "weights_low": weights_low,
            "weights_high": weights_high,
            "neurons_low": neurons_low,
            "neurons_high": neurons_high,
            "neuron_sensitivity": self.neuron_sensitivity,
        }

    def mask(self, sensitivity: Sensitivity) -> PruningMask:
        """The mask that these percentages make from the sensitivity of a head (K, L)."""
        return PruningMask.from_sensitivity(
            sensitivity.weights,
            sensitivity.neurons(self.neuron_sensitivity),
            self.weights,
            self.neurons,
        )


@dataclass(frozen=True)
class Trial:
    """A candidate and how well it does.

    Attributes:
        candidate: what was tried.
        fpr95: FPR95 of each outlier set in percent, by the set's name.
        auroc: AUROC of each outlier set in percent, by the set's name.
        accuracy: accuracy of the pruned head on the ID features in percent; NaN without labels.
        pruned: share of the K·L weights that are zero, from 0 to 1.
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
        """Sort key that puts the best trial first: mean FPR95, ties broken by mean AUROC.

        Both are rounded, so that the last digits of a sum do not decide.
        """
        return round(self.mean_fpr95, 9), -round(self.mean_auroc, 9)


def grid(settings: SearchSettings) -> list[Candidate]:
    """Every combination of percentages and neuron sensitivities once; the unpruned head is first.

    Args:
        settings: the percentages and definitions to combine; `SearchSettings.for_head` suits them
            to a head.

    Returns:
        Candidates that neither clip nor change the temperature.

    >>> nothing = {"weights_low": [0], "neurons_low": [0], "neurons_high": [0]}
    >>> [each.weights for each in grid(SearchSettings(weights_high=[0, 1], **nothing))]
    [(0.0, 0.0), (0.0, 1.0)]
    """
    found = {Candidate(): None}
    for kind, wl, wh, nl, nh in product(
        settings.neuron_sensitivity,
        settings.weights_low,
        settings.weights_high or HIGHEST,
        settings.neurons_low,
        settings.neurons_high,
    ):
        # Where no neuron is pruned, all definitions give the same mask.
        found[Candidate((wl, wh), (nl, nh), kind if nl or nh else "mean")] = None
    return list(found)


def candidates_of(measured: Sequence[Sensitivity], settings: SearchSettings) -> list[Candidate]:
    """Every candidate of the grid, at the clip and temperature of every sensitivity.

    Percentages that the settings leave open are suited to the head whose sensitivities these are.
    """
    unclipped = grid(settings.for_head(*measured[0].weights.shape))
    return [
        replace(candidate, clip=each.clip, temperature=each.temperature)
        for each in measured
        for candidate in unclipped
    ]


def setting_of(measured: Sequence[Sensitivity], candidate: Candidate) -> Sensitivity:
    """The sensitivity that was measured at a candidate's clip and temperature."""
    setting = (candidate.clip, candidate.temperature)
    return next(s for s in measured if (s.clip, s.temperature) == setting)


def candidate_record(
    candidate: Candidate, percentiles: Mapping[float | None, float | None]
) -> dict[str, Any]:
    """A candidate as it is written to files.

    Args:
        candidate: what to write.
        percentiles: for each clip (a value of the features), the percentile it was taken at.
    """
    return candidate.record() | {
        "clip": percentiles[candidate.clip],
        "threshold": candidate.clip,
        "temperature": candidate.temperature,
    }


def trial_record(trial: Trial, percentiles: Mapping[float | None, float | None]) -> dict[str, Any]:
    """A trial as it is written to files, in percent; see `candidate_record`."""
    return candidate_record(trial.candidate, percentiles) | {
        "fpr95": trial.mean_fpr95,
        "auroc": trial.mean_auroc,
        "accuracy": trial.accuracy,
        "pruned": 100 * trial.pruned,
    }
