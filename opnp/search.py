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
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from math import isnan, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opnp.energy import bias_of, check_head
from opnp.errors import InputError
from opnp.masks import Percentages, PruningMask, check_percentages, pruned_count
from opnp.metrics import bootstrap_mean_fpr95, fpr95_auroc
from opnp.sensitivity import NeuronSensitivity, Sensitivity

__all__ = [
    "Candidate",
    "Choice",
    "Grid",
    "SearchResult",
    "Trial",
    "candidate_record",
    "choice_record",
    "search_masks",
    "trial_record",
]

MEMORY = 2**30  # bytes
BLOCK = 2**21  # numbers in the table of a block of samples: more leave the processor's caches
TINY = 1e-30  # of a sum of float32 exponentials: below, rounding may have eaten into it


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
    grid: Grid | None = None,
    *,
    labels: Tensor | None = None,
    max_accuracy_drop: float = 1.0,
    restrictions: Mapping[str, Callable[[Candidate], bool]] | None = None,
    resamples: int = 200,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[Iterator[Trial], int], Iterable[Trial]] = lambda trials, _: trials,
) -> SearchResult:
    """Try every mask of a grid and choose one.

    Args:
        head: the classifier's last layer, weight (K, L).
        id_features: ID validation features, (N, L), not clipped; never test features.
        outliers: features of each outlier set, (N_i, L), by name.
        sensitivity: of ``head``, over the training samples; several, of different clips and
            temperatures, search over these as well (see `opnp.sensitivity.measure`).
        grid: what to try of each.
        labels: of ``id_features``, (N,); without them accuracy is not constrained.
        max_accuracy_drop: how far ID accuracy may fall below the unpruned head's, in points.
        restrictions: further choices to make from the same trials, each among the candidates that a
            function allows.
        resamples: of the bootstrap behind each choice.
        seed: of the bootstrap.
        memory: bytes that blocks and scores may take, about.
        progress: wraps the trials, whose number it is told, while they are measured.

    Raises:
        InputError: shapes disagree, a set is empty, the grid is out of range, two sensitivities are
            of the same clip and temperature, or a restriction allows no candidate.
    """
    measured = [sensitivity] if isinstance(sensitivity, Sensitivity) else list(sensitivity)
    weight, bias = head.weight.detach(), bias_of(head)
    if not outliers:
        raise InputError("The search needs at least one set of outliers.")
    if not measured or len({(s.clip, s.temperature) for s in measured}) < len(measured):
        raise InputError("The search needs one sensitivity for each clip and temperature.")
    if resamples < 2 or "all" in (restrictions or {}):
        raise InputError("The search needs two resamples or more, and no restriction named `all`.")
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
    candidates = candidates_of(measured, grid or Grid())
    judge = Judge.of(head, id_features, outliers, labels, memory)
    by_candidate = {
        trial.candidate: trial
        for trial in progress(judge.trials(measured, candidates), len(candidates))
    }
    trials = [by_candidate[candidate] for candidate in candidates]
    choose_among = partial(choose, judge, measured, trials, max_accuracy_drop, resamples, seed)
    choices = {
        name: choose_among(allowed)
        for name, allowed in {"all": lambda _: True, **(restrictions or {})}.items()
    }
    best = choices["all"].trial.candidate
    return SearchResult(trials, choices, best.mask(setting_of(measured, best)))


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


