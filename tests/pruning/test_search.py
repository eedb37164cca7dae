"""The mask search against brute force, and its choice against a naive one and cases by hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from math import nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from opnp.errors import InputError
from opnp.pruning import table
from opnp.pruning.candidates import Candidate, Trial, grid
from opnp.pruning.energy import energy_score, linear_head
from opnp.pruning.masks import PruningMask, keep
from opnp.pruning.search import (
    Choice,
    SearchResult,
    bootstrap_means,
    choose,
    pareto_front,
    search_masks,
)
from opnp.pruning.sensitivity import Sensitivity, SensitivitySums, measure
from opnp.pruning.settings import NeuronSensitivity, SearchSettings
from opnp.pruning.table import Judge

# float64 throughout, so that the order in which logits are summed decides no comparison of scores
K, WIDTH, TEMPERATURE = 4, 20, 1.5
GRID = SearchSettings(
    weights_low=(0, 30), weights_high=(0, 2.5, 10), neurons_low=(0, 10), neurons_high=(0, 5, 20)
)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]

Doubles = NDArray[np.float64]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are too small to share: on busy cores threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(head: nn.Linear, features: Tensor, temperature: float = 1.0) -> Sensitivity:
    return SensitivitySums.of(features, head.weight, head.bias, temperature).mean()


HEAD = linear_head(drawn(0, K, WIDTH), drawn(1, K))
VALIDATION = drawn(2, 61, WIDTH).relu()
LABELS = HEAD(VALIDATION).argmax(dim=1)
LABELS[:9] = (LABELS[:9] + 1) % K  # the unpruned head errs, too
OUTLIERS = {"near": 0.8 * drawn(3, 40, WIDTH).relu(), "far": 3 * drawn(4, 33, WIDTH).abs() - 2}
SENSITIVITY = measured(HEAD, drawn(5, 300, WIDTH).relu(), TEMPERATURE)


def searched(labels: Tensor | None = LABELS, drop: float = 100.0, **options: Any) -> SearchResult:
    return search_masks(
        HEAD,
        VALIDATION,
        OUTLIERS,
        SENSITIVITY,
        GRID.model_copy(update={"max_accuracy_drop": drop}),
        labels=labels,
        **options,
    )


@pytest.fixture(scope="module")
def unconstrained() -> SearchResult:
    return searched()


def rank(trial: Trial) -> tuple[float, float, float]:
    fpr95 = sum(trial.fpr95.values()) / len(trial.fpr95)
    auroc = sum(trial.auroc.values()) / len(trial.auroc)
    return round(fpr95, 9), -round(auroc, 9), trial.pruned


def trial(
    fpr95: float, auroc: float, pruned: float, accuracy: float = 90.0, low: float = 0.0
) -> Trial:
    return Trial(Candidate((low, 0.0)), {"a": fpr95}, {"a": auroc}, accuracy, pruned)


@dataclass(frozen=True)
class Scripted(Judge):
    """A judge whose scores are given for each candidate, under the sensitivity of each count."""

    script: dict[int, dict[Candidate, Tensor]] = field(default_factory=dict)

    def scored(self, measured: Sequence[Sensitivity], candidates: Sequence[Candidate]) -> Any:
        for candidate in candidates:
            row = self.script[measured[0].count][candidate]
            yield [candidate], row[None], torch.zeros(1), torch.zeros(1)


def scripted(
    sizes: dict[str, int], inside: int, *scripts: Mapping[Candidate, Tensor]
) -> tuple[Scripted, Sensitivity]:
    """A judge, and the sensitivity to ask it with, which has halves if there are three scripts."""
    nothing = torch.zeros(1, 1)
    whole, *halves = (
        Sensitivity(nothing, nothing[0], nothing[0], nothing[0], count)
        for count in range(len(scripts))
    )
    judge = Scripted(
        nothing,
        nothing[0],
        nothing,
        inside,
        sizes,
        None,
        2**20,
        {count: dict(script) for count, script in enumerate(scripts)},
    )
    return judge, replace(whole, halves=(halves[0], halves[1]) if halves else None)


def everything(_: Candidate) -> bool:
    return True


def without_noise(trials: Sequence[Trial], max_accuracy_drop: float = 1.0) -> Choice:
    """The choice where resampling changes nothing."""
    sizes = dict.fromkeys(trials[0].fpr95, 1)
    judge, sensitivity = scripted(
        sizes, 2, {t.candidate: torch.zeros(2 + len(sizes)) for t in trials}
    )
    few = SearchSettings(max_accuracy_drop=max_accuracy_drop, bootstrap=3)
    return choose(judge, [sensitivity], trials, few, 0, everything)


def settings(candidates: Sequence[Candidate], *measured: Sensitivity) -> list[Candidate]:
    """The candidates at the clip and temperature of each sensitivity."""
    return [
        replace(candidate, clip=each.clip, temperature=each.temperature)
        for each in measured
        for candidate in candidates
    ]


SETTINGS: dict[str, Any] = {"clip": None, "temperature": TEMPERATURE}


def test_every_trial_equals_pruning_and_scoring_from_scratch(unconstrained: SearchResult) -> None:
    for found in unconstrained.trials:
        c = found.candidate
        mask = PruningMask.from_sensitivity(
            SENSITIVITY.weights, SENSITIVITY.neurons(c.neuron_sensitivity), c.weights, c.neurons
        )
        pruned = mask.apply(HEAD)
        inside = energy_score(pruned(VALIDATION), TEMPERATURE).numpy()
        kept = np.sort(inside)[::-1][int(np.ceil(0.95 * len(inside))) - 1]
        for name, features in OUTLIERS.items():
            outside = energy_score(pruned(features), TEMPERATURE).numpy()
            is_id = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
            auroc = 100 * roc_auc_score(is_id, np.r_[inside, outside])
            assert found.fpr95[name] == pytest.approx(100 * np.mean(outside >= kept), abs=1e-9)
            assert found.auroc[name] == pytest.approx(auroc, abs=1e-9)
        hits = (pruned(VALIDATION).argmax(dim=1) == LABELS).double().mean()
        assert found.accuracy == pytest.approx(100 * float(hits), abs=1e-9)
        assert found.pruned == pytest.approx(mask.pruned, abs=1e-12)


def test_the_trials_are_the_grids_candidates_in_order(unconstrained: SearchResult) -> None:
    assert [t.candidate for t in unconstrained.trials] == settings(grid(GRID), SENSITIVITY)


def test_the_lowest_trial_ranks_first(unconstrained: SearchResult) -> None:
    assert unconstrained.choices["all"].lowest == min(unconstrained.trials, key=rank)


def test_the_best_is_the_choice_among_all_and_its_mask_is_returned(
    unconstrained: SearchResult,
) -> None:
    best = unconstrained.choices["all"].trial
    assert unconstrained.best == best
    assert best in unconstrained.trials
    mask = best.candidate.mask(SENSITIVITY)
    assert not mask.kept.all()
    assert torch.equal(unconstrained.mask.weights, mask.weights)
    assert torch.equal(unconstrained.mask.neurons, mask.neurons)


def test_the_grid_has_each_distinct_mask_once() -> None:
    candidates = grid(
        SearchSettings(
            weights_low=(0, 30, 0.0),
            weights_high=(0, 1),
            neurons_low=(0, 10),
            neurons_high=(0, 5, 5.0),
            neuron_sensitivity=("mean", "taylor"),
        )
    )
    expected = {
        (wl, wh, nl, nh, kind if nl or nh else "any")
        for wl, wh, nl, nh, kind in product((0, 30), (0, 1), (0, 10), (0, 5), ("mean", "taylor"))
    }
    found = [
        (*c.weights, *c.neurons, c.neuron_sensitivity if any(c.neurons) else "any")
        for c in candidates
    ]
    assert len(found) == len(expected) == 4 + 4 * 3 * 2
    assert set(found) == expected


@pytest.mark.parametrize(
    "percentages",
    [
        {},
        {"weights_low": (30, 0), "weights_high": (5, 0)},
        dict.fromkeys(("weights_low", "weights_high", "neurons_low", "neurons_high"), (5,)),
    ],
)
def test_the_unpruned_head_comes_first_whatever_the_grid(percentages: dict[str, Any]) -> None:
    candidates = grid(SearchSettings(**percentages))
    assert candidates[0] == Candidate((0, 0), (0, 0))
    assert len(set(candidates)) == len(candidates)


@pytest.mark.parametrize("drop", [0.0, 1.0, 5.0, 20.0])
def test_the_best_trial_keeps_the_accuracy(unconstrained: SearchResult, drop: float) -> None:
    trials = unconstrained.trials
    allowed = [t for t in trials if t.accuracy >= trials[0].accuracy - drop - 1e-9]
    assert len(allowed) < len(trials)
    found = searched(drop=drop)
    assert found.choices["all"].lowest == min(allowed, key=rank)
    assert found.best in allowed


def test_a_drop_of_exactly_the_maximum_is_allowed() -> None:
    trials = [trial(50, 60, 0, accuracy=90.1), trial(10, 60, 0.1, accuracy=89.1, low=1)]
    for drop, expected in ((1.0, trials[1]), (0.99, trials[0])):
        found = without_noise(trials, max_accuracy_drop=drop)
        assert found.lowest is expected
        assert found.trial is expected


def test_without_labels_there_is_no_constraint(unconstrained: SearchResult) -> None:
    found = searched(labels=None, drop=0.0)
    assert all(np.isnan(t.accuracy) for t in found.trials)
    assert found.best.candidate == unconstrained.best.candidate
    assert found.choices["all"].lowest.candidate == unconstrained.choices["all"].lowest.candidate


def test_auroc_breaks_ties_of_fpr95() -> None:
    trials = [
        trial(20, 80, 0),
        trial(20, 90, 0.5, low=1),
        trial(20, 85, 0.1, low=2),
        trial(21, 99, 0, low=3),
    ]
    assert without_noise(trials).lowest is trials[1]


def test_the_smaller_pruned_share_breaks_ties_of_auroc() -> None:
    trials = [
        trial(30, 80, 0),
        trial(20, 90, 0.5, low=1),
        trial(20, 90, 0.1, low=2),
        trial(20, 90, 0.2, low=3),
    ]
    assert without_noise(trials).lowest is trials[2]


def test_the_earlier_trial_wins_what_is_still_tied() -> None:
    trials = [trial(30, 80, 0), trial(20, 90, 0.5, low=10), trial(20, 90, 0.5, low=20)]
    assert without_noise(trials).lowest is trials[1]


def test_rounding_noise_breaks_no_ties() -> None:
    trials = [trial(20 + 1e-12, 80 - 1e-12, 0.1), trial(20, 80, 0.2, low=1)]
    assert without_noise(trials).lowest is trials[0]


def test_the_mean_over_the_sets_decides() -> None:
    def two(a: float, b: float, pruned: float, low: float) -> Trial:
        return Trial(Candidate((low, 0.0)), {"a": a, "b": b}, {"a": 50, "b": 50}, nan, pruned)

    trials = [two(50, 50, 0, 0), two(0, 90, 0.1, 1), two(60, 60, 0.1, 2)]
    assert trials[1].mean_fpr95 == 45
    assert without_noise(trials).lowest is trials[1]


@pytest.mark.parametrize("part", ["weights", "neurons"])
def test_the_choice_can_be_restricted_to_opp_or_onp(unconstrained: SearchResult, part: str) -> None:
    other = {"weights": "neurons", "neurons": "weights"}[part]
    allowed = [t for t in unconstrained.trials if getattr(t.candidate, other) == (0, 0)]
    found = searched(restrictions={"part": lambda c: bool(getattr(c, other) == (0, 0))})
    assert list(found.choices) == ["all", "part"]
    assert repr(found.choices["all"]) == repr(unconstrained.choices["all"])
    assert found.choices["part"].lowest == min(allowed, key=rank)
    assert found.choices["part"].trial in allowed
    assert getattr(found.choices["part"].lowest.candidate, part) != (0, 0)  # it is seen to work
    assert found.choices["part"].lowest != unconstrained.choices["all"].lowest


def test_outliers_like_the_validation_set_leave_the_head_unpruned() -> None:
    found = search_masks(HEAD, VALIDATION, {"same": VALIDATION}, SENSITIVITY, GRID)
    assert found.best.candidate == Candidate(**SETTINGS)
    assert found.mask.kept.all()


ONLY: dict[str, Any] = {
    "weights_low": (0,),
    "weights_high": (0,),
    "neurons_low": (0,),
    "neurons_high": (0,),
    "neuron_sensitivity": ("mean",),
}


@pytest.mark.parametrize(
    ("pruned", "percent", "excitation"),
    [
        ("neurons_low", 10, 0.0),  # ID samples never excite neuron 9
        ("weights_low", 10, 0.0),
        ("neurons_high", 10, 50.0),  # ID samples excite it most
        ("weights_high", 10, 50.0),
    ],
)
def test_the_neuron_that_misleads_is_found_and_removed(
    pruned: str, percent: float, excitation: float
) -> None:
    # S = Σ_j h_j + log 2: without neuron 9 at least 18 for ID and at most 9 for outliers.
    rng = torch.Generator().manual_seed(0)
    head = linear_head(torch.ones(2, 10), torch.zeros(2))
    inside, outside = (torch.rand(50, 10, generator=rng) for _ in range(2))
    inside += 2
    inside[:, 9], outside[:, 9] = excitation, excitation + 100
    found = search_masks(
        head,
        inside,
        {"misleading": outside},
        measured(head, inside),
        SearchSettings(**{**ONLY, pruned: (0, percent)}),
    )
    assert (found.trials[0].mean_fpr95, found.trials[0].mean_auroc) == (100, 0)
    assert (found.best.mean_fpr95, found.best.mean_auroc) == (0, 100)
    assert (~found.mask.kept).nonzero().tolist() == [[0, 9], [1, 9]]


def test_a_head_without_bias_is_searched_as_one_with_a_zero_bias() -> None:
    bare = nn.Linear(WIDTH, K, bias=False, dtype=torch.float64).requires_grad_(False)
    bare.weight.copy_(HEAD.weight)
    zero = linear_head(bare.weight, torch.zeros(K, dtype=torch.float64))
    trials = [
        search_masks(
            head,
            VALIDATION,
            OUTLIERS,
            SENSITIVITY,
            SearchSettings(**{**ONLY, "weights_high": (0, 5)}),
        ).trials
        for head in (bare, zero)
    ]
    assert repr(trials[0]) == repr(trials[1])


@pytest.mark.parametrize(
    ("inside", "outliers", "named"),
    [
        (VALIDATION, {}, "at least one set of outliers"),
        (VALIDATION, {"fine": VALIDATION, "bare": VALIDATION[:0]}, "'bare' is empty"),
        (VALIDATION[:0], OUTLIERS, "'ID validation' is empty"),
        (VALIDATION[:, :3], OUTLIERS, "shape"),
        (VALIDATION, {"narrow": VALIDATION[:, :3]}, "shape"),
        (VALIDATION, {"broken": VALIDATION * nan}, "NaN"),
    ],
    ids=["no sets", "empty set", "empty validation", "validation width", "set width", "nan"],
)
def test_sets_that_cannot_be_searched_are_refused(
    inside: Tensor, outliers: dict[str, Tensor], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        search_masks(HEAD, inside, outliers, SENSITIVITY, GRID)


@pytest.mark.parametrize("count", [1, 60])
def test_labels_of_another_length_are_refused(count: int) -> None:
    with pytest.raises(InputError):
        search_masks(HEAD, VALIDATION, OUTLIERS, SENSITIVITY, GRID, labels=LABELS[:count])


@pytest.mark.parametrize(("k", "width"), [(K, WIDTH + 1), (1, WIDTH), (K + 1, WIDTH)])
def test_the_sensitivity_of_another_head_is_refused(k: int, width: int) -> None:
    other = linear_head(drawn(6, k, width), drawn(7, k))
    with pytest.raises(InputError):
        search_masks(HEAD, VALIDATION, OUTLIERS, measured(other, drawn(8, 9, width)), GRID)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    other = replace(SENSITIVITY, temperature=temperature)
    with pytest.raises(InputError, match="temperature"):
        search_masks(HEAD, VALIDATION, OUTLIERS, other, GRID)


def test_no_sensitivity_and_two_of_one_setting_are_refused() -> None:
    for several in ([], [SENSITIVITY, replace(SENSITIVITY, count=7)]):
        with pytest.raises(InputError, match="one sensitivity for each clip and temperature"):
            search_masks(HEAD, VALIDATION, OUTLIERS, several, GRID)


@pytest.mark.parametrize(
    "percentages",
    [
        {"weights_low": (0, 60), "weights_high": (0, 40)},
        {"neurons_low": (0,), "neurons_high": (0, 100)},
        {"weights_low": (-5, 0)},
        {"neurons_high": (0, -1, 5)},
        {"neurons_low": (0, nan)},
    ],
    ids=str,
)
def test_a_grid_out_of_range_is_refused_by_name(percentages: dict[str, Any]) -> None:
    name = next(iter(percentages)).split("_")[0]
    with pytest.raises(ValidationError, match=name):
        SearchSettings(**percentages)


# What tables of partial sums give must be what a product for each candidate gives.


@dataclass(frozen=True)
class Case:
    """A head, training features, and samples: ID, then outlier sets of the sizes given."""

    weight: Tensor
    bias: Tensor
    training: Tensor
    samples: Tensor
    inside: int
    sizes: tuple[int, ...]
    labels: Tensor | None = None

    def judge(self, memory: int = 2**30) -> Judge:
        sizes = {str(place): size for place, size in enumerate(self.sizes)}
        return Judge(self.weight, self.bias, self.samples, self.inside, sizes, self.labels, memory)

    def on(self, device: str) -> "Case":
        return replace(
            self,
            weight=self.weight.to(device),
            bias=self.bias.to(device),
            training=self.training.to(device),
            samples=self.samples.to(device),
        )


def case(
    seed: int,
    k: int,
    width: int,
    inside: int,
    sizes: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    relu: bool = False,
    scale: float = 1.0,
) -> Case:
    """Random normal values throughout; ``scale`` is that of the weights."""
    shapes = ((k, width), (k,), (50, width), (inside + sum(sizes), width))
    weight, bias, training, samples = (
        drawn(4 * seed + place, *shape).to(dtype) for place, shape in enumerate(shapes)
    )
    samples[inside:] *= 1.3
    if relu:
        training, samples = training.relu(), samples.relu()
    labels = torch.randint(k, (inside,), generator=torch.Generator().manual_seed(seed))
    return Case(scale * weight, bias, training, samples, inside, sizes, labels)


@dataclass(frozen=True)
class Expected:
    """What brute force finds of each candidate, in order: one product each, in float64."""

    scores: Doubles  # (candidates, samples)
    magnitude: Doubles  # (candidates,), of the scores
    accuracy: Doubles  # (candidates,)
    pruned: Doubles  # (candidates,)


def brute_force(
    case: Case, measured: Sequence[Sensitivity], candidates: Sequence[Candidate]
) -> Expected:
    by_setting = {(s.clip, s.temperature): s for s in measured}
    kept: dict[tuple[object, ...], Tensor] = {}
    masks = []
    for c in candidates:
        sensitivity, kind = by_setting[c.clip, c.temperature], c.neuron_sensitivity
        weights = (c.clip, c.temperature, c.weights)
        neurons = (c.clip, c.temperature, c.neurons, kind)
        if weights not in kept:
            kept[weights] = keep(sensitivity.weights, c.weights)
        if neurons not in kept:
            kept[neurons] = keep(sensitivity.neurons(kind), c.neurons)
        masks.append(kept[weights] & kept[neurons])
    mask = torch.stack(masks)
    temperature = torch.tensor([c.temperature for c in candidates], dtype=torch.float64)
    clips = [torch.inf if c.clip is None else c.clip for c in candidates]
    clip = torch.tensor(clips, dtype=torch.float64)[:, None, None]
    weight, bias, h = (t.double().cpu() for t in (case.weight, case.bias, case.samples))
    logits = h.minimum(clip) @ (weight * mask).transpose(1, 2) + bias  # (candidates, samples, K)
    scores = -temperature[:, None] * (logits / temperature[:, None, None]).logsumexp(dim=2)
    assert case.labels is not None
    hits = logits[:, : case.inside].argmax(dim=2) == case.labels
    return Expected(
        scores.numpy(),
        scores.abs().amax(dim=1).clamp(min=1).numpy(),
        100 * hits.double().mean(dim=1).numpy(),
        1 - mask.double().mean(dim=(1, 2)).numpy(),
    )


def naive_fpr95(inside: Doubles, outside: Doubles) -> Doubles:
    """In percent, at the smallest score that keeps at least 95 % of ID; rows (..., n), (..., m)."""
    kept = np.sum(inside[..., None, :] <= inside[..., :, None], axis=-1)  # if each were it
    threshold = np.where(100 * kept >= 95 * inside.shape[-1], inside, np.inf).min(axis=-1)
    found: Doubles = 100 * np.mean(outside <= threshold[..., None], axis=-1)
    return found


def naive_auroc(inside: Doubles, outside: Doubles) -> Doubles:
    """In percent: how often an outlier outscores an ID sample, ties counting half."""
    larger = outside[..., :, None] > inside[..., None, :]
    tied = outside[..., :, None] == inside[..., None, :]
    found: Doubles = 100 * np.mean(larger + tied / 2, axis=(-2, -1))
    return found


def assert_figures(trials: Sequence[Trial], scores: Doubles, case: Case) -> None:
    """FPR95 and AUROC of each trial are those of its scores."""
    inside, *sets = np.split(scores, case.inside + np.cumsum([0, *case.sizes])[:-1], axis=1)
    for place, outside in enumerate(sets):
        for naive, found in (
            (naive_fpr95, [trial.fpr95[str(place)] for trial in trials]),
            (naive_auroc, [trial.auroc[str(place)] for trial in trials]),
        ):
            np.testing.assert_allclose(found, naive(inside, outside), rtol=0, atol=1e-9)


def judged(
    case: Case,
    measured: Sequence[Sensitivity],
    candidates: Sequence[Candidate],
    memory: int = 2**30,
) -> tuple[Doubles, list[Trial]]:
    """Scores and trials of the candidates, in their order."""
    judge = case.judge(memory)
    scores = judge.scores(measured, candidates)
    assert list(scores) == list(dict.fromkeys(candidates))
    assert {row.dtype for row in scores.values()} == {case.samples.dtype}
    trials = {trial.candidate: trial for trial in judge.trials(measured, candidates)}
    return (
        torch.stack([scores[candidate] for candidate in candidates]).double().cpu().numpy(),
        [trials[candidate] for candidate in candidates],
    )


def farthest(scores: Doubles, expected: Expected) -> float:
    """The largest difference of any score, relative to the largest score of its candidate."""
    return float((np.abs(scores - expected.scores).max(axis=1) / expected.magnitude).max())


PLAIN: tuple[tuple[float | None, ...], tuple[float, ...]] = ((None,), (1.0,))
SEVERAL: tuple[tuple[float | None, ...], tuple[float, ...]] = ((None, 0.8), (0.5, 4.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("relu", [False, True], ids=["both signs", "ReLU"])
@pytest.mark.parametrize(("k", "width"), [(3, 17), (10, 64), (40, 33)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)
def test_every_candidate_of_the_default_grid_equals_a_product_of_its_own(
    k: int, width: int, relu: bool, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    drawn_case = case(k, k, width, 30, (14, 9), dtype, relu)
    moved = drawn_case.on(device)
    measured = measure(moved.training, moved.weight, moved.bias)
    candidates = grid(SearchSettings())
    expected = brute_force(drawn_case, measured, candidates)
    scores, trials = judged(moved, measured, candidates)
    assert farthest(scores, expected) < tolerance
    found = np.array([trial.pruned for trial in trials])
    np.testing.assert_allclose(found, expected.pruned, rtol=0, atol=1e-12)
    if dtype == torch.float64:  # so that no two scores change places
        assert_figures(trials, expected.scores, drawn_case)
        accuracy = np.array([trial.accuracy for trial in trials])
        np.testing.assert_allclose(accuracy, expected.accuracy, rtol=0, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)
def test_clips_and_temperatures_are_each_candidates_own(
    dtype: torch.dtype, tolerance: float, device: str
) -> None:
    drawn_case = case(1, 6, 30, 70, (40, 33), dtype)
    moved = drawn_case.on(device)
    measured = measure(moved.training, moved.weight, moved.bias, (0.5, 1.0, 4.0), (None, 0.8, 0.2))
    candidates = settings(grid(GRID), *measured)
    expected = brute_force(drawn_case, measured, candidates)
    scores, trials = judged(moved, measured, candidates)
    assert farthest(scores, expected) < tolerance
    if dtype == torch.float64:
        assert_figures(trials, expected.scores, drawn_case)
        accuracy = np.array([trial.accuracy for trial in trials])
        np.testing.assert_allclose(accuracy, expected.accuracy, rtol=0, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_a_search_over_clips_and_temperatures_is_a_search_over_each(device: str) -> None:
    head = linear_head(HEAD.weight.to(device), HEAD.bias.to(device))
    training, inside = drawn(5, 300, WIDTH).relu().to(device), VALIDATION.to(device)
    outliers = {name: features.to(device) for name, features in OUTLIERS.items()}
    measured = measure(training, head.weight, head.bias, (1.0, 3.0), (None, 1.0))
    together = search_masks(head, inside, outliers, measured, GRID, labels=LABELS)
    alone = [
        search_masks(head, inside, outliers, each, GRID, labels=LABELS).trials for each in measured
    ]
    assert together.trials == [trial for trials in alone for trial in trials]
    assert together.choices["all"].lowest in together.trials
    best = together.best.candidate
    [own] = [s for s in measured if (s.clip, s.temperature) == (best.clip, best.temperature)]
    assert torch.equal(together.mask.kept, best.mask(own).kept)


@st.composite
def grids(draw: st.DrawFn) -> SearchSettings:
    """Percentages of any order, repeated too, up to those which together leave next to nothing."""
    cuts = []
    for _ in range(2):
        low = draw(st.integers(0, 9999))
        for most in (low, 9999 - low):
            tiny = st.sampled_from([0.0, 1e-9, 0.004]) if most else st.just(0.0)
            some = st.lists(st.integers(0, most).map(lambda i: i / 100) | tiny, max_size=2)
            cuts.append([*draw(some), most / 100])
    kinds: list[NeuronSensitivity] = draw(st.permutations(("mean", "gradient", "taylor")))
    wl, wh, nl, nh = (draw(st.permutations(each)) for each in cuts)
    return SearchSettings(
        weights_low=wl,
        weights_high=wh,
        neurons_low=nl,
        neurons_high=nh,
        neuron_sensitivity=kinds[: draw(st.integers(1, 3))],
    )


@given(
    grids(),
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([1, 20, 64, 65]),
    st.lists(st.sampled_from([1, 5, 70]), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([PLAIN, SEVERAL]),
    st.sampled_from([1, 1000, 10**5, 2**30]),
    st.randoms(use_true_random=False),
)
def test_any_grid_in_any_order_and_any_memory_equals_brute_force(
    chosen: SearchSettings,
    seed: int,
    k: int,
    width: int,
    inside: int,
    sizes: list[int],
    relu: bool,
    setting: tuple[tuple[float | None, ...], tuple[float, ...]],
    memory: int,
    shuffle: Any,
) -> None:
    clips, temperatures = setting
    drawn_case = case(seed, k, width, inside, tuple(sizes), relu=relu)
    measured = measure(drawn_case.training, drawn_case.weight, drawn_case.bias, temperatures, clips)
    candidates = settings(grid(chosen), *measured)
    shuffle.shuffle(candidates)
    candidates = candidates[:100]  # of a grid's candidates any may be asked for
    expected = brute_force(drawn_case, measured, candidates)
    scores, trials = judged(drawn_case, measured, candidates, memory)
    assert farthest(scores, expected) < 1e-10
    assert_figures(trials, scores, drawn_case)
    for place, trial in enumerate(trials):
        assert trial.candidate == candidates[place]
        assert trial.pruned == pytest.approx(expected.pruned[place], abs=1e-12)
        assert trial.accuracy == pytest.approx(expected.accuracy[place], abs=1e-9)


@pytest.mark.parametrize("memory", [1000, 10**5, 10**6])
def test_a_search_in_little_memory_finds_the_same(memory: int) -> None:
    drawn_case = case(2, 4, 20, 200, (130, 70))
    inside, near, far = drawn_case.samples.split((200, 130, 70))
    [sensitivity] = measure(drawn_case.training, drawn_case.weight, drawn_case.bias)
    at_once, in_parts = (
        search_masks(
            linear_head(drawn_case.weight, drawn_case.bias),
            inside,
            {"near": near, "far": far},
            sensitivity,
            GRID,
            labels=drawn_case.labels,
            restrictions={"opp": lambda c: c.neurons == (0, 0)},
            memory=bound,
        )
        for bound in (2**30, memory)
    )
    for found, expected in zip(in_parts.trials, at_once.trials, strict=True):
        assert found.fpr95 == pytest.approx(expected.fpr95, abs=1e-9)
        assert found.auroc == pytest.approx(expected.auroc, abs=1e-9)
        assert (found.candidate, found.accuracy) == (expected.candidate, expected.accuracy)
    for name, choice in at_once.choices.items():
        assert in_parts.choices[name].trial.candidate == choice.trial.candidate
        assert in_parts.choices[name].lowest.candidate == choice.lowest.candidate
        assert in_parts.choices[name].within_noise == choice.within_noise
        assert in_parts.choices[name].interval == pytest.approx(choice.interval, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inside", [1, 3, 64, 65])
def test_a_candidate_that_keeps_nothing_scores_all_samples_alike(
    dtype: torch.dtype, inside: int
) -> None:
    drawn_case = case(3, 4, 9, inside, (64, 1, 7), dtype)
    measured = measure(drawn_case.training, drawn_case.weight, drawn_case.bias)
    # 49.9 % of 36 weights and of 9 neurons are 18 and, rounded down, 4; half of them 18 and 5.
    halves: dict[str, Any] = {"weights_low": (0, 50), "weights_high": (0, 49.9)}
    halves |= {"neurons_low": (0, 50), "neurons_high": (0, 49.9), "neuron_sensitivity": ("mean",)}
    candidates = grid(SearchSettings(**halves))
    _, trials = judged(drawn_case, measured, candidates)
    empty = [trial for trial in trials if trial.pruned == 1]
    assert len(empty) == 7
    for trial in empty:
        assert set(trial.fpr95.values()) == {100}
        assert set(trial.auroc.values()) == {50}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_of_the_same_logits_tie(dtype: torch.dtype) -> None:
    drawn_case = case(4, 5, 16, 30, (30, 8), dtype)
    whole = replace(  # integers, so that sums are exact in any order
        drawn_case,
        weight=(2 * drawn_case.weight).round(),
        bias=drawn_case.bias.round(),
        samples=(2 * drawn_case.samples[:1]).round().repeat(68, 1),
    )
    measured = measure(whole.training, whole.weight, whole.bias)
    _, trials = judged(whole, measured, grid(SearchSettings()))
    for trial in trials:
        assert set(trial.fpr95.values()) == {100}
        assert set(trial.auroc.values()) == {50}
    found = search_masks(
        linear_head(whole.weight, whole.bias),
        whole.samples[:30],
        {"a": whole.samples[30:]},
        measured,
    )
    assert found.best.candidate == Candidate()
    assert found.choices["all"].interval == pytest.approx((100, 100))
    assert found.choices["all"].within_noise == len(found.trials)


@pytest.mark.parametrize(
    ("k", "width", "inside", "sizes"),
    [(1, 1, 1, (1,)), (1, 7, 30, (5, 40)), (4, 1, 9, (1,)), (3, 12, 1, (50, 1, 2))],
    ids=["one of each", "one class", "one feature", "one ID sample"],
)
def test_the_smallest_cases_equal_brute_force(
    k: int, width: int, inside: int, sizes: tuple[int, ...]
) -> None:
    drawn_case = case(5, k, width, inside, sizes)
    measured = measure(drawn_case.training, drawn_case.weight, drawn_case.bias)
    candidates = grid(SearchSettings().for_head(k, width))
    expected = brute_force(drawn_case, measured, candidates)
    scores, trials = judged(drawn_case, measured, candidates)
    assert farthest(scores, expected) < 1e-10
    assert_figures(trials, scores, drawn_case)
    found = search_masks(
        linear_head(drawn_case.weight, drawn_case.bias),
        drawn_case.samples[:inside],
        {str(place): part for place, part in enumerate(drawn_case.samples[inside:].split(sizes))},
        measured,
        labels=drawn_case.labels,
    )
    assert [trial.candidate for trial in found.trials] == candidates
    low, high = found.choices["all"].interval
    assert 0 <= low <= high <= 100


# Where weights are huge, the partial logits of a class may be far below the greatest of each part
# and the class still have the greatest sum: its exponentials underflow.
HUGE = pytest.mark.parametrize(
    ("dtype", "tolerance", "scale", "temperature"),
    [
        (torch.float32, 1e-5, 30.0, 1.0),
        (torch.float32, 1e-5, 300.0, 1.0),
        (torch.float32, 1e-5, 10.0, 0.1),
        (torch.float64, 1e-10, 300.0, 1.0),
        (torch.float64, 1e-10, 1000.0, 1.0),
    ],
    ids=str,
)


def huge(dtype: torch.dtype, scale: float, temperature: float) -> tuple[Case, list[Sensitivity]]:
    drawn_case = case(6, 5, 20, 70, (40, 10), dtype, scale=scale)
    return drawn_case, measure(
        drawn_case.training, drawn_case.weight, drawn_case.bias, (temperature,), (None, 1.0)
    )


@HUGE
def test_scores_survive_the_underflow_of_exponentials(
    dtype: torch.dtype,
    tolerance: float,
    scale: float,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn_case, measured = huge(dtype, scale, temperature)
    candidates = settings(grid(GRID), *measured)
    scores, _ = judged(drawn_case, measured, candidates)
    assert np.isfinite(scores).all()
    assert farthest(scores, brute_force(drawn_case, measured, candidates)) < tolerance
    monkeypatch.setattr(table, "TINY", -1.0)
    naive = torch.stack(list(drawn_case.judge().scores(measured, candidates).values()))
    assert naive.isinf().any()  # so that the fallback is seen to be needed


@HUGE
def test_accuracy_survives_the_underflow_of_exponentials(
    dtype: torch.dtype, tolerance: float, scale: float, temperature: float
) -> None:
    drawn_case, measured = huge(dtype, scale, temperature)
    candidates = settings(grid(GRID), *measured)
    _, trials = judged(drawn_case, measured, candidates)
    expected = brute_force(drawn_case, measured, candidates)
    found = np.array([trial.accuracy for trial in trials])
    np.testing.assert_allclose(found, expected.accuracy, rtol=0, atol=1e-9)


@pytest.mark.parametrize("relu", [False, True], ids=["both signs", "ReLU"])
def test_large_features_lose_no_digits(relu: bool) -> None:
    drawn_case = case(7, 8, 25, 40, (30, 9), torch.float32, relu)
    large = replace(
        drawn_case, training=300 * drawn_case.training, samples=300 * drawn_case.samples
    )
    measured = measure(large.training, large.weight, large.bias)
    expected = brute_force(large, measured, grid(GRID))
    assert expected.magnitude.max() > 1e3
    scores, _ = judged(large, measured, grid(GRID))
    assert np.isfinite(scores).all()
    assert farthest(scores, expected) < 1e-5


# The choice.

ROOM = 1000  # outliers of a scripted candidate


def passing(*ranges: tuple[int, int]) -> Tensor:
    """Scores of 100 ID samples in [0, 1), then of outliers that pass far below, or fail far above.

    A resample moves the threshold, but no outlier across it: all noise is that of the outliers.
    """
    outside = torch.full((ROOM,), 2.0, dtype=torch.float64)
    for start, stop in ranges:
        outside[start:stop] = -1.0
    return torch.cat([torch.arange(100, dtype=torch.float64) / 100, outside])


def cut(percent: float) -> Candidate:
    return Candidate((percent, 0.0))


Figures = dict[int, tuple[float, float]]  # pruned share and accuracy, by percentage
Script = dict[int, Tensor]  # scores, by percentage


def chosen(
    figures: Figures,
    *scripts: Script,
    allowed: Callable[[Candidate], bool] = everything,
    drop: float = 1.0,
    seed: int = 0,
) -> Choice:
    """The choice among candidates `cut`, the first the unpruned head, whose scores are given.

    With three scripts, the latter two are what the masks of each half of the training samples give.
    """
    by_candidate = [{cut(p): row for p, row in script.items()} for script in scripts]
    judge, sensitivity = scripted({"a": ROOM}, 100, *by_candidate)
    trials = [
        replace(
            trial,
            pruned=figures[int(trial.candidate.weights[0])][0],
            accuracy=figures[int(trial.candidate.weights[0])][1],
        )
        for trial in judge.trials([sensitivity], [cut(p) for p in figures])
    ]
    chosen = SearchSettings(max_accuracy_drop=drop, bootstrap=500)
    return choose(judge, [sensitivity], trials, chosen, seed, allowed)


THREE: Figures = {0: (0.0, 90.0), 1: (0.1, 90.0), 2: (0.5, 90.0)}
WORST = passing((0, ROOM))


def test_a_candidate_that_prunes_less_is_chosen_within_noise_of_the_lowest() -> None:
    # 22 % and 20 %, of different outliers: the standard error is √420 ⁄ 1000, 2.05 points.
    found = chosen(THREE, {0: WORST, 1: passing((200, 420)), 2: passing((0, 200))})
    assert found.trial.candidate == cut(1)
    assert found.lowest.candidate == cut(2)
    assert found.within_noise == 1 + (found.trial.mean_fpr95 <= 20 + 1.26)
    assert (found.trial.mean_fpr95, found.lowest.mean_fpr95) == (22, 20)


def test_noise_is_that_of_the_difference() -> None:
    # 22 % and 20 % again, but the same outliers but for 20: √20 ⁄ 1000, 0.45 points.
    found = chosen(THREE, {0: WORST, 1: passing((0, 220)), 2: passing((0, 200))})
    assert found.trial.candidate == found.lowest.candidate == cut(2)


def test_a_candidate_that_prunes_less_is_not_chosen_where_it_is_worse() -> None:
    found = chosen(THREE, {0: WORST, 1: passing((200, 500)), 2: passing((0, 200))})
    assert found.trial.candidate == found.lowest.candidate == cut(2)


def test_the_unpruned_head_is_chosen_within_noise_of_all() -> None:
    script = {0: passing((0, 205)), 1: passing((300, 503)), 2: passing((600, 800))}
    found = chosen(THREE, script)
    assert found.trial.candidate == cut(0)
    assert found.lowest.candidate == cut(2)
    assert found.within_noise == 3


def test_what_costs_accuracy_is_neither_chosen_nor_the_lowest_nor_counted() -> None:
    figures: Figures = {**THREE, 1: (0.1, 88.9), 3: (0.7, 89.0)}
    script = {0: WORST, 1: passing((0, 100)), 2: passing((0, 300)), 3: passing((500, 801))}
    found = chosen(figures, script)
    assert found.trial.candidate == found.lowest.candidate == cut(2)
    assert found.within_noise == 2
    assert chosen(figures, script, drop=1.1).trial.candidate == cut(1)


def test_what_is_not_allowed_is_neither_chosen_nor_the_lowest_nor_counted() -> None:
    script = {0: WORST, 1: passing((0, 500)), 2: passing((0, 200))}
    found = chosen(THREE, script, allowed=lambda candidate: candidate != cut(2))
    assert found.trial.candidate == found.lowest.candidate == cut(1)
    assert found.within_noise == 1
    # The unpruned head's accuracy is what all are compared with, allowed or not.
    figures: Figures = {**THREE, 1: (0.1, 70.0), 2: (0.5, 89.5)}
    found = chosen(figures, script, allowed=lambda candidate: candidate != cut(0))
    assert found.trial.candidate == found.lowest.candidate == cut(2)


def test_the_unstable_is_put_back_by_half_the_difference_of_the_halves() -> None:
    whole = {0: WORST, 1: passing((0, 300)), 2: passing((0, 200))}
    steady = {0: WORST, 1: passing((0, 300))}
    found = chosen(THREE, whole, {**steady, 2: passing((0, 500))}, {**steady, 2: passing((0, 100))})
    assert found.trial.candidate == cut(1)  # 30 + 0, not 20 + 20
    assert found.instability == 0
    assert found.lowest.candidate == cut(2)  # of the figures themselves
    found = chosen(THREE, whole, {**steady, 2: passing((0, 250))}, {**steady, 2: passing((0, 150))})
    assert found.trial.candidate == cut(2)  # 20 + 5
    assert found.instability == pytest.approx(5)


def test_the_unstable_is_put_back_though_it_prunes_less() -> None:
    whole = {0: WORST, 1: passing((200, 410)), 2: passing((0, 200))}
    steady = {0: WORST, 2: passing((0, 200))}
    halves = [{**steady, 1: passing((0, 100))}, {**steady, 1: passing((0, 300))}]
    assert chosen(THREE, whole).trial.candidate == cut(1)
    assert np.isnan(chosen(THREE, whole).instability)
    assert chosen(THREE, whole, *halves).trial.candidate == cut(2)


def test_the_interval_contains_the_figure_and_is_as_wide_as_theory_says() -> None:
    found = chosen(THREE, {0: WORST, 1: passing((0, 600)), 2: passing((0, 200))})
    low, high = found.interval
    assert low < 20 < high
    # An FPR95 of p of m outliers has the standard error √(p (1 − p) ⁄ m).
    assert high - low == pytest.approx(100 * 2 * 1.96 * (0.2 * 0.8 / ROOM) ** 0.5, rel=0.15)


def test_the_interval_contains_the_figure_of_random_scores() -> None:
    sizes = {"a": 300, "b": 50}
    for seed in range(5):
        row = torch.cat(
            [drawn(10 + seed, 400), drawn(30 + seed, 300) + 2, drawn(50 + seed, 50) + 3]
        )
        judge, sensitivity = scripted(sizes, 400, {cut(0): row})
        trials = list(judge.trials([sensitivity], [cut(0)]))
        found = choose(judge, [sensitivity], trials, SearchSettings(bootstrap=500), 0, everything)
        assert found.interval[0] < trials[0].mean_fpr95 < found.interval[1]


def test_a_choice_depends_on_the_seed_alone() -> None:
    found = [repr(searched(seed=seed).choices) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_more_choices_change_no_choice() -> None:
    one = {"opp": lambda c: bool(c.neurons == (0, 0))}
    two = {"onp": lambda c: bool(c.weights == (0, 0)), **one}
    found = [searched(restrictions=each).choices for each in ({}, one, two)]
    assert [list(each) for each in found] == [["all"], ["all", "opp"], ["all", "onp", "opp"]]
    assert len({repr(each["all"]) for each in found}) == 1
    assert repr(found[1]["opp"]) == repr(found[2]["opp"])


def test_all_trials_pass_through_the_progress_that_is_told_their_number() -> None:
    seen: list[Trial] = []
    told: list[int] = []

    def progress(trials: Any, number: int) -> Any:
        told.append(number)
        for trial in trials:
            seen.append(trial)
            yield trial

    found = searched(progress=progress)
    assert told == [len(grid(GRID))]
    assert sorted(map(repr, seen)) == sorted(map(repr, found.trials))


def test_halves_measured_with_the_sensitivity_make_the_choice_robust() -> None:
    training = drawn(5, 300, WIDTH).relu()
    [sensitivity] = measure(training, HEAD.weight, HEAD.bias, (TEMPERATURE,))
    found = search_masks(HEAD, VALIDATION, OUTLIERS, sensitivity, GRID, labels=LABELS)
    choice = found.choices["all"]
    halves = [
        search_masks(
            HEAD, VALIDATION, OUTLIERS, measured(HEAD, half, TEMPERATURE), GRID, labels=LABELS
        ).trials[found.trials.index(choice.trial)]
        for half in (training[::2], training[1::2])
    ]
    difference = halves[0].mean_fpr95 - halves[1].mean_fpr95
    assert choice.instability == pytest.approx(abs(difference) / 2, abs=1e-9)


def test_what_is_pruned_is_recorded_under_the_names_of_the_grid() -> None:
    record = Candidate((1, 2), (3, 4), "taylor", 0.5, 2.0).record()
    assert list(record) == list(SearchSettings.model_fields)[:5]
    assert list(record.values()) == [1, 2, 3, 4, "taylor"]


coarse = st.integers(0, 4).map(float)


@given(st.lists(st.tuples(coarse, coarse, coarse), min_size=1, max_size=30))
def test_the_front_is_what_no_other_trial_beats(found: list[tuple[float, float, float]]) -> None:
    trials = [
        trial(fpr95, auroc, pruned / 4, low=i) for i, (fpr95, auroc, pruned) in enumerate(found)
    ]
    front = pareto_front(trials)

    def order(t: Trial) -> tuple[float, float]:
        return t.mean_fpr95, -t.mean_auroc

    for a, b in pairwise(front):
        assert a.pruned < b.pruned
        assert order(a) > order(b)
    for each in trials:
        beaten = [
            other
            for other in trials
            if (other.pruned <= each.pruned and order(other) <= order(each))
            and (other.pruned, order(other)) != (each.pruned, order(each))
        ]
        twins = [t for t in trials if (t.pruned, order(t)) == (each.pruned, order(each))]
        assert (each in front) == (not beaten and twins[0] is each)


def naive_means(judge: Judge, rows: Sequence[Doubles], resamples: int, seed: int) -> Doubles:
    """Mean FPR95 of each row in each resample: samples repeated as often as they are drawn."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        draws = [
            rng.multinomial(n, np.full(n, 1 / n)) for n in (judge.inside, *judge.sizes.values())
        ]
        column = []
        for row in rows:
            bounds = np.cumsum([0, judge.inside, *judge.sizes.values()])
            inside, *sets = (
                np.repeat(row[a:b], times)
                for a, b, times in zip(bounds[:-1], bounds[1:], draws, strict=True)
            )
            column.append(np.mean([naive_fpr95(inside, outside) for outside in sets]))
        found.append(column)
    return np.array(found).T


