"""Sensitivities against autograd, and the merging of what shards contribute."""

import random
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_ood.detector import ReAct
from torch import Tensor

from opnp.errors import InputError
from opnp.pruning.clipping import clip_threshold, clip_thresholds
from opnp.pruning.sensitivity import (
    BATCH,
    NeuronSensitivity,
    Sensitivity,
    SensitivitySums,
    halved,
    measure,
    neuron_sensitivity,
    parameter_sensitivity,
)

KINDS: tuple[NeuronSensitivity, ...] = ("mean", "gradient", "taylor")

Head = tuple[Tensor, Tensor, Tensor]  # features (N, L), weight (K, L), bias (K,)


def drawn(seed: int, n: int, k: int, width: int, dtype: torch.dtype = torch.float64) -> Head:
    """A random head with features of either sign."""
    rng = torch.Generator().manual_seed(seed)
    features, weight, bias = (
        torch.randn(shape, generator=rng, dtype=dtype) for shape in ((n, width), (k, width), (k,))
    )
    return 2 * features, weight, bias


heads = st.builds(
    drawn, st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 5), st.integers(1, 6)
)
temperatures = st.floats(0.2, 20)


def autograd(
    features: Tensor, weight: Tensor, bias: Tensor, temperature: float = 1.0
) -> dict[str, Tensor]:
    """M and each N from one backward pass a sample."""
    m, gradient, taylor = [], [], []
    for sample in features:
        w, h = weight.clone().requires_grad_(), sample.clone().requires_grad_()
        energy = -temperature * torch.logsumexp((w @ h + bias) / temperature, dim=0)
        dw, dh = torch.autograd.grad(energy, (w, h))
        m.append(dw.abs())
        gradient.append(dh.abs())
        taylor.append((sample * dh).abs())
    weights = torch.stack(m).mean(dim=0)
    return {
        "weights": weights,
        "mean": weights.mean(dim=0),
        "gradient": torch.stack(gradient).mean(dim=0),
        "taylor": torch.stack(taylor).mean(dim=0),
    }


