"""Tuning of detectors: all by the same rule, on the same samples, alone or on a pruned model.

A detector tries combinations of its hyperparameters. The combination with the lowest mean FPR95
over the outlier sets wins; AUROC breaks ties. ``opnp+X`` is the detector X on a pruned model: with
the values that X has won with, it tries masks of the sensitivity of the features which X passes to
the head. As in the mask search, the mask that prunes least wins among those within noise of the
best, and where that is none, ``opnp+X`` is X.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from pytorch_ood.api import Detector, LogitsDetector
from torch import Tensor

from opnp.detectors import base, names
from opnp.detectors.base import Maker, Samples, TrainedModel
from opnp.detectors.searched import SearchedMask
from opnp.errors import InputError, UnavailableError
from opnp.metrics.bootstrap import bootstrap_mean_fpr95
from opnp.metrics.separation import fpr95_auroc
from opnp.pruning.candidates import Candidate
from opnp.pruning.energy import bias_of
from opnp.pruning.masks import PruningMask
from opnp.pruning.sensitivity import SensitivitySums

__all__ = ["Tuned", "tune"]

RESAMPLES = 200  # of the bootstrap that says which masks are within noise of the best

Option = TypeVar("Option")


@dataclass(frozen=True, eq=False)
class Tuned:
    """A detector, fitted with the values that were chosen for it.

    Attributes:
        detector: fitted on the training samples.
        model: the one it is fitted for, pruned if there is a mask.
        mask: of ``opnp+X``; None if pruning nothing was best, and for X alone.
        hyperparameters: by name; for ``opnp+X`` also ``weights_low``, ``weights_high``,
            ``neurons_low``, ``neurons_high`` and ``neuron_sensitivity``.
        fit_seconds: time to fit once with these values; with a mask also to measure the
            sensitivity.
        fpr95: mean over the outlier sets, in percent; the lowest wins.
        auroc: mean over the outlier sets, in percent; breaks ties.
        trials: number of combinations tried, those of X for ``opnp+X`` included; for a choice of
            the mask search, candidates.
    """

    detector: Detector
    model: TrainedModel
    mask: PruningMask | None
    hyperparameters: dict[str, Any]
    fit_seconds: float
    fpr95: float = float("nan")
    auroc: float = float("nan")
    trials: int = 1

    def score(self, samples: Samples) -> Tensor:
        """Outlier scores (N,), float64, of samples of the unpruned model; larger means OOD.

        Raises:
            UnavailableError: the detector cannot score these samples.
        """
        seen = samples if self.mask is None else samples.pruned(self.mask)
        return base.score(self.detector, self.model, seen)

    @property
    def pruned(self) -> float | None:
        """Percent of the head's weights that are pruned; None for a detector that never prunes."""
        detector = self.detector
        mask = detector.mask if isinstance(detector, SearchedMask) else self.mask
        if mask is None:
            return 0.0 if "weights_low" in self.hyperparameters else None
        return 100 * mask.pruned

    def pruned_logits(self, features: Tensor) -> Tensor | None:
        """Logits (N, K) of features (N, L), if the detector is a choice of the mask search.

        Only such a choice is made to keep the classifier's accuracy.
        """
        return self.detector.logits(features) if isinstance(self.detector, SearchedMask) else None


def tune(
    name: str,
    model: TrainedModel,
    train: Samples,
    validation: Samples,
    outliers: Mapping[str, Samples],
    *,
    budget: int,
    seed: int,
    candidates: Sequence[Candidate] = (),
    start: Tuned | None = None,
) -> Tuned:
    """Choose a detector's hyperparameters, and for ``opnp+X`` a mask, and fit it with them.

    X tries its default values and further combinations of its ``hyperparameter_space``, which
    ``seed`` draws, until the budget is spent. ``opnp+X`` tries X in the same way, and then as many
    masks with the best values of X. It may prune nothing, so that on the outlier sets it is never
    worse than X by more than noise. Combinations that cannot run are skipped.

    Args:
        name: a key of `opnp.detectors.names.DETECTORS` or ``module:factory``, alone or after
            ``opnp+``.
        model: left as it is.
        train: training samples with labels.
        validation: ID validation samples.
        outliers: samples of each outlier set. A detector of images holds the images of all sets in
            memory.
        budget: the largest number of combinations to try, and for ``opnp+X`` of masks.
        seed: of the draws.
        candidates: what ``opnp+X`` may prune, in the order in which it is tried.
        start: X, tuned on the same samples, if ``opnp+X`` need not tune it again.

    Raises:
        InputError: there is no such detector or no outlier set, or the budget is not positive.
        UnavailableError: the detector cannot run on this model or these samples.
    """
    key = names.alone(name)
    combined = key != name
    if not outliers or budget < 1:
        raise InputError("Tuning needs at least one outlier set and a budget of one or more.")
    default = base.make(key, model)
    train, validation, *others = (
        shared(samples, default, model) for samples in (train, validation, *outliers.values())
    )
    tuning = Tuning(partial(base.make, key), model, train, validation, others, seed)

    nothing = Candidate().record() if combined else {}
    if start is not None:
        tuning.take(replace(start, hyperparameters=start.hyperparameters | nothing))
    else:
        defaults, space = default.get_hyperparameters(), default.hyperparameter_space
        settings = [dict(zip(space, values, strict=True)) for values in product(*space.values())]
        settings = [defaults, *(values for values in settings if values != defaults)]
        for values in drawn(settings, budget, seed):
            tuning.enter(values, nothing)
    if combined:
        prune(tuning, candidates, budget)
    trials = default.trials if isinstance(default, SearchedMask) else tuning.trials
    return replace(tuning.winner(), trials=trials)


