"""Judging detectors on cached features: what proxies choose, and what it is worth on OOD sets.

Everything is chosen on ID validation images and the proxies that decide. Test features are read
once all is chosen; only the rows named ``oracle`` choose on them, to say what was left.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.features import Features
from opnp.data.families import DECIDING
from opnp.detectors import names, tuning
from opnp.detectors.base import Samples, SearchChoice, TrainedModel
from opnp.detectors.fusion import Fusion
from opnp.errors import InputError, UnavailableError
from opnp.metrics.separation import fpr95_auroc
from opnp.pruning.candidates import Trial
from opnp.pruning.clipping import by_threshold, clip_thresholds
from opnp.pruning.methods import METHODS
from opnp.pruning.search import SearchResult, search_masks
from opnp.pruning.sensitivity import Sensitivity, measure
from opnp.pruning.settings import SearchSettings
from opnp.pruning.table import Judge
from opnp.runtime.progress import track

__all__ = ["AUTOMATIC", "FUSIONS", "SINGLES", "Verdict", "judge"]

SLOW = ("openmax", "itp", "line")  # their work for each image grows with K·L, or more
LARGE = 1_000_000  # weights of a head for which they would take hours
SINGLES = [key for key, row in names.DETECTORS.items() if row.takes in ("logits", "features")]
"""Every detector that needs features alone."""

PARTNERS = ("vim", "mahalanobis++", "nci", "knn", "cadref")
FUSIONS = [f"{ours}&{other}" for other in PARTNERS for ours in ("energy", "opnp+react")]
"""The fusions that are compared: Energy, and OPNP with clipping in its place."""

AUTOMATIC = [*SINGLES, "opnp+react", "opnp+react&vim", "opnp+react&mahalanobis++"]
"""What the automatic choice chooses among."""

BUDGET = 12  # combinations of hyperparameters of each detector
TUNING = 300  # samples of each set that detectors are tuned on
ORACLE = 2000  # samples of each test set that the oracle looks at


@dataclass(frozen=True)
class Verdict:
    """What a set of images says.

    Attributes:
        fpr95: mean over the OOD sets by row, in percent, ID positive: the figures on test sets.
        proxies: mean over the deciding proxies by detector, in percent: what the choice went by.
        by_set: FPR95 on each OOD set by row.
        chosen: hyperparameters by detector, as text.
        automatic: the detector that is chosen automatically.
        unavailable: why a detector could not run.
    """

    fpr95: dict[str, float]
    proxies: dict[str, float]
    by_set: dict[str, dict[str, float]]
    chosen: dict[str, dict[str, Any]]
    automatic: str
    unavailable: dict[str, str]


@dataclass(frozen=True)
class Case:
    """A set of features with the settings of the search."""

    features: Features
    settings: SearchSettings

    @cached_property
    def percentiles(self) -> dict[float | None, float | None]:
        """The percentile of every threshold that features are clipped at."""
        wanted = [each for each in self.settings.clip if each is not None]
        values = clip_thresholds(lambda: [self.features.train[0]], wanted) if wanted else []
        return by_threshold(wanted, values)

    @cached_property
    def sensitivities(self) -> list[Sensitivity]:
        head, h = self.features.head, self.features.train[0]
        return measure(h, head.weight, head.bias, self.settings.temperature, [*self.percentiles])

    @cached_property
    def deciding(self) -> dict[str, Tensor]:
        return {name: self.features.proxies[name] for name in DECIDING}

    @cached_property
    def searched(self) -> SearchResult:
        def progress(trials: Any, count: int) -> Any:
            return track(trials, "search (masks)", count)

        h, labels = self.features.validation
        return search_masks(
            self.features.head,
            h,
            self.deciding,
            self.sensitivities,
            self.settings,
            labels=labels,
            restrictions=METHODS,
            progress=progress,
        )

    @cached_property
    def model(self) -> TrainedModel:
        choices = {
            method: SearchChoice(
                choice.trial.candidate,
                self.percentiles[choice.trial.candidate.clip],
                len(self.searched.trials),
            )
            for method, choice in self.searched.choices.items()
        }
        return TrainedModel(self.features.head, 1.0, choices=choices)

    def tuned(self, name: str) -> tuning.Tuned:
        """A detector, tuned on validation samples and the proxies that decide."""
        h, labels = self.features.validation
        return tuning.tune(
            name,
            self.model,
            Samples(*self.features.train),
            Samples(h[:TUNING], labels[:TUNING]),
            {name: Samples(outside[:TUNING]) for name, outside in self.deciding.items()},
            budget=BUDGET,
            seed=0,
        )

    def oracle(self, trials: list[Trial]) -> dict[str, float]:
        """The lowest mean FPR95 that any mask has on the test sets, with clipping and without."""
        candidates = [trial.candidate for trial in trials]
        ood = {name: h[:ORACLE] for name, h in self.features.ood.items()}
        judged = Judge.of(self.features.head, self.features.test[0][:ORACLE], ood)
        lowest = {"oracle": inf, "oracle without clip": inf}
        for trial in judged.trials(self.sensitivities, candidates):
            lowest["oracle"] = min(lowest["oracle"], trial.mean_fpr95)
            if METHODS["opnp"](trial.candidate):
                lowest["oracle without clip"] = min(lowest["oracle without clip"], trial.mean_fpr95)
        return lowest


def judge(features: Features, settings: SearchSettings) -> Verdict:
    """Choose everything on proxies, then measure it on the OOD test sets."""
    case = Case(features, settings)
    singly: dict[str, tuning.Tuned] = {}
    unavailable: dict[str, str] = {}
    large = features.head.weight.numel() > LARGE
    singles = [name for name in (*SINGLES, *METHODS) if not (large and name in SLOW)]
    unavailable |= dict.fromkeys(SLOW, "left out at this size of the head") if large else {}
    for name in track(singles, "tune (detectors)", len(singles)):
        try:
            singly[name] = case.tuned(name)
        except (UnavailableError, InputError, AssertionError) as error:
            unavailable[name] = str(error)
    validation = Samples(*features.validation)
    proxies = {name: Samples(h) for name, h in case.deciding.items()}
    tuned: dict[str, tuning.Tuned | Fusion] = {**singly}
    for name in FUSIONS:
        if all(part in singly for part in names.parts(name)):
            parts = {part: singly[part] for part in names.parts(name)}
            tuned[name] = Fusion.of(parts, validation)
    said = {}
    for name, detector in tuned.items():
        said[name] = mean_fpr95(figures(detector, validation, proxies))
    automatic = min((name for name in AUTOMATIC if name in said), key=lambda name: said[name])

    test = Samples(*features.test)
    ood = {name: Samples(h) for name, h in features.ood.items()}
    by_set = {name: figures(detector, test, ood) for name, detector in tuned.items()}
    fpr95 = {name: mean_fpr95(of) for name, of in by_set.items()}
    fpr95 |= case.oracle(case.searched.trials)
    return Verdict(
        fpr95,
        said,
        by_set,
        {name: dict(detector.hyperparameters) for name, detector in tuned.items()},
        automatic,
        unavailable,
    )


def figures(
    detector: tuning.Tuned | Fusion, inside: Samples, outside: Mapping[str, Samples]
) -> dict[str, float]:
    """FPR95 in percent on each set."""
    ours = detector.score(inside)
    theirs = [detector.score(samples) for samples in outside.values()]
    fpr95, _ = fpr95_auroc(ours[None], torch.cat(theirs)[None], [len(each) for each in theirs])
    return dict(zip(outside, fpr95[0].tolist(), strict=True))


def mean_fpr95(by_set: Mapping[str, float]) -> float:
    return sum(by_set.values()) / len(by_set)