def measured(head: Head, temperature: float = 1.0) -> dict[str, Tensor]:
    found = {"weights": parameter_sensitivity(*head, temperature)}
    for kind in KINDS:
        found[kind] = neuron_sensitivity(*head, temperature, kind)
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal, relative to the largest value: sums over classes may cancel to almost nothing."""
    for name, value in expected.items():
        largest = float(value.abs().max())
        torch.testing.assert_close(
            actual[name], value.double(), rtol=0, atol=tolerance * largest, msg=f"{name} differs"
        )


TENSORS = ("weights", "neurons_mean", "neurons_gradient", "neurons_taylor")


def assert_same_bits(
    a: SensitivitySums | Sensitivity, b: SensitivitySums | Sensitivity, but: str = ""
) -> None:
    """All that both hold is equal, the tensors bit for bit; except for the field ``but``."""
    assert type(a) is type(b)
    for f in fields(a):
        if f.name in TENSORS:
            assert torch.equal(getattr(a, f.name), getattr(b, f.name)), f.name
        elif f.name not in (but, "halves"):
            assert getattr(a, f.name) == getattr(b, f.name), f.name


@given(heads, temperatures)
def test_float64_sensitivities_equal_autograd_sample_by_sample(
    head: Head, temperature: float
) -> None:
    assert_close(measured(head, temperature), autograd(*head, temperature), 1e-12)


@given(heads, temperatures)
def test_every_weight_sensitivity_equals_autograd_however_small(
    head: Head, temperature: float
) -> None:
    expected = autograd(*head, temperature)["weights"]
    torch.testing.assert_close(
        parameter_sensitivity(*head, temperature), expected, rtol=1e-12, atol=1e-300
    )


@given(st.integers(0, 10**6), temperatures)
def test_float32_sensitivities_equal_autograd(seed: int, temperature: float) -> None:
    head = drawn(seed, n=6, k=4, width=5, dtype=torch.float32)
    single = measured(head, temperature)
    assert_close(single, autograd(*head, temperature), 1e-6)
    double = autograd(head[0].double(), head[1].double(), head[2].double(), temperature)
    assert_close(single, double, 1e-12)


def test_more_samples_than_a_batch_equal_autograd() -> None:
    head = drawn(0, n=BATCH + 7, k=3, width=4)
    assert_close(measured(head), autograd(*head), 1e-12)


def test_one_class_takes_the_whole_probability() -> None:
    features, weight, bias = drawn(1, n=9, k=1, width=4)
    found = measured((features, weight, bias), 3.0)
    expected = {
        "weights": features.abs().mean(dim=0, keepdim=True),
        "mean": features.abs().mean(dim=0),
        "gradient": weight[0].abs(),
        "taylor": (features * weight).abs().mean(dim=0),
    }
    assert_close(found, expected, 1e-14)


def test_dead_features_have_no_sensitivity_but_a_gradient() -> None:
    features, weight, bias = drawn(2, n=9, k=3, width=4)
    features[:, 1] = 0
    found = measured((features, weight, bias))
    assert (found["weights"][:, 1] == 0).all()
    assert found["mean"][1] == 0
    assert found["taylor"][1] == 0
    assert found["gradient"][1] > 0
    assert_close(found, autograd(features, weight, bias), 1e-12)


def test_all_features_dead_gives_zeros_not_nan() -> None:
    _, weight, bias = drawn(3, n=1, k=3, width=4)
    assert (parameter_sensitivity(torch.zeros(5, 4), weight, bias) == 0).all()


def test_the_sign_of_a_feature_does_not_change_its_weights_sensitivity_at_equal_logits() -> None:
    features, weight, bias = drawn(4, n=6, k=3, width=4)
    flipped = parameter_sensitivity(-features, -weight, bias)
    assert torch.equal(flipped, parameter_sensitivity(features, weight, bias))


def test_sensitivities_are_float64_on_the_cpu_with_the_heads_shape() -> None:
    head = drawn(5, n=3, k=2, width=6, dtype=torch.float32)
    for name, tensor in measured(head).items():
        assert tensor.dtype == torch.float64
        assert tensor.device.type == "cpu"
        assert tensor.shape == ((2, 6) if name == "weights" else (6,))


def test_huge_logits_do_not_overflow() -> None:
    features, weight, bias = drawn(6, n=4, k=3, width=4)
    head = (1e4 * features, weight, bias)
    assert_close(measured(head), autograd(*head), 1e-12)


cuts = st.lists(st.integers(0, 20), max_size=5)


def sums_of_parts(head: Head, at: list[int]) -> list[SensitivitySums]:
    features, weight, bias = head
    bounds = [0, *sorted(at), len(features)]
    parts = [features[a:b] for a, b in pairwise(bounds)]
    return [SensitivitySums.of(part, weight, bias) for part in parts]


def merged(parts: list[SensitivitySums]) -> SensitivitySums:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@given(st.integers(0, 10**6), cuts)
def test_any_division_into_shards_merges_to_the_whole(seed: int, at: list[int]) -> None:
    head = drawn(seed, n=20, k=3, width=4)
    total, whole = merged(sums_of_parts(head, at)), SensitivitySums.of(*head)
    assert total.count == whole.count == 20
    for name in TENSORS:
        torch.testing.assert_close(getattr(total, name), getattr(whole, name), rtol=1e-12, atol=0)


@given(st.integers(0, 10**6), cuts, st.randoms(use_true_random=False))
def test_merging_gives_the_same_bits_whichever_shard_was_computed_first(
    seed: int, at: list[int], shuffle: random.Random
) -> None:
    features, weight, bias = drawn(seed, n=20, k=3, width=4)
    bounds = [0, *sorted(at), 20]
    order = list(range(len(bounds) - 1))
    shuffle.shuffle(order)
    computed = {
        i: SensitivitySums.of(features[bounds[i] : bounds[i + 1]], weight, bias) for i in order
    }
    in_order = sums_of_parts((features, weight, bias), at)
    assert_same_bits(merged([computed[i] for i in sorted(computed)]), merged(in_order))


def test_a_shard_without_samples_adds_nothing() -> None:
    head = drawn(7, n=5, k=3, width=4)
    whole = SensitivitySums.of(*head)
    assert_same_bits(whole + SensitivitySums.of(head[0][:0], *head[1:]), whole)


def test_sums_of_different_heads_cannot_be_added() -> None:
    sums = [SensitivitySums.of(*drawn(8, n=5, k=3, width=width)) for width in (4, 5)]
    with pytest.raises(InputError, match="different models"):
        sums[0] + sums[1]


clips = st.none() | st.floats(-1, 3)


@given(heads, temperatures, st.floats(-1, 3))
def test_clipping_equals_autograd_at_clipped_features(
    head: Head, temperature: float, clip: float
) -> None:
    features, weight, bias = head
    found = SensitivitySums.of(*head, temperature, clip).mean()
    actual = {"weights": found.weights}
    actual.update((kind, found.neurons(kind)) for kind in KINDS)
    assert_close(actual, autograd(features.clamp(max=clip), weight, bias, temperature), 1e-12)


@given(heads, temperatures, st.floats(-1, 3))
def test_clipping_is_clamping_by_hand_and_leaves_the_features_alone(
    head: Head, temperature: float, clip: float
) -> None:
    features, weight, bias = head
    before = features.clone()
    clipped = SensitivitySums.of(features, weight, bias, temperature, clip)
    assert torch.equal(features, before)
    by_hand = SensitivitySums.of(features.clamp(max=clip), weight, bias, temperature)
    assert_same_bits(clipped, by_hand, but="clip")
    assert (clipped.temperature, clipped.clip) == (temperature, clip)
    assert (by_hand.temperature, by_hand.clip) == (temperature, None)


def test_float32_features_are_clipped_too() -> None:
    features, weight, bias = drawn(13, n=20, k=3, width=4, dtype=torch.float32)
    found = SensitivitySums.of(features, weight, bias, clip=0.3)
    by_hand = SensitivitySums.of(features.double().clamp(max=0.3), weight, bias)
    assert_same_bits(found, by_hand, but="clip")


def test_a_clip_above_all_features_changes_nothing() -> None:
    head = drawn(14, n=20, k=3, width=4)
    top = float(head[0].max())
    assert_same_bits(SensitivitySums.of(*head, clip=top), SensitivitySums.of(*head), but="clip")


@given(st.integers(0, 10**6), st.integers(1, 9), temperatures, clips)
def test_halves_are_those_of_every_other_row(
    seed: int, n: int, temperature: float, clip: float | None
) -> None:
    features, weight, bias = drawn(seed, n, k=3, width=4)
    [found] = measure(features, weight, bias, [temperature], [clip])
    parts = [
        SensitivitySums.of(features[rows], weight, bias, temperature, clip)
        for rows in (range(0, n, 2), range(1, n, 2))
    ]
    assert_same_bits(found, (parts[0] + parts[1]).mean())
    assert (found.count, found.temperature, found.clip) == (n, temperature, clip)
    if n == 1:
        assert found.halves is None
        return
    assert found.halves is not None
    for half, part in zip(found.halves, parts, strict=True):
        assert_same_bits(half, part.mean())
        assert half.halves is None
    assert [half.count for half in found.halves] == [(n + 1) // 2, n // 2]


@given(st.integers(0, 10**6), cuts, temperatures, clips)
def test_halves_together_are_the_sum(
    seed: int, at: list[int], temperature: float, clip: float | None
) -> None:
    features, weight, bias = drawn(seed, n=20, k=3, width=4)
    parts = [
        merged(
            [
                SensitivitySums.of(features[a:b], weight, bias, temperature, clip)
                for a, b in pairwise([0, *sorted(at), 20])
            ]
        ),
        SensitivitySums.of(drawn(seed + 1, 13, 3, 4)[0], weight, bias, temperature, clip),
    ]
    found = halved(parts[0], parts[1])
    assert_same_bits(found, (parts[0] + parts[1]).mean())
    assert found.count == 33
    assert found.halves is not None
    for half, part in zip(found.halves, parts, strict=True):
        assert_same_bits(half, part.mean())
    for name in TENSORS:
        weighted = (20 * getattr(found.halves[0], name) + 13 * getattr(found.halves[1], name)) / 33
        torch.testing.assert_close(getattr(found, name), weighted, rtol=1e-12, atol=0)


def test_where_a_half_is_empty_there_are_no_halves() -> None:
    features, weight, bias = drawn(15, n=5, k=3, width=4)
    some, none = (SensitivitySums.of(part, weight, bias) for part in (features, features[:0]))
    for first, second in ((some, none), (none, some)):
        found = halved(first, second)
        assert found.halves is None
        assert_same_bits(found, some.mean())
    with pytest.raises(InputError, match="no samples"):
        halved(none, none)


def test_several_settings_are_measured_clip_by_clip_and_each_as_if_alone() -> None:
    head = drawn(16, n=21, k=3, width=4)
    found = measure(*head, (0.5, 1.0, 2.0), (None, 0.7))
    assert [(each.clip, each.temperature) for each in found] == [
        (None, 0.5),
        (None, 1.0),
        (None, 2.0),
        (0.7, 0.5),
        (0.7, 1.0),
        (0.7, 2.0),
    ]
    for each in found:
        [alone] = measure(*head, (each.temperature,), (each.clip,))
        assert_same_bits(each, alone)
        assert each.halves is not None
        assert alone.halves is not None
        for half, half_alone in zip(each.halves, alone.halves, strict=True):
            assert_same_bits(half, half_alone)
    assert len({tuple(each.weights.flatten().tolist()) for each in found}) == len(found)


def test_measuring_without_samples_is_refused() -> None:
    features, weight, bias = drawn(17, n=1, k=3, width=4)
    with pytest.raises(InputError, match="no samples"):
        measure(features[:0], weight, bias)


@pytest.mark.parametrize(
    "other", [{"temperature": 2.0}, {"clip": 0.5}, {"clip": None}, {"clip": None, "temperature": 3}]
)
def test_sums_of_different_settings_cannot_be_added(other: dict[str, Any]) -> None:
    sums = SensitivitySums.of(*drawn(18, n=5, k=3, width=4), temperature=1.0, clip=0.7)
    for first, second in ((sums, replace(sums, **other)), (replace(sums, **other), sums)):
        with pytest.raises(InputError, match="different temperatures or clips"):
            first + second
        with pytest.raises(InputError, match="different temperatures or clips"):
            halved(first, second)


def test_sums_keep_their_setting() -> None:
    sums = SensitivitySums.of(*drawn(19, n=5, k=3, width=4), temperature=2.0, clip=0.7)
    for each in (sums, sums + sums, (sums + sums).mean(), halved(sums, sums)):
        assert (each.temperature, each.clip) == (2.0, 0.7)


@pytest.mark.parametrize("percentile", [5, 50, 80, 85, 90, 95, 99, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_threshold_of_a_clip_is_that_of_pytorch_oods_react(
    percentile: float, dtype: torch.dtype
) -> None:
    features = drawn(20, n=70, k=3, width=9, dtype=dtype)[0].relu()
    react = ReAct(None, None, percentile=percentile / 100)
    react.fit_feature_maps(features, torch.zeros(len(features)))
    found = clip_threshold(features, percentile)
    assert found == pytest.approx(react.threshold, rel=1e-12)
    assert found == pytest.approx(float(np.percentile(features.numpy(), percentile)), rel=1e-12)
    assert float((features <= found * (1 + 1e-6)).double().mean()) >= percentile / 100 - 1 / 630


def test_no_samples_are_refused() -> None:
    _, weight, bias = drawn(9, n=1, k=3, width=4)
    with pytest.raises(InputError, match="no samples"):
        parameter_sensitivity(torch.zeros(0, 4), weight, bias)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused_by_row(value: float) -> None:
    features, weight, bias = drawn(10, n=5, k=3, width=4)
    features[3, 2] = value
    with pytest.raises(InputError, match=r"NaN or infinite.*row 3"):
        parameter_sensitivity(features, weight, bias)


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 3), (3, 4), (3,)),
        ((4,), (3, 4), (3,)),
        ((5, 4, 1), (3, 4), (3,)),
        ((5, 4), (3, 4), (4,)),
        ((5, 4), (3, 4), (3, 1)),
        ((5, 4), (4,), (4,)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    features, weight, bias = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(InputError):
        parameter_sensitivity(features, weight, bias)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature"):
        parameter_sensitivity(*drawn(11, n=5, k=3, width=4), temperature)


def test_an_unknown_neuron_sensitivity_is_refused_with_the_known_ones() -> None:
    unknown: Any = "median"
    with pytest.raises(InputError, match=r"'median'.*mean, gradient, taylor"):
        neuron_sensitivity(*drawn(12, n=5, k=3, width=4), kind=unknown)


@given(
    st.lists(
        st.lists(
            st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0]),
            min_size=1,
            max_size=40,
        ),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.floats(0, 100), min_size=1, max_size=3),
)
def test_thresholds_found_part_by_part_are_those_of_the_whole(
    parts: list[list[float]], percentiles: list[float]
) -> None:
    blocks = [torch.tensor(part, dtype=torch.float32)[:, None] for part in parts]
    whole = torch.cat(blocks).double()
    for found, percentile in zip(
        clip_thresholds(lambda: blocks, percentiles), percentiles, strict=True
    ):
        expected = clip_threshold(whole, percentile)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6 * float(whole.abs().max()))


@pytest.mark.parametrize(("blocks", "percentile"), [([], 50.0), ([torch.ones(2, 2)], 101.0)])
def test_thresholds_of_nothing_or_beyond_all_are_refused(
    blocks: list[Tensor], percentile: float
) -> None:
    with pytest.raises(InputError, match=f"Percentile {percentile:g} of"):
        clip_thresholds(lambda: blocks, [percentile])
