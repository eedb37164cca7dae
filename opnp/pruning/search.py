"""The search for the best mask, without real OOD data.

Every combination of percentages, neuron sensitivity, clip and temperature is judged by how well the
pruned head's energy separates in-distribution (ID) validation features from proxy outliers: by the
mean FPR95 over the outlier sets, under the constraint that ID accuracy may drop only so much. Among
the candidates within noise of the best the one that prunes least is chosen.

Masks of one sensitivity are nested, so a candidate needs no matrix product of its own. Sort weights
and neurons by sensitivity; a candidate keeps an interval of either order, and all intervals share
their middle. With the middle counted to the low side, logits are the sum of four partial products,

    f(wl, wh, nl, nh) = [wl, nl] + [wl, nh] + [wh, nl] + [wh, nh] + b,

one for each pair of a low or high cut of the weights and one of the neurons: the four corners of a
summed-area table (Crow, SIGGRAPH 1984), without its subtractions. The exponentials of sums being
products, so is Σ exp f: one small matrix product over the classes gives the energies of all neuron
cuts at once, and an exponential is taken only for each corner.
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
from opnp.pruning.energy import bias_of, check_head
from opnp.pruning.masks import PruningMask
from opnp.pruning.sensitivity import Sensitivity
from opnp.pruning.settings import SearchSettings
from opnp.pruning.table import MEMORY, Judge

__all__ = ["Choice", "SearchResult", "choice_record", "search_masks"]


@dataclass(frozen=True)
class Choice:
    """The trial that a search chose, and how sure it was.

    Attributes:
        trial: the chosen one.
        lowest: the trial of lowest mean FPR95, stable or not; it may have been chosen as well.
        interval: 95 % bootstrap interval of the chosen trial's mean FPR95, in percent.
        within_noise: number of trials no more than a standard error above the figure that is lowest
            with its instability added.
        instability: half the difference, in points of mean FPR95, between the masks that either
            half of the training samples makes of the candidate; NaN if there are no halves.
    """

    trial: Trial
    lowest: Trial
    interval: tuple[float, float]
    within_noise: int
    instability: float


@dataclass(frozen=True)
class SearchResult:
    """All trials, the chosen one, and its mask.

    Attributes:
        trials: one for each candidate, in their order; the first is the unpruned head.
        choices: the choice among all trials, named ``all``, and those of each named restriction.
        mask: of the choice among all.
    """

    trials: list[Trial]
    choices: dict[str, Choice]
    mask: PruningMask

    @property
    def best(self) -> Trial:
        """The chosen trial among all."""
        return self.choices["all"].trial


@torch.no_grad()
def search_masks(
    head: nn.Linear,
    id_features: Tensor,
    outliers: Mapping[str, Tensor],
    sensitivity: Sensitivity | Sequence[Sensitivity],
    settings: SearchSettings | None = None,
    *,
    labels: Tensor | None = None,
    restrictions: Mapping[str, Callable[[Candidate], bool]] | None = None,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[Iterator[Trial], int], Iterable[Trial]] = lambda trials, _: trials,
) -> SearchResult:
    """Try every mask of a grid and choose one.

    Args:
        head: the classifier's last layer, weight (K, L).
        id_features: ID validation features, shape (N, L), not clipped; never test features.
        outliers: features of each outlier set by its name, each of shape (N_i, L), not clipped.
        sensitivity: sensitivity of ``head`` over the training samples. Several, at different clips
            and temperatures, extend the search to those; `opnp.pruning.sensitivity.measure` gives
            them.
        settings: what to try and how to choose. Clips and temperatures are taken from
            ``sensitivity``, which was measured at them; those of the settings are not used here.
        labels: classes of ``id_features``, shape (N,); without them accuracy is not constrained.
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
    (14, torch.Size([3, 8]))
    """
    settings = settings or SearchSettings()
    measured = [sensitivity] if isinstance(sensitivity, Sensitivity) else list(sensitivity)
    weight, bias = head.weight.detach(), bias_of(head)
    if not outliers:
        raise InputError("The search needs at least one set of outliers.")
    if not measured or len({(s.clip, s.temperature) for s in measured}) < len(measured):
        raise InputError("The search needs one sensitivity for each clip and temperature.")
    if "all" in (restrictions or {}):
        raise InputError("`all` names the choice among all candidates: rename that restriction.")
    for name, features in {"ID validation": id_features, **outliers}.items():
        check_head(features, weight, bias, min(each.temperature for each in measured))
        if len(features) == 0:
            raise InputError(f"The set {name!r} is empty: the search needs samples in every set.")
    if labels is not None and labels.shape != id_features.shape[:1]:
        raise InputError(
            f"There are {tuple(labels.shape)} labels for {len(id_features)} ID features: "
            "give one for each."
        )
    for each in measured:
        if each.weights.shape != weight.shape:
            raise InputError(
                f"The sensitivity is of a head {tuple(each.weights.shape)}, this one is "
                f"{tuple(weight.shape)}: measure this head's."
            )
    candidates = candidates_of(measured, settings)
    judge = Judge.of(head, id_features, outliers, labels, memory)
    by_candidate = {
        trial.candidate: trial
        for trial in progress(judge.trials(measured, candidates), len(candidates))
    }
    trials = [by_candidate[candidate] for candidate in candidates]
    choose_among = partial(choose, judge, measured, trials, settings, seed)
    choices = {
        name: choose_among(allowed)
        for name, allowed in {"all": lambda _: True, **(restrictions or {})}.items()
    }
    best = choices["all"].trial.candidate
    return SearchResult(trials, choices, best.mask(setting_of(measured, best)))


def choose(
    judge: Judge,
    measured: Sequence[Sensitivity],
    trials: Sequence[Trial],
    settings: SearchSettings,
    seed: int,
    allowed: Callable[[Candidate], bool],
) -> Choice:
    """The trial that prunes least among those within noise of the lowest mean FPR95.

    Noise is one standard error (Breiman et al., "Classification and Regression Trees", 1984,
    section 3.4.3) of the difference in mean FPR95, by a bootstrap over the samples of the ID set
    and of each outlier set, the same draws for every candidate. To a figure the candidate's
    instability is added first, so that masks which depend on the choice of training samples come
    later.

    Args:
        judge: scores the candidates in question once more.
        measured: the sensitivities, with their halves if there are any.
        trials: the first is the unpruned head, which accuracy is compared with.
        settings: how much accuracy may be lost, and the number of resamples.
        seed: seed of the bootstrap.
        allowed: says which candidates may be chosen, such as those that prune weights only.

    Raises:
        InputError: no allowed candidate keeps the accuracy.
    """
    floor = trials[0].accuracy - settings.max_accuracy_drop
    # Without labels accuracies are NaN, and no comparison with NaN holds: nothing is excluded.
    accurate = [t for t in trials if allowed(t.candidate) and not t.accuracy < floor - 1e-9]
    if not accurate:
        raise InputError(
            "No allowed candidate keeps the accuracy: try smaller percentages, or allow a larger "
            "drop in accuracy."
        )
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
    """Those which no other trial both prunes less than and has a lower mean FPR95 than.

    From the least pruned to the lowest FPR95. AUROC breaks ties of FPR95, then the order of trials.
    """
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.pruned, trial.rank)):
        if not front or trial.rank < front[-1].rank:
            front.append(trial)
    return front


def bootstrap_means(
    judge: Judge, scores: Mapping[Candidate, Tensor], resamples: int, seed: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Mean FPR95 in percent of candidates in each resample of all sets, (candidates, resamples)."""
    stacked = torch.stack(list(scores.values())).cpu()
    inside, outside = stacked[:, : judge.inside], stacked[:, judge.inside :]
    return bootstrap_mean_fpr95(inside, outside, list(judge.sizes.values()), resamples, seed)


def instabilities(
    judge: Judge, measured: Sequence[Sensitivity], candidates: Sequence[Candidate]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Half the difference between the figures of each half's masks, in points; NaN without halves.

    That is the standard error of a mean of two, here of two halves of the training samples.
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
    """The chosen trial and how sure the choice was, as files have it."""
    return trial_record(choice.trial, percentiles) | {
        "interval": {"low": choice.interval[0], "high": choice.interval[1]},
        "within_noise": choice.within_noise,
        "instability": None if isnan(choice.instability) else choice.instability,
        "lowest": choice.lowest.mean_fpr95,
    }
