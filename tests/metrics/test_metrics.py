"""Metrics against scikit-learn, by hand, and their bootstrap intervals."""

from itertools import product
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve
from torch import Tensor

from opnp.errors import InputError
from opnp.metrics import bootstrap as bootstrap_module
from opnp.metrics.bootstrap import bootstrap
from opnp.metrics.calibration import calibration
from opnp.metrics.separation import METRICS, fpr95_auroc, ood_metrics, tpr_at_fpr

tied = st.integers(-3, 3).map(lambda value: value / 2)
spread = st.floats(-100, 100)
scores = st.lists(tied, min_size=1, max_size=60) | st.lists(spread, min_size=1, max_size=60)
Interval = tuple[float, float]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scikit_learn(inside: Tensor, outside: Tensor) -> dict[str, float]:
    score = np.r_[inside.numpy(), outside.numpy()]
    is_ood = np.r_[np.zeros(len(inside)), np.ones(len(outside))]

    def fpr95(positive: NDArray[np.float64], value: NDArray[np.float64]) -> float:
        fpr, tpr, _ = roc_curve(positive, value, drop_intermediate=False)
        return float(fpr[np.argmax(tpr >= 0.95)])

    def aupr(positive: NDArray[np.float64], value: NDArray[np.float64]) -> float:
        precision, recall, _ = precision_recall_curve(positive, value)
        return float(auc(recall, precision))

    values = {
        "fpr95": fpr95(1 - is_ood, -score),
        "fpr95_ood_positive": fpr95(is_ood, score),
        "auroc": float(roc_auc_score(is_ood, score)),
        "aupr_in": aupr(1 - is_ood, -score),
        "aupr_out": aupr(is_ood, score),
    }
    return {name: 100 * value for name, value in values.items()}


@given(scores, scores)
def test_every_metric_equals_scikit_learns(inside: list[float], outside: list[float]) -> None:
    found = ood_metrics(tensor(inside), tensor(outside))
    assert tuple(found) == METRICS
    assert found == pytest.approx(scikit_learn(tensor(inside), tensor(outside)), abs=1e-9)


def test_the_two_conventions_of_fpr95_differ_as_documented() -> None:
    # 20 ID scores 0 … 19: a threshold of 18 keeps 95 % of them; outliers at 18 and below pass it.
    inside, outside = torch.arange(20.0), torch.tensor([17.0, 18.0, 18.5, 30.0])
    found = ood_metrics(inside, outside)
    assert found["fpr95"] == 50
    # To catch 95 % of four outliers all must be: what scores 17 or more is rejected, 3 ID samples.
    assert found["fpr95_ood_positive"] == pytest.approx(15)


def test_perfect_separation_is_perfect_and_its_reverse_the_worst() -> None:
    inside, outside = torch.linspace(0, 1, 50), torch.linspace(2, 3, 30)
    best, worst = ood_metrics(inside, outside), ood_metrics(outside, inside)
    assert best == {
        "fpr95": 0, "fpr95_ood_positive": 0, "auroc": 100, "aupr_in": 100, "aupr_out": 100
    }  # fmt: skip
    assert (worst["fpr95"], worst["fpr95_ood_positive"], worst["auroc"]) == (100, 100, 0)


@given(scores, st.lists(scores, min_size=1, max_size=3))
def test_the_searchs_fpr95_and_auroc_equal_the_metrics(
    inside: list[float], sets: list[list[float]]
) -> None:
    everything = tensor([value for outside in sets for value in outside])
    fpr95, auroc = fpr95_auroc(tensor(inside), everything, [len(outside) for outside in sets])
    expected = [ood_metrics(tensor(inside), tensor(outside)) for outside in sets]
    assert fpr95.tolist() == pytest.approx([e["fpr95"] for e in expected], abs=1e-9)
    assert auroc.tolist() == pytest.approx([e["auroc"] for e in expected], abs=1e-9)


