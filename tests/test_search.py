"""The mask search against brute force, its order of preference and its constraint."""

from itertools import product
from math import nan
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from opnp.energy import energy_score, linear_head
from opnp.errors import InputError
from opnp.masks import PruningMask
from opnp.search import Candidate, Grid, SearchResult, Trial, choose, search_masks
from opnp.sensitivity import Sensitivity, SensitivitySums

# float64 throughout, so that the order in which logits are summed decides no comparison of scores
K, WIDTH, TEMPERATURE = 4, 20, 1.5
GRID = Grid((0, 30), (0, 2.5, 10), (0, 10), (0, 5, 20))


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


def searched(labels: Tensor | None = LABELS, drop: float = 100.0) -> SearchResult:
    return search_masks(
        HEAD,
        VALIDATION,
        OUTLIERS,
        SENSITIVITY,
        GRID,
        labels=labels,
        max_accuracy_drop=drop,
        temperature=TEMPERATURE,
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
    assert [t.candidate for t in unconstrained.trials] == GRID.candidates()


def test_the_best_trial_ranks_first_and_its_mask_is_returned(unconstrained: SearchResult) -> None:
    best = min(unconstrained.trials, key=rank)
    assert unconstrained.best == best
    mask = best.candidate.mask(SENSITIVITY)
    assert torch.equal(unconstrained.mask.weights, mask.weights)
    assert torch.equal(unconstrained.mask.neurons, mask.neurons)


def test_the_grid_has_each_distinct_mask_once() -> None:
    grid = Grid((0, 30, 0.0), (0, 1), (0, 10), (0, 5, 5.0), ("mean", "taylor"))
    candidates = grid.candidates()
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


@pytest.mark.parametrize("grid", [GRID, Grid((30, 0), (5, 0)), Grid((30,), (5,), (10,), (5,))])
def test_the_unpruned_head_comes_first_whatever_the_grid(grid: Grid) -> None:
    candidates = grid.candidates()
    assert candidates[0] == Candidate((0, 0), (0, 0))
    assert len(set(candidates)) == len(candidates)


@pytest.mark.parametrize("drop", [0.0, 1.0, 5.0, 20.0])
def test_the_best_trial_keeps_the_accuracy(unconstrained: SearchResult, drop: float) -> None:
    trials = unconstrained.trials
    allowed = [t for t in trials if t.accuracy >= trials[0].accuracy - drop - 1e-9]
    assert len(allowed) < len(trials)
    assert searched(drop=drop).best == min(allowed, key=rank)


def test_a_drop_of_exactly_the_maximum_is_allowed() -> None:
    trials = [trial(50, 60, 0, accuracy=90.1), trial(10, 60, 0.1, accuracy=89.1)]
    assert choose(trials, max_accuracy_drop=1.0) is trials[1]
    assert choose(trials, max_accuracy_drop=0.99) is trials[0]


def test_without_labels_there_is_no_constraint(unconstrained: SearchResult) -> None:
    found = searched(labels=None, drop=0.0)
    assert all(np.isnan(t.accuracy) for t in found.trials)
    assert found.best.candidate == unconstrained.best.candidate


def test_auroc_breaks_ties_of_fpr95() -> None:
    trials = [trial(20, 80, 0), trial(20, 90, 0.5), trial(20, 85, 0.1), trial(21, 99, 0)]
    assert choose(trials, 1.0) is trials[1]


def test_the_smaller_pruned_share_breaks_ties_of_auroc() -> None:
    trials = [trial(30, 80, 0), trial(20, 90, 0.5), trial(20, 90, 0.1), trial(20, 90, 0.2)]
    assert choose(trials, 1.0) is trials[2]


def test_the_earlier_trial_wins_what_is_still_tied() -> None:
    trials = [trial(30, 80, 0), trial(20, 90, 0.5, low=10), trial(20, 90, 0.5, low=20)]
    assert choose(trials, 1.0) is trials[1]


def test_rounding_noise_breaks_no_ties() -> None:
    trials = [trial(20 + 1e-12, 80 - 1e-12, 0.1), trial(20, 80, 0.2)]
    assert choose(trials, 1.0) is trials[0]


def test_the_mean_over_the_sets_decides() -> None:
    def two(a: float, b: float, pruned: float) -> Trial:
        return Trial(Candidate(), {"a": a, "b": b}, {"a": 50, "b": 50}, nan, pruned)

    trials = [two(50, 50, 0), two(0, 90, 0.1), two(60, 60, 0.1)]
    assert trials[1].mean_fpr95 == 45
    assert choose(trials, 1.0) is trials[1]


@pytest.mark.parametrize("part", ["weights", "neurons"])
def test_the_choice_can_be_restricted_to_opp_or_onp(unconstrained: SearchResult, part: str) -> None:
    other = {"weights": "neurons", "neurons": "weights"}[part]
    allowed = [t for t in unconstrained.trials if getattr(t.candidate, other) == (0, 0)]
    found = choose(unconstrained.trials, 100.0, lambda c: bool(getattr(c, other) == (0, 0)))
    assert found == min(allowed, key=rank)
    assert getattr(found.candidate, part) != (0, 0)  # so that the restriction is seen to work
    assert found != unconstrained.best


def test_outliers_like_the_validation_set_leave_the_head_unpruned() -> None:
    found = search_masks(HEAD, VALIDATION, {"same": VALIDATION}, SENSITIVITY, GRID)
    assert found.best.candidate == Candidate()
    assert found.mask.kept.all()


ONLY: dict[str, Any] = {
    "weights_low": (0,),
    "weights_high": (0,),
    "neurons_low": (0,),
    "neurons_high": (0,),
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
        Grid(**{**ONLY, pruned: (0, percent)}),
    )
    assert (found.trials[0].mean_fpr95, found.trials[0].mean_auroc) == (100, 0)
    assert (found.best.mean_fpr95, found.best.mean_auroc) == (0, 100)
    assert (~found.mask.kept).nonzero().tolist() == [[0, 9], [1, 9]]


def test_a_head_without_bias_is_searched_as_one_with_a_zero_bias() -> None:
    bare = nn.Linear(WIDTH, K, bias=False, dtype=torch.float64).requires_grad_(False)
    bare.weight.copy_(HEAD.weight)
    zero = linear_head(bare.weight, torch.zeros(K, dtype=torch.float64))
    trials = [
        search_masks(head, VALIDATION, OUTLIERS, SENSITIVITY, Grid((0,), (0, 5), (0,), (0,))).trials
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
    with pytest.raises(InputError, match="temperature"):
        search_masks(HEAD, VALIDATION, OUTLIERS, SENSITIVITY, GRID, temperature=temperature)


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
def test_a_grid_out_of_range_is_refused_by_name(percentages: dict[str, tuple[float, ...]]) -> None:
    name = next(iter(percentages)).split("_")[0]
    with pytest.raises(InputError, match=name):
        Grid(**percentages).candidates()  # type: ignore[arg-type]