@dataclass(frozen=True)
class Judge:
    """What candidates are judged on.

    Attributes:
        weight: of the head, (K, L).
        bias: of the head, (K,).
        samples: ID validation features, then those of each outlier set, not clipped.
        inside: how many of them are ID.
        sizes: of each outlier set.
        labels: of the ID samples, if known.
        memory: bytes that blocks and scores may take.
    """

    weight: Tensor
    bias: Tensor
    samples: Tensor
    inside: int
    sizes: dict[str, int]
    labels: Tensor | None
    memory: int

    @classmethod
    def of(
        cls,
        head: nn.Linear,
        id_features: Tensor,
        outliers: Mapping[str, Tensor],
        labels: Tensor | None = None,
        memory: int = MEMORY,
    ) -> "Judge":
        return cls(
            head.weight.detach(),
            bias_of(head),
            torch.cat([id_features, *outliers.values()]),
            len(id_features),
            {name: len(features) for name, features in outliers.items()},
            labels,
            memory,
        )

    def trials(
        self, measured: Sequence[Sensitivity], candidates: Sequence[Candidate]
    ) -> Iterator[Trial]:
        """Measure candidates, all of one table together; they come in the order of the tables."""
        for group, scores, hits, pruned in self.scored(measured, candidates):
            fpr95, auroc = fpr95_auroc(
                scores[:, : self.inside], scores[:, self.inside :], list(self.sizes.values())
            )
            for row, candidate in enumerate(group):
                yield Trial(
                    candidate,
                    dict(zip(self.sizes, fpr95[row].tolist(), strict=True)),
                    dict(zip(self.sizes, auroc[row].tolist(), strict=True)),
                    float("nan") if self.labels is None else 100 * int(hits[row]) / self.inside,
                    float(pruned[row]),
                )

    def scores(
        self, measured: Sequence[Sensitivity], candidates: Sequence[Candidate]
    ) -> dict[Candidate, Tensor]:
        """Outlier scores of all samples, (samples,), for a few candidates, in their order."""
        found = {
            candidate: row
            for group, scores, _, _ in self.scored(measured, candidates)
            for candidate, row in zip(group, scores, strict=True)
        }
        return {candidate: found[candidate] for candidate in candidates}

    def scored(
        self, measured: Sequence[Sensitivity], candidates: Sequence[Candidate]
    ) -> Iterator[tuple[list[Candidate], Tensor, Tensor, Tensor]]:
        """Groups of candidates, their outlier scores (group, samples), hits and pruned shares."""
        order = {(s.clip, s.temperature): place for place, s in enumerate(measured)}
        kinds = list(dict.fromkeys(candidate.neuron_sensitivity for candidate in candidates))

        def table(candidate: Candidate) -> tuple[int, int]:
            setting = order[candidate.clip, candidate.temperature]
            return setting, kinds.index(candidate.neuron_sensitivity)

        for (setting, kind), sharing in groupby(sorted(candidates, key=table), table):
            yield from self.of_table(measured[setting], kinds[kind], list(sharing))

    def of_table(
        self, sensitivity: Sensitivity, kind: NeuronSensitivity, candidates: list[Candidate]
    ) -> Iterator[tuple[list[Candidate], Tensor, Tensor, Tensor]]:
        """The candidates of one sensitivity and one definition of the neurons'."""
        neurons = Cuts.of([candidate.neurons for candidate in candidates], self.weight.shape[1])
        row_bytes = len(neurons.kept) * len(self.samples) * self.samples.element_size()
        step = max(1, self.memory // 2 // row_bytes)  # half for scores, half for blocks
        pairs = list(dict.fromkeys(candidate.weights for candidate in candidates))
        for start in range(0, len(pairs), step):
            part = pairs[start : start + step]
            scores, hits, pruned = self.table(sensitivity, kind, part, neurons)
            found = [candidate for candidate in candidates if candidate.weights in part]
            cells = [
                part.index(candidate.weights) * len(neurons.kept) + neurons.cell(candidate.neurons)
                for candidate in found
            ]
            yield found, scores.flatten(0, 1)[cells], hits.flatten()[cells], pruned.flatten()[cells]

    def table(
        self,
        sensitivity: Sensitivity,
        kind: NeuronSensitivity,
        weights: list[Percentages],
        n: "Cuts",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outlier scores (weights, cells, samples), ID hits and pruned shares (weights, cells).

        A cell is a pair of cuts of the neurons, see `Cuts.kept`.
        """
        device, dtype = self.samples.device, self.samples.dtype
        k, width = self.weight.shape
        w, t = Cuts.of(weights, k * width), sensitivity.temperature
        ascending = torch.argsort(sensitivity.neurons(kind), stable=True).to(device)
        rank = torch.empty(k * width, dtype=torch.int64)
        rank[torch.argsort(sensitivity.weights.flatten(), stable=True)] = torch.arange(k * width)
        rank = rank.reshape(k, width).to(device)[:, ascending]
        head, bias = (part.to(device, dtype) / t for part in (self.weight, self.bias))
        head = head[:, ascending]
        kept = [(rank >= low) & (rank < high) for low, high in w.intervals]
        # The head as each cut of the weights leaves it, one below another: (cuts · K, L).
        heads = torch.cat([head * part for part in kept])
        # The bias counts to the low side, as the middle does.
        biases = torch.zeros(len(w.intervals), k, device=device, dtype=dtype)
        biases[: len(w.low)] = bias
        columns = torch.stack([part.sum(dim=0) for part in kept]).cumsum(dim=1)
        columns = nn.functional.pad(columns, (1, 0))  # kept weights in the first 0, 1, … L neurons
        bounds = torch.tensor(n.kept, device=device)
        pruned = torch.stack(
            [
                1 - (columns[low] + columns[high])[bounds].diff().squeeze(1).double() / (k * width)
                for low, high in map(w.parts, weights)
            ]
        )

        lows, corners = len(n.low), (len(w.intervals), len(n.intervals))
        block = min(BLOCK, self.memory // 4 // self.samples.element_size()) // (k * prod(corners))
        block = max(64, block)
        # ID samples and outliers in blocks of their own: only the former have labels.
        starts = [*range(0, self.inside, block), *range(self.inside, len(self.samples), block)]
        scores = self.samples.new_empty(len(weights), len(n.kept), len(self.samples))
        hits = torch.zeros(len(weights), len(n.kept), device=device, dtype=torch.int64)
        # Of each corner the greatest partial logit, and the exponentials of all relative to it.
        tops = self.samples.new_empty(corners[0], block, corners[1])
        powers = self.samples.new_empty(corners[0], block, corners[1], k)
        votes: Iterator[Tensor]
        for start, stop in zip(starts, [*starts[1:], len(self.samples)], strict=True):
            h = self.samples[start:stop].index_select(1, ascending)
            if sensitivity.clip is not None:
                h = h.clamp(max=sensitivity.clip)
            power, top = powers[:, : len(h)], tops[:, : len(h)]
            for side, outermost in ((n.outwards[:lows], biases), (n.outwards[lows:], 0 * biases)):
                partial_logits = outermost.flatten()
                for place, (a, b) in side:
                    partial_logits = torch.addmm(partial_logits, h[:, a:b], heads[:, a:b].T)
                    corner = partial_logits.view(len(h), -1, k)
                    greatest = corner.amax(dim=2, keepdim=True)
                    top[:, :, place] = greatest.squeeze(2).T
                    power[:, :, place] = (corner - greatest).exp_().transpose(0, 1)
            for row, (low, high) in enumerate(map(w.parts, weights)):
                terms = power[low] * power[high]  # (B, neuron cuts, K)
                shift = top[low] + top[high]
                sums = terms[:, :lows] @ terms[:, lows:].transpose(1, 2)  # over the classes
                if sums.min() > TINY:
                    energy = sums.log_().add_(shift[:, :lows, None]).add_(shift[:, None, lows:])
                    pairs = product(range(lows), range(lows, corners[1]))
                    votes = (terms[:, a] * terms[:, b] for a, b in pairs)
                else:
                    pruned_head = head * (kept[low] | kept[high])
                    cells = [h[:, a:b] @ pruned_head[:, a:b].T + bias for a, b in n.kept]
                    energy = torch.stack([cell.logsumexp(dim=1) for cell in cells], dim=1)
                    votes = iter(cells)
                scores[row, :, start:stop] = energy.mul_(-t).flatten(1).T
                if self.labels is not None and start < self.inside:
                    labels = self.labels[start:stop].to(device)
                    for cell, vote in enumerate(votes):
                        hits[row, cell] += (vote.argmax(dim=1) == labels).sum()
        return scores, hits, pruned


@dataclass(frozen=True)
class Cuts:
    """The intervals of an ascending order that low and high cuts leave, each in two parts.

    Every low cut must end before every high cut begins, as in a valid `Grid`.

    Attributes:
        n: length of the order.
        low: where low cuts begin, ascending; their parts end where the greatest high cut begins.
        high: where high cuts end, ascending; their parts begin there.
    """

    n: int
    low: list[int]
    high: list[int]

    @classmethod
    def of(cls, percentages: Sequence[Percentages], n: int) -> "Cuts":
        return cls(
            n,
            sorted({pruned_count(n, low) for low, _ in percentages}),
            sorted({n - pruned_count(n, high) for _, high in percentages}),
        )

    @property
    def intervals(self) -> list[tuple[int, int]]:
        """The parts of all low cuts, then those of all high cuts."""
        middle = self.high[0]
        return [(a, middle) for a in self.low] + [(middle, b) for b in self.high]

    @property
    def outwards(self) -> list[tuple[int, tuple[int, int]]]:
        """The places of the low, then of the high parts, each from the middle outwards; beside each
        what it has more than the one before."""
        middle = self.high[0]
        lows = list(zip(self.low, [*self.low[1:], middle], strict=True))
        highs = list(zip([middle, *self.high[:-1]], self.high, strict=True))
        places = list(enumerate([*lows, *highs]))
        return places[: len(lows)][::-1] + places[len(lows) :]

    @property
    def kept(self) -> list[tuple[int, int]]:
        """What each cell, a low cut with a high cut, keeps."""
        return list(product(self.low, self.high))

    def parts(self, percentages: Percentages) -> tuple[int, int]:
        """The places among the intervals of the two parts that a pair of percentages keeps."""
        low, high = (pruned_count(self.n, percentage) for percentage in percentages)
        return self.low.index(low), len(self.low) + self.high.index(self.n - high)

    def cell(self, percentages: Percentages) -> int:
        """The place among the cells of a pair of percentages."""
        low, high = self.parts(percentages)
        return low * len(self.high) + high - len(self.low)


def choose(
    judge: Judge,
    measured: Sequence[Sensitivity],
    trials: Sequence[Trial],
    max_accuracy_drop: float,
    resamples: int,
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
        max_accuracy_drop: in points.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        allowed: restricts the choice, to weight pruning alone, say.
    """
    floor = trials[0].accuracy - max_accuracy_drop
    # Without labels accuracies are NaN, and no comparison with NaN holds: nothing is excluded.
    accurate = [t for t in trials if allowed(t.candidate) and not t.accuracy < floor - 1e-9]
    if not accurate:
        raise InputError(
            "No candidate is allowed and keeps the accuracy: widen the grid, or max_accuracy_drop."
        )
    front = pareto_front(accurate)
    candidates = [trial.candidate for trial in front]
    figures = bootstrap_means(judge, judge.scores(measured, candidates), resamples, seed)
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
