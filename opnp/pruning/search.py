"""The search for the best mask, without real OOD data.

1. `opnp.pruning.candidates` lists every combination of percentages, neuron sensitivity, clip and
   temperature that the settings name.
2. `opnp.pruning.table` measures each candidate: how well the energy of the pruned head separates
   in-distribution (ID) validation features from outliers, by FPR95 and AUROC, and how accurately it
   classifies.
3. `choose` takes the candidates that keep the accuracy. Among those whose mean FPR95 over the
   outlier sets is within noise of the lowest, it chooses the one that prunes least.

The outliers are proxies, made from ID validation images or from noise; see `opnp.data.proxies`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opnp.errors import InputError
from opnp.metrics.bootstrap import bootstrap_mean_fpr95
from opnp.pruning.candidates import Candidate, Trial, candidates_of, setting_of, trial_record
from opnp.pruning.doubts import doubts
from opnp.pruning.energy import bias_of, check_head
from opnp.pruning.inputs import Numbers, as_features, as_labels
from opnp.pruning.masks import PruningMask, warn_of_fractions
from opnp.pruning.sensitivity import Sensitivity
from opnp.pruning.settings import SearchSettings
from opnp.pruning.table import MEMORY, Judge

__all__ = ["Choice", "SearchResult", "choice_record", "search_masks", "search_record"]


@dataclass(frozen=True)
class Choice:
    """The trial that a search chose, and how certain the choice is.

    Attributes:
        trial: the chosen trial.
        lowest: the trial with the lowest mean FPR95, whether it was chosen or not.
        interval: 95 % bootstrap interval of the chosen trial's mean FPR95, in percent.
        within_noise: number of trials whose mean FPR95 is at most one standard error above that of
            the trial with the lowest sum of mean FPR95 and instability.
        instability: half the difference in mean FPR95, in percentage points, between the masks that
            the two halves of the training samples give for the chosen candidate; NaN if there are
            no halves.
    """

    trial: Trial
    lowest: Trial
    interval: tuple[float, float]
    within_noise: int
    instability: float


@dataclass(frozen=True)
class SearchResult:
    """All trials, the choices among them, and the chosen mask.

    Attributes:
        trials: one for each candidate; the first is the unpruned head.
        choices: the choice among all trials, named ``all``, and the choice of each restriction.
        mask: the mask of the choice among all.
        reported: FPR95 in percent on each set that did not decide: of the unpruned head, and of the
            choice among all.
        doubts: what speaks against the choice among all, a sentence each.
    """

    trials: list[Trial]
    choices: dict[str, Choice]
    mask: PruningMask
    reported: dict[str, tuple[float, float]]
    doubts: list[str]

    @property
    def best(self) -> Trial:
        """The trial chosen among all."""
        return self.choices["all"].trial


@torch.no_grad()
def search_masks(
    head: nn.Linear,
    id_features: Numbers,
    outliers: Mapping[str, Numbers],
    sensitivity: Sensitivity | Sequence[Sensitivity],
    settings: SearchSettings | None = None,
    *,
    labels: Numbers | None = None,
    reported: Mapping[str, Numbers] | None = None,
    restrictions: Mapping[str, Callable[[Candidate], bool]] | None = None,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[Iterator[Trial], int], Iterable[Trial]] = lambda trials, _: trials,
) -> SearchResult:
    """Try every mask of a grid and choose one.

    Args:
        head: the classifier's last layer, weight (K, L).
        id_features: ID validation features, shape (N, L), not clipped; never test features. As all
            features and labels here they may be a tensor, an array or lists.
        outliers: features of each outlier set by its name, each of shape (N_i, L), not clipped.
        sensitivity: sensitivity of ``head`` over the training samples. Several, at different clips
            and temperatures, extend the search to those; `opnp.pruning.sensitivity.measure` gives
            them.
        settings: what to try and how to choose. Clips and temperatures are taken from
            ``sensitivity``, which was measured at them; those of the settings are not used here.
        labels: classes of ``id_features``, shape (N,); without them accuracy is not constrained.
        reported: features of further sets of outliers by name, which the choice is reported on and
            which do not decide.
        restrictions: names of further choices from the same trials, each with a function that says
            which candidates may be chosen.
        seed: seed of the bootstrap.
        memory: approximate bytes that blocks and scores may take; does not affect the choice.
        progress: called with the iterator of trials and their number; returns an iterable of the
            same trials, for a progress bar.

    Returns:
        All trials, the choices, and the mask of the choice among all.

    Raises:
        InputError: shapes disagree, a set is empty, two sensitivities have the same clip and
            temperature, or a restriction allows no candidate.

    Source: Chen et al., NeurIPS 2023, arXiv 2402.10062, for the masks; the search without OOD data
    is this project's own.

    >>> head, h = nn.Linear(8, 3), torch.rand(90, 8)
    >>> few = SearchSettings(weights_low=[0, 30], neurons_low=[0], neurons_high=[0])
    >>> measured = measure(h[:40], head.weight, head.bias)
    >>> found = search_masks(head, h[40:60], {"far": 3 * h[60:]}, measured, few)
    >>> len(found.trials), found.mask.weights.shape
    (4, torch.Size([3, 8]))
    """
    settings = settings or SearchSettings()
    measured = [sensitivity] if isinstance(sensitivity, Sensitivity) else list(sensitivity)
    id_features = as_features(id_features, head.weight)
    sets, others = (
        {name: as_features(each, head.weight) for name, each in given.items()}
        for given in (outliers, reported or {})
    )
    if labels is not None:
        labels = as_labels(labels, len(id_features), len(head.weight), head.weight.device)
    check_inputs(head, id_features, sets, others, measured, settings)
    settings, rules = settings.for_head(*head.weight.shape), restrictions or {}
    if "all" in rules:
        raise InputError("`all` names the choice among all candidates: rename that restriction.")
    candidates = candidates_of(measured, settings)
    judge = Judge.of(head, id_features, sets, labels, memory)
    found = progress(judge.trials(measured, candidates), len(candidates))
    by_candidate = {trial.candidate: trial for trial in found}
    trials = [by_candidate[candidate] for candidate in candidates]
    choose_among = partial(choose, judge, measured, trials, settings, seed)
    choices = {"all": choose_among(lambda _: True)}
    choices |= {name: choose_among(allowed) for name, allowed in rules.items()}
    best = choices["all"].trial.candidate
    others_judge = Judge.of(head, id_features, others, None, memory)
    figures = before_and_after(others_judge, measured, candidates[0], best)
    mask = best.mask(setting_of(measured, best))
    return SearchResult(trials, choices, mask, figures, doubts(trials, choices["all"], settings))


def before_and_after(
    judge: Judge, measured: Sequence[Sensitivity], unpruned: Candidate, best: Candidate
) -> dict[str, tuple[float, float]]:
    """FPR95 in percent on each set of outliers: of the unpruned head, and of the choice."""
    if not judge.sizes:
        return {}
    both = {each.candidate: each.fpr95 for each in judge.trials(measured, [unpruned, best])}
    return {name: (both[unpruned][name], both[best][name]) for name in judge.sizes}


def check_inputs(
    head: nn.Linear,
    id_features: Tensor,
    outliers: Mapping[str, Tensor],
    reported: Mapping[str, Tensor],
    measured: Sequence[Sensitivity],
    settings: SearchSettings,
) -> None:
    """Refuse what `search_masks` cannot search, see there; warn of percentages that look wrong."""
    low, high = settings.weights_low, settings.weights_high or ()
    grid = (*low, *high, *settings.neurons_low, *settings.neurons_high)
    warn_of_fractions("The grid of the search", grid)
    weight, bias = head.weight.detach(), bias_of(head)
    if not outliers:
        raise InputError("The search needs at least one set of outliers.")
    if not measured or len({(s.clip, s.temperature) for s in measured}) < len(measured):
        raise InputError("The search needs one sensitivity for each clip and temperature.")
    if twice := outliers.keys() & reported.keys():
        raise InputError(f"The set {sorted(twice)[0]!r} is to decide and to be reported only.")
    for name, features in {"ID validation": id_features, **outliers, **reported}.items():
        check_head(features, weight, bias, min(each.temperature for each in measured))
        if len(features) == 0:
            raise InputError(f"The set {name!r} is empty: the search needs samples in every set.")
    for each in measured:
        if each.weights.shape != weight.shape:
            raise InputError(
                f"The sensitivity is that of a head {tuple(each.weights.shape)}, but this head is "
                f"{tuple(weight.shape)}: measure the sensitivity of this head."
            )


def choose(
    judge: Judge,
    measured: Sequence[Sensitivity],
    trials: Sequence[Trial],
    settings: SearchSettings,
    seed: int,
    allowed: Callable[[Candidate], bool],
) -> Choice:
    """The trial that prunes least among those within noise of the lowest mean FPR95.

    A trial is within noise if its figure exceeds the lowest by at most one standard error of their
    difference (the one-standard-error rule of Breiman et al., "Classification and Regression
    Trees", 1984, section 3.4.3). The standard error comes from a bootstrap that draws the samples
    of the ID set and of each outlier set, the same ones for every candidate.

    The instability of a candidate is added to its figure first, so that a mask which depends on the
    choice of training samples must be better by as much.

    Args:
        judge: gives the scores of candidates.
        measured: the sensitivities, with their halves if there are any.
        trials: what to choose from; the first is the unpruned head, whose accuracy counts.
        settings: how much accuracy may be lost, and the number of resamples.
        seed: seed of the bootstrap.
        allowed: says which candidates may be chosen, such as those that prune weights only.

    Raises:
        InputError: no allowed candidate keeps the accuracy.
    """
    floor = settings.lowest_accuracy(trials[0].accuracy)
    # Without labels accuracies are NaN. A comparison with NaN is false, so nothing is excluded.
    accurate = [t for t in trials if allowed(t.candidate) and not t.accuracy < floor - 1e-9]
    if not accurate:
        raise InputError(
            "No allowed candidate keeps the accuracy: try smaller percentages, or allow a larger "
            "drop in accuracy."
        )
    # Any other trial prunes at least as much as one of these, with no lower FPR95.
    front = pareto_front(accurate)
    candidates = [trial.candidate for trial in front]
    figures = bootstrap_means(judge, judge.scores(measured, candidates), settings.bootstrap, seed)
    instability = instabilities(judge, measured, candidates)
    known = np.nan_to_num(instability)
    penalized = np.array([trial.mean_fpr95 for trial in front]) + known
    lowest = int(np.argmin(penalized))
    noise = (figures - figures[lowest]).std(axis=1)
    within = penalized <= penalized[lowest] + noise + 1e-9
    chosen = min(np.flatnonzero(within), key=lambda place: front[place].pruned)
    low, high = np.percentile(figures[chosen], [2.5, 97.5])
    reach = front[lowest].mean_fpr95 + float(figures[lowest].std()) + 1e-9
    return Choice(
        front[chosen],
        front[-1],
        (float(low), float(high)),
        sum(trial.mean_fpr95 <= reach for trial in accurate),
        float(instability[chosen]),
    )


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other trial beats in both the share pruned and the mean FPR95.

    They come in order from the least pruned to the lowest FPR95. AUROC breaks ties of FPR95, and
    the order of trials breaks those that remain.
    """
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.pruned, trial.rank)):
        if not front or trial.rank < front[-1].rank:
            front.append(trial)
    return front