@pytest.mark.parametrize("n", [1, 19, 20, 21, 39, 40, 100, 101])
def test_the_searchs_threshold_keeps_95_percent_and_no_more_than_it_must(n: int) -> None:
    inside = torch.arange(float(n))
    fpr95, _ = fpr95_auroc(inside, inside, [n])
    assert fpr95.item() == pytest.approx(100 * -(-95 * n // 100) / n)


@st.composite
def batches(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.float64], list[int]]:
    """ID scores (2, 2, N), outlier scores (2, 2, Σ sizes), with ties or without, and the sizes."""
    n = draw(st.sampled_from([1, 2, 19, 20, 21, 40]))
    sizes = draw(st.lists(st.integers(1, 25), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = rng.normal(size=(2, 2, n + sum(sizes)))
    if draw(st.booleans()):
        values = np.round(values * draw(st.sampled_from([0.0, 0.5, 2.0])))
    return values[..., :n], values[..., n:], sizes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(batches())
def test_a_batch_equals_its_rows_and_scikit_learn(
    device: str,
    dtype: torch.dtype,
    batch: tuple[NDArray[np.float64], NDArray[np.float64], list[int]],
) -> None:
    inside, outliers = (torch.from_numpy(part).to(device, dtype) for part in batch[:2])
    sizes = batch[2]
    before = inside.clone(), outliers.clone()
    found = fpr95_auroc(inside, outliers, sizes)
    assert torch.equal(inside, before[0])
    assert torch.equal(outliers, before[1])
    for values in found:
        assert (values.shape, values.dtype) == ((2, 2, len(sizes)), torch.float64)
        assert values.device == inside.device
    flat = fpr95_auroc(inside.flatten(0, 1), outliers.flatten(0, 1), sizes)
    for a, b in zip(found, flat, strict=True):
        assert torch.equal(a.flatten(0, 1), b)
    for i, j in product(range(2), repeat=2):
        alone = fpr95_auroc(inside[i, j], outliers[i, j], sizes)
        for a, b in zip(found, alone, strict=True):
            assert torch.equal(a[i, j], b)
        fpr95, auroc = (values[i, j].tolist() for values in found)
        for place, outside in enumerate(outliers[i, j].cpu().split(sizes)):
            expected = scikit_learn(inside[i, j].cpu(), outside)
            assert fpr95[place] == pytest.approx(expected["fpr95"], abs=1e-9)
            assert auroc[place] == pytest.approx(expected["auroc"], abs=1e-9)


def test_scores_that_are_all_alike_are_told_apart_by_none() -> None:
    fpr95, auroc = fpr95_auroc(torch.ones(3, 40), torch.ones(3, 9), [1, 3, 5])
    assert fpr95.tolist() == [[100] * 3] * 3
    assert auroc.tolist() == [[50] * 3] * 3


def test_scores_may_be_infinite() -> None:
    inside, outliers = tensor([0, 1, 2]), tensor([float("inf"), 3, -float("inf"), -1])
    fpr95, auroc = fpr95_auroc(inside, outliers, [2, 2])
    assert fpr95.tolist() == [0, 100]
    assert auroc.tolist() == [100, 0]


def weighted(
    inside: Tensor, outside: Tensor, id_weights: list[int], ood_weights: list[int]
) -> dict[str, float]:
    found = bootstrap_module.weighted_metrics(
        inside.numpy(), outside.numpy(), np.array([id_weights]), np.array([ood_weights])
    )
    return {name: float(value[0]) for name, value in found.items()}


@given(scores, scores)
def test_unit_weights_change_nothing(inside: list[float], outside: list[float]) -> None:
    a, b = tensor(inside), tensor(outside)
    found = weighted(a, b, [1] * len(a), [1] * len(b))
    assert found == pytest.approx(ood_metrics(a, b), abs=1e-9)


samples = st.lists(st.tuples(tied | spread, st.integers(0, 3)), min_size=1, max_size=40).filter(
    lambda drawn: any(weight for _, weight in drawn)
)


@given(samples, samples)
def test_a_weight_counts_a_sample_that_often(
    inside: list[tuple[float, int]], outside: list[tuple[float, int]]
) -> None:
    (a, a_weights), (b, b_weights) = (
        (tensor([score for score, _ in drawn]), [weight for _, weight in drawn])
        for drawn in (inside, outside)
    )
    expected = ood_metrics(
        a.repeat_interleave(torch.tensor(a_weights)), b.repeat_interleave(torch.tensor(b_weights))
    )
    assert weighted(a, b, a_weights, b_weights) == pytest.approx(expected, abs=1e-9)


def test_weights_are_taken_row_by_row() -> None:
    inside, outside = tensor([0, 1, 2]), tensor([1.5, 3])
    rows = [([1, 1, 1], [1, 1]), ([0, 0, 3], [2, 0]), ([3, 0, 0], [0, 2])]
    together = bootstrap_module.weighted_metrics(
        inside.numpy(), outside.numpy(), *(np.array(column) for column in zip(*rows, strict=True))
    )
    for row, (id_weights, ood_weights) in enumerate(rows):
        alone = weighted(inside, outside, id_weights, ood_weights)
        assert {name: value[row] for name, value in together.items()} == pytest.approx(alone)


@given(scores, scores)
def test_the_roc_curve_equals_scikit_learns(inside: list[float], outside: list[float]) -> None:
    at = np.linspace(0, 1, 23)
    is_id = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    fpr, tpr, _ = roc_curve(is_id, -np.r_[inside, outside], drop_intermediate=False)
    found = tpr_at_fpr(tensor(inside), tensor(outside), at)
    np.testing.assert_allclose(found, np.interp(at, fpr, tpr), atol=1e-12)


def normal(seed: int, count: int, mean: float) -> Tensor:
    return mean + torch.randn(count, generator=torch.Generator().manual_seed(seed))


def intervals(count: int, seed: int = 0) -> dict[str, Interval]:
    """Of ID scores around 0 and OOD scores around 1.5, ``count`` of each."""
    sets = {"a": normal(2, count, 1.5)}
    return bootstrap(normal(1, count, 0), sets, {"a": "near"}, 200, seed)["a"]


def test_intervals_contain_the_point_estimate() -> None:
    point = ood_metrics(normal(1, 400, 0), normal(2, 400, 1.5))
    for name, (low, high) in intervals(400).items():
        assert low < point[name] < high, name


def test_intervals_depend_on_the_seed_alone() -> None:
    assert intervals(100, seed=3) == intervals(100, seed=3)
    assert intervals(100, seed=3) != intervals(100, seed=4)


def test_intervals_do_not_depend_on_the_size_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = intervals(100)
    monkeypatch.setattr(bootstrap_module, "BLOCK", 1500)  # seven resamples of 200 samples
    assert intervals(100) == at_once


def test_intervals_narrow_with_more_samples() -> None:
    few, many = intervals(100), intervals(2500)
    for name in METRICS:
        assert many[name][1] - many[name][0] < 0.5 * (few[name][1] - few[name][0]), name


def test_the_auroc_interval_is_as_wide_as_theory_says() -> None:
    # Hanley and McNeil, Radiology 1982: the standard error of an AUROC A from n and m samples.
    n = 400
    a = ood_metrics(normal(1, n, 0), normal(2, n, 1.5))["auroc"] / 100
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (n - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (n * n)
    low, high = intervals(n)["auroc"]
    assert high - low == pytest.approx(100 * 2 * 1.96 * variance**0.5, rel=0.25)


def test_the_interval_of_the_mean_contains_the_mean_and_is_narrower_than_the_widest() -> None:
    inside = normal(1, 2000, 0)
    sets = {str(i): normal(10 + i, 60, 1.0) for i in range(6)}
    kinds = {name: "near" if name < "2" else "far" for name in sets}
    found = bootstrap(inside, sets, kinds, 200, 0)
    assert list(found) == [*sets, "near", "far", "mean"]
    for name in METRICS:
        mean = np.mean([ood_metrics(inside, outside)[name] for outside in sets.values()])
        low, high = found["mean"][name]
        assert low < mean < high
        assert high - low < max(found[key][name][1] - found[key][name][0] for key in sets)


def test_the_mean_of_one_set_is_that_set() -> None:
    found = bootstrap(normal(1, 50, 0), {"a": normal(2, 50, 1)}, {"a": "far"}, 50, 0)
    assert list(found) == ["a", "far", "mean"]
    assert found["mean"] == found["far"] == found["a"]


SETS = {
    "a": normal(2, 30, 1.0),
    "b": normal(3, 55, 1.5),
    "c": normal(4, 20, 3.0),
    "d": normal(5, 1, 2.0),
}


def test_groups_are_means_of_the_sets_values_in_each_resample() -> None:
    inside, resamples, seed = normal(1, 40, 0), 60, 7
    kinds = {"a": "near", "b": "far", "c": "near", "d": "far"}
    found = bootstrap(inside, SETS, kinds, resamples, seed)
    id_rng, *rngs = np.random.default_rng(seed).spawn(1 + len(SETS))
    drawn: dict[str, list[dict[str, float]]] = {name: [] for name in SETS}
    for _ in range(resamples):
        times = torch.from_numpy(id_rng.multinomial(40, np.full(40, 1 / 40)))
        for (name, outside), rng in zip(SETS.items(), rngs, strict=True):
            m = len(outside)
            again = torch.from_numpy(rng.multinomial(m, np.full(m, 1 / m)))
            drawn[name].append(
                ood_metrics(inside.repeat_interleave(times), outside.repeat_interleave(again))
            )
    groups = {**{name: [name] for name in SETS}, "near": ["a", "c"], "far": ["b", "d"]}
    for group, names in {**groups, "mean": list(SETS)}.items():
        for metric in METRICS:
            values = [np.mean([drawn[name][i][metric] for name in names]) for i in range(resamples)]
            expected = np.percentile(values, [2.5, 97.5])
            assert found[group][metric] == pytest.approx(tuple(expected), abs=1e-9)


def test_sets_have_the_same_intervals_whatever_their_kinds() -> None:
    inside = normal(1, 40, 0)
    split = bootstrap(inside, SETS, dict(zip(SETS, ("near", "far") * 2, strict=True)), 50, 0)
    near = bootstrap(inside, SETS, dict.fromkeys(SETS, "near"), 50, 0)
    assert list(near) == [*SETS, "near", "mean"]
    assert near["near"] == near["mean"] == split["mean"]
    for name in SETS:
        assert near[name] == split[name]


def test_perfect_separation_has_no_uncertainty() -> None:
    found = bootstrap(torch.zeros(20), {"a": torch.ones(20)}, {"a": "near"}, 50, 0)["a"]
    assert found["auroc"] == (100, 100)
    assert found["fpr95"] == (0, 0)


def binary(confidence: float, count: int, right: int) -> tuple[Tensor, Tensor]:
    """Logits of two classes that give class 0 ``confidence``, and labels, ``right`` of them 0."""
    logits = tensor([log(confidence / (1 - confidence)), 0]).repeat(count, 1)
    return logits, (torch.arange(count) >= right).long()


def test_calibration_equals_the_sum_by_hand() -> None:
    # Two bins of 100: one too timid by a tenth, one too bold by a tenth.
    parts = [binary(0.6, 100, 70), binary(0.9, 100, 80)]
    found = calibration(*(torch.cat(column) for column in zip(*parts, strict=True)))
    nll = -(70 * log(0.6) + 30 * log(0.4) + 80 * log(0.9) + 20 * log(0.1)) / 200
    assert found == pytest.approx({"accuracy": 75, "ece": 10, "nll": nll})


def test_calibration_bins_by_confidence_not_by_order() -> None:
    logits, labels = (
        torch.cat(column) for column in zip(binary(0.6, 100, 70), binary(0.9, 100, 80), strict=True)
    )
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert calibration(logits[order], labels[order]) == pytest.approx(calibration(logits, labels))


def test_few_samples_are_calibrated_in_a_single_bin() -> None:
    found = calibration(*binary(0.75, 8, 4))
    assert found["accuracy"] == 50
    assert found["ece"] == pytest.approx(25)


BROKEN = pytest.mark.parametrize(
    ("inside", "outside", "named"),
    [
        ([], [1.0], "no ID scores"),
        ([1.0], [], "no OOD scores"),
        ([1.0, float("nan")], [1.0], "ID scores contain NaN"),
        ([1.0], [float("nan")], "OOD scores contain NaN"),
    ],
)


@BROKEN
def test_scores_without_a_metric_are_refused(
    inside: list[float], outside: list[float], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        ood_metrics(tensor(inside), tensor(outside))


@BROKEN
def test_scores_without_an_interval_are_refused(
    inside: list[float], outside: list[float], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        bootstrap(tensor(inside), {"a": tensor(outside)}, {"a": "near"}, 10, 0)