@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 19, 20, 21, 45]),
    st.lists(st.integers(1, 25), min_size=1, max_size=3),
    st.booleans(),
)
def test_the_bootstrap_equals_repeating_what_is_drawn(
    seed: int, inside: int, sizes: list[int], ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3, inside + sum(sizes)))
    rows = np.round(2 * rows) if ties else rows
    script = {cut(place): torch.from_numpy(row) for place, row in enumerate(rows)}
    judge, _ = scripted({str(place): size for place, size in enumerate(sizes)}, inside, script)
    found = bootstrap_means(judge, script, 7, seed)
    assert found.shape == (3, 7)
    np.testing.assert_allclose(found, naive_means(judge, list(rows), 7, seed), rtol=0, atol=1e-9)


@given(st.integers(0, 10**6), st.integers(2, 7), st.booleans())
def test_the_choice_is_the_least_pruned_within_noise_of_the_lowest(
    seed: int, count: int, halves: bool
) -> None:
    rng = np.random.default_rng(seed)
    sizes, inside, resamples = {"a": 30, "b": 15}, 40, 20
    candidates = [cut(place) for place in range(count)]

    def scores() -> dict[Candidate, Tensor]:
        shift = rng.uniform(0, 3, size=(count, 1))
        rows = rng.normal(size=(count, inside + 45))
        rows[:, inside:] += shift
        return {c: torch.from_numpy(row) for c, row in zip(candidates, rows, strict=True)}

    scripts = [scores() for _ in range(3 if halves else 1)]
    judge, sensitivity = scripted(sizes, inside, *scripts)
    trials = [
        replace(trial, pruned=rng.integers(5) / 8, accuracy=float(rng.integers(89, 92)))
        for trial in judge.trials([sensitivity], candidates)
    ]
    found = choose(
        judge,
        [sensitivity],
        trials,
        SearchSettings(bootstrap=resamples, max_accuracy_drop=1),
        seed,
        everything,
    )

    rows = [scripts[0][c].numpy() for c in candidates]
    means = naive_means(judge, rows, resamples, seed)
    penalty = np.zeros(count)
    if halves:
        first, second = (
            np.array(
                [
                    np.mean(
                        [
                            naive_fpr95(row[:inside], row[inside : inside + 30]),
                            naive_fpr95(row[:inside], row[inside + 30 :]),
                        ]
                    )
                    for row in (script[c].numpy() for c in candidates)
                ]
            )
            for script in scripts[1:]
        )
        penalty = np.abs(first - second) / 2
    accurate = [i for i, t in enumerate(trials) if t.accuracy >= trials[0].accuracy - 1]

    def order(i: int) -> tuple[float, float]:
        return round(trials[i].mean_fpr95, 9), -round(trials[i].mean_auroc, 9)

    front = [
        i
        for i in accurate
        if not any(
            (trials[j].pruned, order(j), j) != (trials[i].pruned, order(i), i)
            and trials[j].pruned <= trials[i].pruned
            and (order(j), j) <= (order(i), i)
            for j in accurate
        )
    ]
    front.sort(key=lambda i: trials[i].pruned)
    assert front == [trials.index(t) for t in pareto_front([trials[i] for i in accurate])]
    penalized = {i: trials[i].mean_fpr95 + penalty[i] for i in front}
    lowest = min(front, key=lambda i: penalized[i])
    within = [
        i
        for i in front
        if penalized[i] <= penalized[lowest] + np.std(means[i] - means[lowest]) + 1e-9
    ]
    best = min(within, key=lambda i: trials[i].pruned)
    assert found.trial is trials[best]
    assert found.lowest is trials[front[-1]]
    assert found.interval == pytest.approx(tuple(np.percentile(means[best], [2.5, 97.5])))
    assert found.instability == pytest.approx(penalty[best] if halves else nan, nan_ok=True)
    reach = trials[lowest].mean_fpr95 + np.std(means[lowest]) + 1e-9
    assert found.within_noise == sum(trials[i].mean_fpr95 <= reach for i in accurate)