def bootstrap_means(
    judge: Judge, scores: Mapping[Candidate, Tensor], resamples: int, seed: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The mean FPR95 of C candidates in each of R resamples of all sets, in percent, shape (C, R).

    Args:
        judge: knows which samples are ID, and the sizes of the outlier sets.
        scores: outlier scores of all samples, shape (N,), of each candidate.
        resamples: R.
        seed: seed of the draws, which are the same for every candidate.
    """
    stacked = torch.stack(list(scores.values())).cpu()
    inside, outside = stacked[:, : judge.inside], stacked[:, judge.inside :]
    return bootstrap_mean_fpr95(inside, outside, list(judge.sizes.values()), resamples, seed)


def instabilities(
    judge: Judge, measured: Sequence[Sensitivity], candidates: Sequence[Candidate]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """How much each of C candidates depends on the training samples, in percentage points, (C,).

    That is half the difference in mean FPR95 between the masks that the two halves of the training
    samples give: the standard error of the mean of two values. NaN without halves.
    """
    if any(each.halves is None for each in measured):
        return np.full(len(candidates), np.nan)
    figures = []
    for half in (0, 1):
        halves = [each.halves[half] for each in measured if each.halves is not None]
        by_candidate = {t.candidate: t.mean_fpr95 for t in judge.trials(halves, candidates)}
        figures.append(np.array([by_candidate[candidate] for candidate in candidates]))
    return np.abs(figures[0] - figures[1]) / 2


def choice_record(
    choice: Choice, percentiles: Mapping[float | None, float | None]
) -> dict[str, Any]:
    """The chosen trial and how certain the choice is, as it is written to files.

    Args:
        choice: what to write.
        percentiles: for each clip (a value of the features), the percentile it was taken at.
    """
    return trial_record(choice.trial, percentiles) | {
        "interval": {"low": choice.interval[0], "high": choice.interval[1]},
        "within_noise": choice.within_noise,
        "instability": None if isnan(choice.instability) else choice.instability,
        "lowest": choice.lowest.mean_fpr95,
    }


def search_record(
    result: SearchResult, percentiles: Mapping[float | None, float | None], choices: Sequence[str]
) -> dict[str, Any]:
    """A search as it is written to files.

    Args:
        result: the search.
        percentiles: for each clip (a value of the features), the percentile it was taken at.
        choices: names of the choices to write.

    Returns:
        ``unpruned``, the trial of the unpruned head; each choice by its name; ``candidates``, how
        many were tried; ``families``, FPR95 on each set of outliers before and after, and whether
        it decided; and ``doubts``, what speaks against the choice among all.
    """
    before, after = result.trials[0].fpr95, result.best.fpr95
    deciding = {name: (before[name], after[name], True) for name in before}
    reported = {name: (*pair, False) for name, pair in result.reported.items()}
    return {
        "unpruned": trial_record(result.trials[0], percentiles),
        **{name: choice_record(result.choices[name], percentiles) for name in choices},
        "candidates": len(result.trials),
        "families": {
            name: {"unpruned": unpruned, "chosen": chosen, "decides": decides}
            for name, (unpruned, chosen, decides) in (deciding | reported).items()
        },
        "doubts": result.doubts,
    }
