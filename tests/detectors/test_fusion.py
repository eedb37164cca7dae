"""Fusion of detectors: calibrated p-values, by hand and by properties, and what combining gives."""

from math import exp, log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, norm
from torch import Tensor, tensor

from opnp.detectors.fusion import LARGEST, Calibration, Combination, combine
from opnp.errors import InputError
from opnp.metrics.separation import fpr95_auroc

FINITE = st.floats(-1e12, 1e12)
SCORES = st.lists(FINITE, min_size=1, max_size=60)


def test_p_values_by_hand() -> None:
    calibration = Calibration.of(tensor([3.0, 1.0, 2.0, 2.0]))  # the tail begins at 3
    found = calibration.p_values(tensor([0.0, 1.0, 1.5, 2.0, 2.5, 3.0]))
    assert found.tolist() == pytest.approx([1, 1, 4 / 5, 4 / 5, 2 / 5, 2 / 5])


def test_the_tail_by_hand() -> None:
    scores = torch.arange(1, 21).double()  # u = 19, reached by two of twenty; the excess of 20 is 1
    calibration = Calibration.of(scores)
    assert (calibration.start, calibration.scale) == (19, 1)
    found = calibration.p_values(tensor([19.0, 20.0, 22.0, 119.0]))
    assert found.tolist() == pytest.approx([3 / 21 * exp(-away) for away in (0, 1, 3, 100)])


def test_the_tail_of_exponential_scores_is_the_true_one() -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration.of(torch.from_numpy(rng.exponential(2.0, 200_000)))
    x = tensor([1.0, 5.0, 10.0, 40.0])
    np.testing.assert_allclose(calibration.surprise(x), x.numpy() / 2, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("n", [1, 2, 9, 50])
def test_p_values_are_valid_where_they_are_counted(n: int) -> None:
    """P(p ≤ α) ≤ α of exchangeable scores, ties and few of them included."""
    rng = np.random.default_rng(n)
    drawn = torch.from_numpy(rng.integers(0, 8, (4000, n + 1)).astype(float))
    p = torch.cat([Calibration.of(row[:-1]).p_values(row[-1:]) for row in drawn])
    for alpha in (0.1, 0.2, 0.5, 0.9):
        counted = alpha if alpha > 0.1 else 0.13  # below, the tail is an estimate
        assert (p <= alpha).double().mean() <= counted + 0.02


@given(SCORES, st.lists(FINITE, min_size=2, max_size=20))
def test_surprise_is_monotone_finite_and_not_negative(scores: list[float], x: list[float]) -> None:
    calibration = Calibration.of(tensor(scores, dtype=torch.float64))
    extremes = [-float("inf"), -1e300, *sorted(x), 1e300, float("inf")]
    found = calibration.surprise(tensor(extremes, dtype=torch.float64))
    assert torch.isfinite(found).all()
    assert (found >= 0).all()
    assert (found.diff() >= 0).all()
    assert found[0] == 0
    assert found.max() <= LARGEST


@given(SCORES)
def test_the_order_of_the_validation_scores_does_not_matter(scores: list[float]) -> None:
    x = tensor(scores, dtype=torch.float64)
    one, other = Calibration.of(x), Calibration.of(x.flip(0))
    assert torch.equal(one.surprise(x), other.surprise(x))


def test_scores_that_are_all_the_same_leave_three_levels() -> None:
    calibration = Calibration.of(torch.full((9,), 4.0))
    assert calibration.scale == 0
    assert calibration.p_values(tensor([3.0, 4.0, 5.0])).tolist() == pytest.approx([1, 1, 0.1])


def test_a_single_validation_image() -> None:
    p = Calibration.of(tensor([2.0])).p_values(tensor([1.0, 2.0, 3.0]))
    assert p.tolist() == pytest.approx([1, 1, 0.5])


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [float("inf")]])
def test_scores_that_cannot_calibrate_are_refused(bad: list[float]) -> None:
    with pytest.raises(InputError, match="finite scores of at least one validation image"):
        Calibration.of(tensor(bad))


def test_a_score_that_is_nan_is_refused_with_its_row() -> None:
    with pytest.raises(InputError, match="row 1 is NaN"):
        Calibration.of(tensor([1.0])).surprise(tensor([1.0, float("nan")]))


def test_combinations_by_hand() -> None:
    p = tensor([[0.5, 0.01], [0.2, 0.3]], dtype=torch.float64)
    t = list(-torch.log(p))
    np.testing.assert_allclose(combine(t), [-log(0.1), -log(0.003)])
    np.testing.assert_allclose(combine(t, "maximum"), [-log(0.2), -log(0.01)])
    np.testing.assert_allclose(
        combine(t, "z"), norm.isf(p[0].numpy()) + norm.isf(p[1].numpy()), atol=1e-9
    )


def test_fishers_sum_has_his_distribution_for_independent_parts() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(3, 100_000))
    total = combine([-torch.log(torch.from_numpy(row)) for row in p])
    share = (2 * total > chi2.isf(0.05, df=6)).double().mean()
    assert share == pytest.approx(0.05, abs=0.003)


@pytest.mark.parametrize("how", ["fisher", "z", "maximum"])
def test_every_combination_is_finite_at_the_ends(how: Combination) -> None:
    calibration = Calibration.of(torch.arange(20.0))
    ends = calibration.surprise(tensor([-float("inf"), float("inf")]))
    found = combine([ends, ends], how)
    assert torch.isfinite(found).all()
    assert found[0] < found[1]


@pytest.mark.parametrize("surprises", [[], [torch.zeros(2), torch.zeros(3)]])
def test_parts_of_other_images_are_refused(surprises: list[Tensor]) -> None:
    with pytest.raises(InputError, match="of the same images"):
        combine(surprises)


@pytest.mark.parametrize("how", ["fisher", "z"])
def test_two_kinds_of_evidence_are_better_than_either(how: Combination) -> None:
    """Each detector sees a half of the outliers and is on a scale of its own."""
    rng = np.random.default_rng(0)

    def scores(shift: tuple[float, float], count: int) -> tuple[Tensor, Tensor]:
        a, b = rng.standard_normal((2, count)) + np.array(shift)[:, None]
        return torch.from_numpy(np.exp(a)), torch.from_numpy(1e6 * b)

    validation, inside = scores((0, 0), 1000), scores((0, 0), 2000)
    left, right = scores((3, 0), 1000), scores((0, 3), 1000)
    outside = [torch.cat(pair) for pair in zip(left, right, strict=True)]
    parts = [Calibration.of(each) for each in validation]

    def fpr95(inner: Tensor, outer: Tensor) -> float:
        return float(fpr95_auroc(inner[None], outer[None], [len(outer)])[0].mean())

    fused = [
        combine([part.surprise(x) for part, x in zip(parts, each, strict=True)], how)
        for each in (inside, outside)
    ]
    alone = [fpr95(a, b) for a, b in zip(inside, outside, strict=True)]
    assert fpr95(fused[0], fused[1]) < 0.75 * min(alone)