def prune(tuning: "Tuning", candidates: Sequence[Candidate], budget: int) -> None:
    """Try as many masks as the budget allows, with the best values so far."""
    best, model, start = tuning.winner(), tuning.model, time.perf_counter()
    seen = base.features_seen(best.detector, model, tuning.train)
    sums = SensitivitySums.of(seen, model.head.weight, bias_of(model.head), model.temperature)
    sensitivity = sums.mean()
    seconds = best.fit_seconds + time.perf_counter() - start
    values = best.detector.get_hyperparameters()
    pruning = [each for each in candidates if any((*each.weights, *each.neurons))]
    for each in pruning[:budget]:  # to prune nothing has been tried: it is the best so far
        tuning.enter(values, each.record(), each.mask(sensitivity), seconds)


class Tuning:
    """Fits a detector with one combination after another, and keeps the best."""

    def __init__(
        self,
        make: Maker,
        model: TrainedModel,
        train: Samples,
        validation: Samples,
        outliers: Sequence[Samples],
        seed: int,
    ):
        self.make = make
        self.model = model
        self.train = train
        self.validation = validation
        self.outliers = outliers
        self.seed = seed
        self.trials = 0
        self.entries: list[tuple[Tuned, Tensor, Tensor]] = []
        self.reason: UnavailableError | None = None

    def take(self, tuned: Tuned) -> None:
        """Enter the best of trials that were made elsewhere on the same samples.

        Raises:
            UnavailableError: it cannot score these samples.
        """
        self.trials += tuned.trials
        self.entries.append(self.scored(tuned))

    def enter(
        self,
        values: dict[str, Any],
        pruned: dict[str, Any],
        mask: PruningMask | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Try the detector's ``values`` and a mask.

        Args:
            values: hyperparameters of the detector.
            pruned: hyperparameters of the mask.
            mask: what to prune.
            seconds: time that making the mask took.
        """
        self.trials += 1
        try:
            self.entries.append(self.judged(values, pruned, mask, seconds))
        except UnavailableError as error:
            self.reason = self.reason or error

    def judged(
        self,
        values: dict[str, Any],
        pruned: dict[str, Any],
        mask: PruningMask | None,
        seconds: float,
    ) -> tuple[Tuned, Tensor, Tensor]:
        """The fitted detector, and its scores of the ID samples and of all outliers."""
        start = time.perf_counter()
        model = self.model if mask is None else self.model.pruned(mask)
        detector = self.make(model).set_hyperparameters(**values)
        if detector.requires_fit:
            base.fit(detector, model, self.train if mask is None else self.train.pruned(mask))
        seconds += time.perf_counter() - start
        # Asked after the fit, because ViM then lowers its dimension to what the features allow.
        chosen = {name: plain(value) for name, value in detector.get_hyperparameters().items()}
        return self.scored(Tuned(detector, model, mask, chosen | pruned, seconds))

    def scored(self, entry: Tuned) -> tuple[Tuned, Tensor, Tensor]:
        """A fitted detector with its figures, and its scores of the ID samples and outliers."""
        inside = entry.score(self.validation)
        outside = torch.cat([entry.score(samples) for samples in self.outliers])
        fpr95, auroc = fpr95_auroc(inside, outside, self.sizes)
        judged = replace(entry, fpr95=float(fpr95.mean()), auroc=float(auroc.mean()))
        return judged, inside.cpu(), outside.cpu()

    @property
    def sizes(self) -> list[int]:
        return [len(samples.features) for samples in self.outliers]

    def winner(self) -> Tuned:
        """The best so far; among those within noise of it, the one that prunes least.

        Noise is one standard error of the difference, as in `opnp.pruning.search.choose`.

        Raises:
            UnavailableError: no combination could run.
        """
        if not self.entries:
            assert self.reason is not None
            raise self.reason
        place = min(range(len(self.entries)), key=lambda index: rank(self.entries[index][0]))
        if self.entries[place][0].mask is None:
            return self.entries[place][0]
        tuned, inside, outside = zip(*self.entries, strict=True)
        figures = bootstrap_mean_fpr95(
            torch.stack(inside), torch.stack(outside), self.sizes, RESAMPLES, self.seed
        )
        noise = (figures - figures[place]).std(axis=1)
        within = [
            entry
            for entry, error in zip(tuned, noise, strict=True)
            if entry.fpr95 <= tuned[place].fpr95 + error + 1e-9
        ]
        return min(
            within,
            key=lambda entry: (0.0 if entry.mask is None else entry.mask.pruned, *rank(entry)),
        )


def plain(value: Any) -> Any:
    """A hyperparameter that JSON can hold: numpy's numbers as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def rank(entry: Tuned) -> tuple[float, float]:
    return round(entry.fpr95, 9), -round(entry.auroc, 9)


def shared(samples: Samples, detector: Detector, model: TrainedModel) -> Samples:
    """The samples, such that all combinations read images once and compute logits once."""
    return replace(
        samples,
        images=samples.images and cache(samples.images),
        logits=base.logits_of(model, samples) if isinstance(detector, LogitsDetector) else None,
    )


def drawn(options: Sequence[Option], count: int, seed: int) -> list[Option]:
    """``count`` options in their order: the first, and others drawn by ``seed``."""
    first, *others = options
    places = random.Random(seed).sample(range(len(others)), min(count - 1, len(others)))
    return [first, *(others[place] for place in sorted(places))]
