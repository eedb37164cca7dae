"""Which weights and neurons a mask removes, what it does to a head, and its file."""

from decimal import Decimal
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from opnp.errors import InputError
from opnp.pruning.energy import energy_score, linear_head
from opnp.pruning.masks import PruningMask, keep, pruned_count

hundredths = st.integers(0, 9999)  # percentages with two decimals


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn_head(seed: int, k: int, width: int) -> nn.Linear:
    return linear_head(drawn(seed, k, width), drawn(seed + 1, k))


def drawn_mask(seed: int, k: int, width: int) -> PruningMask:
    return PruningMask.from_sensitivity(
        drawn(seed, k, width), drawn(seed + 1, width), (10, 20), (20, 10)
    )


def rounded_half_up(n: int, percent: Fraction) -> int:
    return floor(n * percent / 100 + Fraction(1, 2))


@given(st.integers(0, 10**6), st.integers(1, 200), hundredths, hundredths)
def test_exactly_the_rounded_number_goes_from_either_end(
    seed: int, n: int, low: int, high: int
) -> None:
    high = min(high, 9999 - low)
    sensitivity = drawn(seed, n)
    kept = keep(sensitivity, (low / 100, high / 100))
    lowest = rounded_half_up(n, Fraction(low, 100))
    highest = rounded_half_up(n, Fraction(high, 100))
    expected = sensitivity.sort().values[lowest : n - highest]
    assert torch.equal(sensitivity[kept].sort().values, expected)


@pytest.mark.parametrize(
    ("n", "percent", "removed"),
    [(2560, 0.5, 13), (2560, 0.2, 5), (200, 0.25, 1), (200, 0.24, 0), (10, 99.9, 10), (7, 0, 0)],
)
def test_the_number_removed_is_rounded_half_up(n: int, percent: float, removed: int) -> None:
    sensitivity = drawn(0, n)
    assert int((~keep(sensitivity, (percent, 0))).sum()) == removed
    assert int((~keep(sensitivity, (0, percent))).sum()) == removed


@pytest.mark.parametrize(("n", "percent", "removed"), [(375, 9.2, 35), (625, 4.56, 29)])
def test_a_percentage_that_is_no_binary_fraction_is_rounded_as_written(
    n: int, percent: float, removed: int
) -> None:
    assert int((~keep(drawn(0, n), (percent, 0))).sum()) == removed


@given(st.integers(1, 10**6), hundredths)
def test_the_number_pruned_is_rounded_half_up_as_written(n: int, percent: int) -> None:
    expected = rounded_half_up(n, Fraction(Decimal(percent) / 100))
    assert pruned_count(n, percent / 100) == expected
    assert pruned_count(n, np.float64(percent / 100)) == expected
    assert 0 <= expected <= n


@given(st.integers(1, 300), hundredths, hundredths)
def test_what_is_pruned_from_either_end_never_overlaps(n: int, low: int, high: int) -> None:
    high = min(high, 9999 - low)
    assert pruned_count(n, low / 100) + pruned_count(n, high / 100) <= n


@given(st.integers(1, 10**6), st.floats(0, 100), st.floats(0, 100))
def test_a_larger_percentage_prunes_no_fewer(n: int, a: float, b: float) -> None:
    assert pruned_count(n, min(a, b)) <= pruned_count(n, max(a, b))


@pytest.mark.parametrize(
    ("n", "percent", "count"),
    [(2560, 0.5, 13), (10**9, 1e-7, 1), (10**9, 1e-8, 0), (1, 50, 1), (1, 49.99, 0), (3, 100, 3)],
)
def test_the_number_pruned_by_hand(n: int, percent: float, count: int) -> None:
    assert pruned_count(n, percent) == count


def test_on_ties_the_earlier_index_ranks_lower() -> None:
    ties = torch.zeros(2, 5)
    lowest, highest = keep(ties, (30, 0)), keep(ties, (0, 30))
    assert lowest.flatten().tolist() == [False] * 3 + [True] * 7
    assert highest.flatten().tolist() == [True] * 7 + [False] * 3


@given(st.lists(st.integers(0, 3), min_size=1, max_size=100), st.integers(0, 50))
def test_ranks_are_those_of_value_then_index(values: list[int], percent: int) -> None:
    kept = keep(torch.tensor(values, dtype=torch.float64), (percent, percent / 2))
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    low = rounded_half_up(len(values), Fraction(percent))
    high = rounded_half_up(len(values), Fraction(percent, 2))
    assert set(kept.nonzero().flatten().tolist()) == set(order[low : len(values) - high])


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=100),
    st.lists(st.floats(0, 45), min_size=2, max_size=2),
    st.lists(st.floats(0, 45), min_size=2, max_size=2),
)
def test_a_larger_percentage_prunes_a_superset(
    values: list[int], low: list[float], high: list[float]
) -> None:
    sensitivity = torch.tensor(values, dtype=torch.float64)
    small = keep(sensitivity, (min(low), min(high)))
    large = keep(sensitivity, (max(low), max(high)))
    assert not (large & ~small).any()


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 40))
def test_zero_percentages_leave_the_energy_bit_for_bit(seed: int, k: int, width: int) -> None:
    head, features = drawn_head(seed, k, width), drawn(seed + 2, 5, width)
    mask = PruningMask.from_sensitivity(drawn(seed + 3, k, width), drawn(seed + 4, width))
    assert torch.equal(energy_score(mask.apply(head)(features)), energy_score(head(features)))


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 12))
def test_a_pruned_head_has_zeros_where_pruned_and_the_rest_unchanged(
    seed: int, k: int, width: int
) -> None:
    head, mask = drawn_head(seed, k, width), drawn_mask(seed, k, width)
    before = head.weight.clone(), head.bias.clone()
    pruned = mask.apply(head)
    for i in range(k):
        for j in range(width):
            stays = mask.weights[i, j] and mask.neurons[j]
            assert pruned.weight[i, j] == (head.weight[i, j] if stays else 0)
    assert torch.equal(pruned.bias, head.bias)
    assert torch.equal(head.weight, before[0])
    assert torch.equal(head.bias, before[1])


