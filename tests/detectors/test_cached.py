"""Detectors of cached features, against their papers' formulas written out in loops."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_ood.api import ModelNotSetException, RequiresFittingException
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn

from opnp.detectors.cached import CachedDetector, class_means
from opnp.detectors.cadref import CADRef
from opnp.detectors.core import CORE
from opnp.detectors.gmm import GMM
from opnp.detectors.itp import ITP
from opnp.detectors.kpca import KPCA
from opnp.detectors.line import LINe
from opnp.detectors.mahalanobis import (
    Mahalanobis,
    MahalanobisPP,
    RelativeMahalanobis,
    RelativeMahalanobisPP,
)
from opnp.detectors.nac import NAC
from opnp.detectors.nero import NERO
from opnp.detectors.optfs import OptFS
from opnp.detectors.ras import RAS
from opnp.detectors.she import SHE
from opnp.errors import InputError
from opnp.pruning.energy import linear_head

K, L, N = 4, 10, 120
ALL: list[type[CachedDetector]] = [
    CADRef, CORE, GMM, ITP, KPCA, LINe, Mahalanobis, MahalanobisPP, NAC, OptFS, RAS,
    RelativeMahalanobis, RelativeMahalanobisPP, SHE,
]  # fmt: skip

Array = np.ndarray[Any, np.dtype[np.float64]]


def head() -> nn.Linear:
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((K, L)), rng.standard_normal(K)
    return linear_head(torch.from_numpy(weight).float(), torch.from_numpy(bias).float())


def drawn(count: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features that are not negative, in clusters of their labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, count)
    centres = 2 * np.random.default_rng(5).random((K, L))
    h = np.maximum(centres[y] + 0.4 * rng.standard_normal((count, L)), 0)
    return torch.from_numpy(h).float(), torch.from_numpy(y)


def parts() -> tuple[Array, Array, Array, Array, Array]:
    """h, y, W, b and new features, float64."""
    (h, y), (new, _) = drawn(), drawn(30, seed=7)
    made = head()
    arrays = (h, y, made.weight.detach(), made.bias.detach(), new + 0.5)
    return tuple(each.double().numpy() for each in arrays)  # type: ignore[return-value]


def scores(detector: CachedDetector, new: Array) -> Array:
    h, y = drawn()
    found = detector.fit_features(h, y).predict_features(torch.from_numpy(new))
    assert found.dtype == torch.float64
    return np.asarray(found.numpy())


def mahalanobis(h: Array, y: Array, new: Array, relative: bool) -> Array:
    means = np.stack([h[y == c].mean(axis=0) for c in range(K)])
    inverse = np.linalg.inv(ledoit_wolf(h - means[y.astype(int)], assume_centered=True)[0])
    found = np.array([min((x - m) @ inverse @ (x - m) for m in means) for x in new])
    if relative:
        mean = h.mean(axis=0)
        inverse = np.linalg.inv(ledoit_wolf(h - mean, assume_centered=True)[0])
        found -= np.array([(x - mean) @ inverse @ (x - mean) for x in new])
    return found


@pytest.mark.parametrize(
    ("make", "normalized", "relative"),
    [
        (Mahalanobis, False, False),
        (MahalanobisPP, True, False),
        (RelativeMahalanobis, False, True),
        (RelativeMahalanobisPP, True, True),
    ],
)
def test_mahalanobis(make: Callable[..., CachedDetector], normalized: bool, relative: bool) -> None:
    h, y, _, _, new = parts()
    found = scores(make(None, head()), new)
    if normalized:
        h, new = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (h, new))
    np.testing.assert_allclose(found, mahalanobis(h, y, new, relative), rtol=1e-8)


@pytest.mark.parametrize("prior", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("left_out", [(), (2,), (2, 3)])
def test_gmm(prior: float, left_out: tuple[int, ...]) -> None:
    """With a class of one sample, and perhaps without others."""
    h, y, _, _, new = parts()
    single = np.flatnonzero(y == 1)[1:]
    kept = np.setdiff1d(np.flatnonzero(~np.isin(y, left_out)), single)
    h, y = h[kept], y[kept].astype(int)
    classes = sorted({*y})
    means = {c: h[y == c].mean(axis=0) for c in classes}
    away = h - np.stack([means[c] for c in y])
    pooled = ledoit_wolf(away, assume_centered=True)[0]
    likelihoods = []
    for c in classes:
        count = int((y == c).sum())
        own = away[y == c].T @ away[y == c]
        covariance = (own + prior * pooled) / (count + prior)
        density = multivariate_normal(means[c], covariance)
        likelihoods.append(np.log(count / len(h)) + density.logpdf(new))
    expected = -logsumexp(likelihoods, axis=0)
    detector = GMM(None, head(), prior).fit_features(torch.from_numpy(h), torch.from_numpy(y))
    found = detector.predict_features(torch.from_numpy(new)).numpy()
    difference = found - expected  # a constant that all samples share
    np.testing.assert_allclose(difference, difference[0], rtol=1e-6, atol=1e-6)


def test_gmm_with_more_classes_than_features_and_without_spread() -> None:
    with pytest.raises(InputError, match=r"prior=0 must be positive and finite"):
        GMM(None, head(), prior=0)
    with pytest.raises(InputError, match=r"prior=-1 must be positive and finite"):
        GMM(None, head()).set_hyperparameters(prior=-1)
    single, y = drawn(K)[0], torch.arange(K)  # one sample a class: distances to the nearest
    found = (
        GMM(None, head()).fit_features(single, y).predict_features(torch.cat([single, single + 3]))
    )
    assert found[:K].max() < found[K:].min()


def test_she() -> None:
    h, y, weight, bias, new = parts()
    predicted = (h @ weight.T + bias).argmax(axis=1)
    correct = predicted == y
    classes = [c for c in range(K) if (correct & (y == c)).any()]
    assert len(classes) > 1
    expected = []
    for x in new:
        logits = weight @ x + bias
        k = max(classes, key=lambda c: logits[c])
        expected.append(-x @ h[correct & (y == k)].mean(axis=0))
    np.testing.assert_allclose(scores(SHE(None, head()), new), expected)


@pytest.mark.parametrize("logit_score", ["energy", "maxlogit", "msp", "gen"])
def test_cadref(logit_score: str) -> None:
    h, y, weight, bias, new = parts()

    def score(f: Array) -> float:
        p = np.exp(f - logsumexp(f))
        values = {
            "energy": logsumexp(f),
            "maxlogit": f.max(),
            "msp": p.max(),
            "gen": 1 / sum(q**0.1 * (1 - q) ** 0.1 for q in p),
        }
        return max(float(values[logit_score]), 1e-6)

    mean_score = np.mean([score(weight @ x + bias) for x in h])
    expected = []
    for x in new:
        f = weight @ x + bias
        k = int(f.argmax())
        away = x - h[y == k].mean(axis=0)
        raising = sum(abs(away[j]) for j in range(L) if away[j] * weight[k, j] > 0)
        lowering = sum(abs(away[j]) for j in range(L) if away[j] * weight[k, j] < 0)
        expected.append((raising / score(f) + lowering / mean_score) / np.abs(x).sum())
    found = scores(CADRef(None, head(), logit_score), new)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(("percentile", "deviations"), [(0, 2.2), (30, 1.5), (50, 0.1)])
def test_itp(percentile: float, deviations: float) -> None:
    h, y, weight, bias, new = parts()
    mean, deviation = np.empty((2, K, L))
    for i in range(K):
        contributions = weight[i] * h[y == i]
        mean[i], deviation[i] = contributions.mean(axis=0), contributions.std(axis=0, ddof=1)
    threshold = np.percentile(mean, percentile) if percentile else -np.inf
    expected = []
    for x in new:
        f = bias.copy()
        for i in range(K):
            for j in range(L):
                c = weight[i, j] * x[j]
                if mean[i, j] > threshold and c < mean[i, j] + deviations * deviation[i, j]:
                    f[i] += c
        expected.append(-logsumexp(f))
    np.testing.assert_allclose(scores(ITP(None, head(), percentile, deviations), new), expected)


@pytest.mark.parametrize(
    ("weights", "neurons", "clip"), [(10, 10, 95), (50, 0, None), (0, 50, 90), (90, 90, 99)]
)
def test_line(weights: float, neurons: float, clip: float | None) -> None:
    h, y, weight, bias, new = parts()
    expected = []
    for x in new:
        clipped = x if clip is None else np.minimum(x, np.percentile(h, clip))
        c = int((weight @ clipped + bias).argmax())
        value = weight[c] * h[y == c].mean(axis=0)
        matrix = np.abs(value) * weight
        by_weight = matrix > np.percentile(matrix, weights) if weights else np.full((K, L), True)
        by_neuron = value > np.percentile(value, neurons) if neurons else np.full(L, True)
        expected.append(-logsumexp((weight * by_weight * by_neuron) @ clipped + bias))
    found = scores(LINe(None, head(), weights, neurons, clip), new)
    np.testing.assert_allclose(found, expected)


def test_ras() -> None:
    h, _, weight, bias, new = parts()
    profile = np.sort(h, axis=1).mean(axis=0)
    expected = []
    for x in new:
        shifted = np.empty(L)
        shifted[np.argsort(x, kind="stable")] = profile
        expected.append(-logsumexp(weight @ shifted + bias))
    np.testing.assert_allclose(scores(RAS(None, head()), new), expected)


def test_optfs() -> None:
    h, _, weight, bias, new = parts()
    low, high = np.quantile(h, [1e-3, 1 - 1e-3])
    edges = np.linspace(low, high, 8)
    worth = np.zeros(7)
    for x in h:
        k = int((weight @ x + bias).argmax())
        for b in range(7):
            inside = (x >= edges[b]) & (x < edges[b + 1])
            worth[b] += (weight[k] * x)[inside].sum() / len(h)
    worth *= 50 / np.linalg.norm(worth)
    expected = []
    for x in new:
        shaped = np.zeros(L)
        for b in range(7):
            inside = (x >= edges[b]) & (x < edges[b + 1])
            shaped[inside] = x[inside] * worth[b]
        expected.append(-logsumexp(weight @ shaped + bias))
    np.testing.assert_allclose(scores(OptFS(None, head(), norm=50, bins=7), new), expected)


def authors_edges(bins: int) -> Array:
    """The edges that the code of NAC's authors gives, of which the last lies above 1."""
    x = np.emath.logn(1e3, np.linspace(1, np.sqrt(1e3), num=bins // 2))
    edges = np.concatenate([x[:-1], (1 - x)[::-1]])
    edges[-1] += 1e-2
    return np.asarray(edges)


@pytest.mark.parametrize(("steepness", "bins", "enough"), [(1.0, 50, 5), (100.0, 10, 50)])
def test_nac(steepness: float, bins: int, enough: int) -> None:
    h, _, weight, bias, new = parts()

    def states(x: Array) -> Array:
        inputs = torch.from_numpy(x).requires_grad_()
        logits = inputs @ torch.from_numpy(weight).T + torch.from_numpy(bias)
        loss = -logits.log_softmax(dim=1).mean(dim=1).sum()  # the gradient is autograd's
        (gradient,) = torch.autograd.grad(loss, inputs)
        return np.asarray((steepness * inputs * gradient).sigmoid().detach().numpy())

    edges, train = authors_edges(bins), states(h)
    assert len(edges) == bins - 1
    expected = []
    for s in states(new):
        covered = []
        for j in range(L):
            b = int(np.searchsorted(edges, s[j], side="right")) - 1
            hits = ((train[:, j] >= edges[b]) & (train[:, j] < edges[b + 1])).sum()
            covered.append(min(hits / enough, 1))
        expected.append(-np.mean(covered))
    np.testing.assert_allclose(scores(NAC(None, head(), steepness, bins, enough), new), expected)


def test_kpca_with_a_cosine_kernel() -> None:
    h, _, _, _, new = parts()
    train, test = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (h, new))
    centred = train - train.mean(axis=0)
    _, values, rows = np.linalg.svd(centred)
    shares = (values**2).cumsum() / (values**2).sum()
    q = int(np.argmax(shares >= 0.9)) + 1
    assert 1 < q < L
    away = test - train.mean(axis=0)
    expected = np.linalg.norm(away - away @ rows[:q].T @ rows[:q], axis=1)
    np.testing.assert_allclose(scores(KPCA(None, head(), 0.9), new), expected)


def test_the_random_features_of_kpca_have_the_gaussian_kernel() -> None:
    h, _ = drawn()
    detector = KPCA(None, head(), gamma=0.7, dimensions=20_000)
    mapped = detector._mapped(h.double())
    direction = nn.functional.normalize(h.double(), dim=1)
    kernel = torch.exp(-0.7 * torch.cdist(direction, direction) ** 2)
    torch.testing.assert_close(mapped @ mapped.T, kernel, atol=0.04, rtol=0)
    assert torch.equal(detector._mapped(h.double()), mapped)


def test_core() -> None:
    h, y, weight, bias, new = parts()
    projection = np.linalg.pinv(weight) @ weight

    def both(x: Array) -> list[float]:
        rest = x - projection @ x
        cosines = []
        for c in range(K):
            mean = (h[y == c] - h[y == c] @ projection.T).mean(axis=0)
            cosines.append(rest @ mean / np.linalg.norm(rest) / np.linalg.norm(mean))
        return [logsumexp(weight @ x + bias), max(cosines)]

    train, test = (np.array([both(x) for x in each]) for each in (h, new))
    expected = -((test - train.mean(axis=0)) / train.std(axis=0, ddof=1)).sum(axis=1)
    np.testing.assert_allclose(scores(CORE(None, head()), new), expected, rtol=1e-6)


def test_core_without_a_residual_is_the_energy() -> None:
    rng = np.random.default_rng(0)
    square = linear_head(torch.from_numpy(rng.standard_normal((L, L))), torch.zeros(L).double())
    (h, y), (new, _) = drawn(), drawn(30, seed=7)
    found = CORE(None, square).fit_features(h, y).predict_features(new)
    energy = -square(new.double()).logsumexp(dim=1)
    assert torch.equal(found.argsort(), energy.argsort())


@pytest.mark.parametrize("make", [make for make in ALL if make is not SHE])
@pytest.mark.parametrize("present", [1, 2])
def test_classes_without_samples_and_with_one_are_no_obstacle(
    make: Callable[..., CachedDetector], present: int
) -> None:
    h, _ = drawn(3)
    y = torch.tensor([0, 0, present])
    assert torch.isfinite(make(None, head()).fit_features(h, y).predict_features(h)).all()


@pytest.mark.parametrize("make", ALL)
def test_features_that_are_all_the_same_or_zero(make: Callable[..., CachedDetector]) -> None:
    same, y = torch.ones(6, L), torch.arange(6) % K
    found = make(None, head()).fit_features(same, y).predict_features(torch.zeros(2, L))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("make", ALL)
def test_what_is_fitted_holds_for_every_batch_and_every_dtype(
    make: Callable[..., CachedDetector],
) -> None:
    (h, y), (new, _) = drawn(), drawn(30, seed=7)
    detector = make(None, head()).fit_features(h, y)
    whole = detector.predict_features(new)
    split = torch.cat([detector.predict_features(part) for part in new.split(7)])
    torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(detector.predict_features(new.double()), whole)


@pytest.mark.parametrize("make", ALL)
def test_every_combination_of_hyperparameters_runs(make: Callable[..., CachedDetector]) -> None:
    (h, y), (new, _) = drawn(), drawn(5, seed=7)
    for name, values in make(None, head()).hyperparameter_space.items():
        for value in values:
            detector = make(None, head()).set_hyperparameters(**{name: value})
            assert detector.get_hyperparameters()[name] == value
            assert torch.isfinite(detector.fit_features(h, y).predict_features(new)).all()


@pytest.mark.parametrize("make", [*ALL, NERO])
def test_a_hyperparameter_takes_effect_at_once_or_asks_for_another_fit(
    make: type[CachedDetector],
) -> None:
    (h, y), (new, _) = drawn(), drawn(30, seed=7)
    assert make.at_once <= make.hyperparameter_space.keys()
    for name, values in make.hyperparameter_space.items():
        for value in values:
            detector = make(None, head()).fit_features(h, y)
            detector.set_hyperparameters(**{name: value})
            if name not in make.at_once:
                with pytest.raises(RequiresFittingException):
                    detector.predict_features(new)
                detector.fit_features(h, y)
            fresh = make(None, head(), **{name: value}).fit_features(h, y)
            assert torch.equal(detector.predict_features(new), fresh.predict_features(new))


def test_what_a_detector_does_not_know_is_refused() -> None:
    detector = RAS(None, head()).fit_features(*drawn())
    with pytest.raises(ValueError, match="Unknown hyperparameter 'k'"):
        detector.set_hyperparameters(k=3)
    assert detector.predict_features(drawn()[0]).isfinite().all()


@pytest.mark.parametrize("make", ALL)
def test_what_cannot_work_is_refused(make: Callable[..., CachedDetector]) -> None:
    (h, y), detector = drawn(), make(None, head())
    with pytest.raises(RequiresFittingException):
        detector.predict_features(h)
    with pytest.raises(ModelNotSetException):
        detector.predict(h)
    with pytest.raises(ModelNotSetException):
        detector.fit([(h, y)])
    with pytest.raises(InputError, match="one label for each row"):
        detector.fit_features(h, y[:-1])
    with pytest.raises(InputError, match="no sample has a label of zero or above"):
        detector.fit_features(h, torch.full_like(y, -1))
    with pytest.raises(InputError, match="NaN or infinite"):
        detector.fit_features(torch.full_like(h, float("nan")), y)
    with pytest.raises(InputError, match="to fit the head"):
        detector.fit_features(h, y).predict_features(h[:, :-1])


def test_samples_with_labels_below_zero_are_ignored() -> None:
    h, y = drawn()
    marked = torch.where(torch.arange(N) < 20, -1, y)
    one = RAS(None, head()).fit_features(h, marked).predict_features(h)
    other = RAS(None, head()).fit_features(h[20:], y[20:]).predict_features(h)
    assert torch.equal(one, other)


def test_means_of_classes() -> None:
    h = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 8.0]]).double()
    means, counts = class_means(h, torch.tensor([0, 0, 2]), 3)
    overall = [4 / 3, 8 / 3]
    assert means.tolist() == [[2, 0], pytest.approx(overall), [0, 8]]
    assert counts.tolist() == [2, 0, 1]
    with pytest.raises(InputError, match="A label is 3, and the head has 3 classes"):
        class_means(h, torch.tensor([0, 0, 3]), 3)