def test_a_pruned_neuron_loses_its_whole_column() -> None:
    neurons = torch.tensor([3.0, 1.0, 2.0, 9.0])
    mask = PruningMask.from_sensitivity(drawn(0, 3, 4), neurons, neurons=(25, 25))
    pruned = mask.apply(drawn_head(1, 3, 4)).weight
    assert mask.neurons.tolist() == [True, False, True, False]
    assert (pruned[:, [1, 3]] == 0).all()
    assert (pruned[:, [0, 2]] != 0).all()


def test_weights_and_neurons_are_pruned_by_their_own_sensitivity() -> None:
    weights = torch.arange(8.0).reshape(2, 4)
    neurons = torch.tensor([4.0, 3.0, 2.0, 1.0])
    mask = PruningMask.from_sensitivity(weights, neurons, (12.5, 25), (25, 0))
    assert mask.weights.tolist() == [[False, True, True, True], [True, True, False, False]]
    assert mask.neurons.tolist() == [True, True, True, False]
    assert mask.kept.tolist() == [[False, True, True, False], [True, True, False, False]]


def test_the_shares_pruned_are_fractions() -> None:
    mask = PruningMask.from_sensitivity(
        torch.arange(8.0).reshape(2, 4), torch.tensor([4.0, 3.0, 2.0, 1.0]), (12.5, 25), (25, 0)
    )
    assert (mask.pruned_weights, mask.pruned_neurons, mask.pruned) == (3 / 8, 1 / 4, 4 / 8)


def test_a_head_without_bias_is_pruned_to_one_with_a_zero_bias() -> None:
    head = nn.Linear(4, 3, bias=False)
    pruned = drawn_mask(0, 3, 4).apply(head)
    assert torch.equal(pruned.bias, torch.zeros(3))


def test_a_pruned_head_shares_no_memory_with_the_head() -> None:
    head = drawn_head(0, 3, 4)
    pruned = PruningMask.from_sensitivity(drawn(1, 3, 4), drawn(2, 4)).apply(head)
    with torch.no_grad():
        pruned.weight.zero_()
        pruned.bias.zero_()
    assert head.weight.all()
    assert head.bias.all()


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 12))
def test_a_mask_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, seed: int, k: int, width: int
) -> None:
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    mask = drawn_mask(seed, k, width)
    mask.save(path, {"backbone": "abc"})
    read = PruningMask.load(path)
    assert torch.equal(read.weights, mask.weights)
    assert torch.equal(read.neurons, mask.neurons)


def test_a_truncated_mask_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    drawn_mask(0, 3, 4).save(path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"mask\.safetensors"):
            PruningMask.load(path)


def test_a_missing_mask_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.safetensors"):
        PruningMask.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "tensors",
    [
        {"head.weight": torch.zeros(3, 4)},
        {"weights": torch.ones(3, 4)},
        {"weights": torch.ones(3, 4), "neurons": torch.ones(3)},
        {"weights": torch.ones(4), "neurons": torch.ones(4)},
        {"weights": torch.ones(()), "neurons": torch.ones(())},
    ],
    ids=["backbone", "no neurons", "other width", "flat", "scalars"],
)
def test_a_foreign_safetensors_file_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"foreign\.safetensors"):
        PruningMask.load(path)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (5, 3)])
def test_a_mask_for_another_head_is_refused_with_both_shapes(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"\(3, 4\).*\(" + str(shape[0])):
        drawn_mask(0, 3, 4).apply(drawn_head(0, *shape))


@pytest.mark.parametrize(
    "percentages", [(50, 50), (0, 100), (99.5, 0.5), (-1, 0), (0, -0.1), (float("nan"), 0)]
)
@pytest.mark.parametrize("parameter", ["weights", "neurons"])
def test_percentages_out_of_range_are_refused_by_the_parameters_name(
    parameter: str, percentages: tuple[float, float]
) -> None:
    with pytest.raises(InputError, match=f"^{parameter}="):
        PruningMask.from_sensitivity(drawn(0, 3, 4), drawn(1, 4), **{parameter: percentages})


@pytest.mark.parametrize("broken", ["weights", "neurons"])
def test_nan_sensitivities_are_refused(broken: str) -> None:
    weights, neurons = drawn(0, 3, 4), drawn(1, 4)
    (weights if broken == "weights" else neurons).view(-1)[2] = float("nan")
    with pytest.raises(InputError, match="sensitivity is NaN"):
        PruningMask.from_sensitivity(weights, neurons)


@pytest.mark.parametrize(("weights", "neurons"), [((3, 4), (3,)), ((12,), (12,)), ((3, 4), (4, 1))])
def test_sensitivities_of_different_heads_are_refused(
    weights: tuple[int, ...], neurons: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match="shapes"):
        PruningMask.from_sensitivity(drawn(0, *weights), drawn(1, *neurons))
