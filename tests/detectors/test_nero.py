"""NERO against relevances worked out by hand and by loops, and as a detector of pytorch-ood."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_ood.api import FeaturesDetector, ModelNotSetException, RequiresFittingException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opnp.detectors.nero import NERO, relevance
from opnp.errors import InputError
from opnp.metrics.separation import ood_metrics
from opnp.pruning.energy import bias_of, linear_head

K, WIDTH = 3, 12


def drawn(seed: int, *shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


HEAD = linear_head(drawn(1, K, WIDTH), drawn(2, K))
LABELS = torch.arange(60) % K
CENTRES = 3 * drawn(3, K, WIDTH).abs()
TRAIN = (CENTRES[LABELS] + drawn(4, 60, WIDTH)).relu()
VALID = (CENTRES[LABELS] + drawn(5, 60, WIDTH)).relu()


def fitted(head: nn.Linear = HEAD, **settings: Any) -> NERO:
    return NERO(None, head, **settings).fit_features(TRAIN, LABELS)


def without_bias() -> nn.Linear:
    head = nn.Linear(WIDTH, K, bias=False, dtype=torch.float64).requires_grad_(False)
    head.weight.copy_(HEAD.weight)
    return head


def by_loops(
    train: Tensor, labels: Tensor, x: Tensor, head: nn.Linear, kept: int, low: int, epsilon: float
) -> Tensor:
    """Scores of `x`, one term at a time; PCA by singular values."""
    weight, bias = head.weight, bias_of(head)

    def explain(h: Tensor) -> tuple[Tensor, float]:
        z = [float(sum(weight[c, j] * h[j] for j in range(len(h))) + bias[c]) for c in range(K)]
        p = torch.tensor(z, dtype=torch.float64).softmax(dim=0)
        total, rest = torch.zeros(len(h), dtype=torch.float64), 0.0
        for c in range(K):
            divisor = z[c] + (epsilon if z[c] >= 0 else -epsilon)
            rest += float(p[c] * bias[c]) / divisor
            for j in range(len(h)):
                total[j] += p[c] * weight[c, j] * h[j] / divisor
        return total, rest

    explained = [explain(h) for h in train]
    r = torch.stack([neurons for neurons, _ in explained])
    mean = r.mean(dim=0)
    axes = torch.linalg.svd(r - mean, full_matrices=False).Vh[:kept]

    def project(neurons: Tensor) -> Tensor:
        return axes @ (neurons - mean)

    def distance(neurons: Tensor) -> float:
        centroids = [
            torch.stack([project(row) for row, of in zip(r, labels, strict=True) if of == label])
            for label in labels.unique()
        ]
        return min(float((project(neurons) - c.mean(dim=0)).abs().sum()) for c in centroids)

    scale = sum(distance(row) for row in r) / sum(abs(rest) for _, rest in explained)
    scores = []
    for h in x:
        neurons, rest = explain(h)
        lowest = sorted(range(len(h)), key=lambda j: float(neurons[j]))[:low]
        share = sum(abs(float(h[j])) for j in lowest) / float(h.abs().sum())
        scores.append((distance(neurons) + scale * abs(rest)) * share)
    return torch.tensor(scores, dtype=torch.float64)


def test_a_case_worked_out_by_hand() -> None:
    # Both samples have logits (2, 2), so p = (1/2, 1/2) and R_j = h_j (W_1j + W_2j) / 4.
    weight = torch.tensor([[1.0, 0, 2], [0, 2, -1]])
    bias = torch.tensor([0.5, 1.5])
    features = torch.tensor([[0.5, 0.5, 0.5], [1.5, 0.25, 0]])
    neurons, rest = relevance(features, weight, bias, epsilon=1e-12)
    expected = torch.tensor([[1 / 8, 2 / 8, 1 / 8], [3 / 8, 1 / 8, 0]], dtype=torch.float64)
    torch.testing.assert_close(neurons, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(rest, torch.full((2,), 0.5, dtype=torch.float64))

    # One sample a class: both centroids are training samples, every training distance is 0, and
    # so is the bias's scale. One component remains: the line between the two, (-2, 1, 1)/√6. The
    # third sample has logits (1/2 + 2, 3/2 − 1) = (5/2, 1/2), p = σ(±2), and relevance of its one
    # feature p_1·2/(5/2) + p_2·(−1)/(1/2) = 0.8 p_1 − 2 p_2 in place of the training samples' 1/8
    # and 0.
    detector = NERO(None, linear_head(weight, bias), lowest=1 / 3, epsilon=1e-12)
    detector.fit_features(features, torch.tensor([0, 1]))
    third = torch.tensor([[0.0, 0, 1]])
    p = 1 / (1 + torch.tensor(-2.0).double().exp())
    along = 0.8 * p - 2 * (1 - p)
    at = [(-2 / 8 + 2 / 8 + 1 / 8) / 6**0.5, (-6 / 8 + 1 / 8) / 6**0.5]
    distance = min(abs(float(along) / 6**0.5 - a) for a in at)
    # Its lowest relevance is 0, of a feature that is 0: none of the norm.
    assert float(detector.predict_features(third)) == 0
    # With all features counted as lowest the share is 1 and the score the distance itself.
    detector.set_hyperparameters(lowest=1.0)
    assert float(detector.predict_features(third)) == pytest.approx(distance, rel=1e-6)


@pytest.mark.parametrize(("components", "kept"), [(2 / 3, 8), (1 / 4, 3)])
@pytest.mark.parametrize(("lowest", "low"), [(0.34, 4), (0.75, 9)])
@pytest.mark.parametrize("epsilon", [1e-3, 0.5])
def test_scores_equal_loops(
    components: float, kept: int, lowest: float, low: int, epsilon: float
) -> None:
    detector = fitted(components=components, lowest=lowest, epsilon=epsilon)
    expected = by_loops(TRAIN, LABELS, VALID, HEAD, kept, low, epsilon)
    found = detector.predict_features(VALID)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


cases = st.tuples(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 7))


@given(cases, st.floats(1e-9, 1), st.sampled_from([1e-4, 1.0, 1e4]))
def test_relevance_is_conserved(
    case: tuple[int, int, int, int], epsilon: float, scale: float
) -> None:
    seed, n, k, width = case
    h, weight, bias = scale * drawn(seed, n, width), drawn(seed + 1, k, width), drawn(seed + 2, k)
    neurons, rest = relevance(h, weight, bias, epsilon)
    z = h @ weight.T + bias
    expected = (z.softmax(dim=1) * z.abs() / (z.abs() + epsilon)).sum(dim=1)
    magnitude = float(neurons.abs().sum() + rest.abs().sum()) + 1  # of the terms that cancel
    torch.testing.assert_close(neurons.sum(dim=1) + rest, expected, rtol=0, atol=1e-11 * magnitude)
    assert float(expected.max()) <= 1 + 1e-12


def test_relevance_sums_to_one_as_epsilon_vanishes() -> None:
    neurons, rest = relevance(VALID, HEAD.weight, HEAD.bias, 1e-12)
    torch.testing.assert_close(neurons.sum(dim=1) + rest, torch.ones(60).double())


@given(st.integers(0, 10**6), st.integers(1, 20))
def test_scores_are_finite_never_negative_and_blind_to_the_order_of_samples(
    seed: int, n: int
) -> None:
    h, labels = drawn(seed, n, WIDTH), torch.arange(n) % 4
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    a = NERO(None, HEAD).fit_features(h, labels).predict_features(VALID)
    b = NERO(None, HEAD).fit_features(h[order], labels[order]).predict_features(VALID)
    assert a.isfinite().all()
    assert (a >= 0).all()
    if n > WIDTH + 1:  # else directions that no sample spans are anyone's choice
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_on_training_samples_both_terms_weigh_the_same() -> None:
    detector = fitted(lowest=1.0)
    _, rest = detector.relevance(TRAIN)
    scores = detector.predict_features(TRAIN)
    torch.testing.assert_close(scores.mean(), 2 * detector.bias_scale * rest.abs().mean())


@pytest.mark.parametrize("logit", [0.0, -0.0, 1e-300, -1e-300])
def test_a_logit_of_zero_keeps_relevance_finite(logit: float) -> None:
    bias = torch.tensor([logit - 1, 0.0], dtype=torch.float64)
    weight = torch.tensor([[1.0, 0], [0, 0]], dtype=torch.float64)
    neurons, rest = relevance(torch.ones(1, 2), weight, bias)
    assert neurons.isfinite().all()
    assert neurons.abs().max() <= 1 / 1e-3
    assert rest.isfinite().all()


def test_a_head_without_bias_has_no_relevance_there() -> None:
    detector = fitted(without_bias())
    _, rest = detector.relevance(VALID)
    assert torch.equal(rest, torch.zeros(60, dtype=torch.float64))
    assert detector.bias_scale == 0
    zero = fitted(linear_head(HEAD.weight, torch.zeros(K).double()))
    assert torch.equal(detector.predict_features(VALID), zero.predict_features(VALID))
    assert detector.predict_features(VALID).isfinite().all()


def test_one_class_and_one_sample_are_enough() -> None:
    head = linear_head(drawn(6, 1, WIDTH), drawn(7, 1))
    one_class = NERO(None, head).fit_features(TRAIN, torch.zeros(60, dtype=torch.long))
    one_sample = NERO(None, HEAD).fit_features(TRAIN[:1], LABELS[:1])
    for detector in (one_class, one_sample):
        assert detector.predict_features(VALID).isfinite().all()


def test_fewer_samples_than_components_keep_what_they_span() -> None:
    detector = NERO(None, HEAD, components=1.0).fit_features(TRAIN[:5], LABELS[:5])
    assert detector.basis is not None
    assert detector.basis.shape == (WIDTH, 4)


def test_a_sample_without_any_activation_is_not_the_most_familiar() -> None:
    zero, familiar = (
        fitted().predict_features(torch.cat([torch.zeros(1, WIDTH), TRAIN])).split([1, 60])
    )
    assert zero > familiar.median()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_scores_are_at_least_float32(dtype: torch.dtype) -> None:
    single = linear_head(HEAD.weight.float(), HEAD.bias.float())
    detector = NERO(None, single).fit_features(TRAIN.to(dtype), LABELS)
    scores = detector.predict_features(VALID.to(dtype))
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 0.1 if dtype == torch.float16 else 1e-4
    reference = fitted(single).predict_features(VALID)
    torch.testing.assert_close(scores.double(), reference, rtol=tolerance, atol=tolerance)


def test_scores_do_not_depend_on_the_batch() -> None:
    detector = fitted()
    whole = detector.predict_features(VALID)
    parts = torch.cat([detector.predict_features(h) for h in VALID.split(7)])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


def test_fitting_twice_gives_the_same_bits() -> None:
    assert torch.equal(fitted().predict_features(VALID), fitted().predict_features(VALID))


def test_centroids_are_by_label_and_labels_below_zero_are_ignored() -> None:
    x = torch.cat([100 * drawn(8, 9, WIDTH), TRAIN])
    y = torch.cat([torch.tensor([-1, -2, -1000] * 3), LABELS])
    ignoring = NERO(None, HEAD).fit_features(x, y)
    assert torch.equal(ignoring.predict_features(VALID), fitted().predict_features(VALID))
    gaps = NERO(None, HEAD).fit_features(TRAIN, 7 * LABELS + 3)
    assert torch.equal(gaps.predict_features(VALID), fitted().predict_features(VALID))
    others = NERO(None, HEAD).fit_features(TRAIN, LABELS.sort().values)
    assert not torch.allclose(others.predict_features(VALID), fitted().predict_features(VALID))


def test_foreign_inputs_score_higher() -> None:
    # Classes that each live on features of their own, against all features at random.
    weight = torch.eye(K).repeat_interleave(4, dim=1) - 0.2
    head = linear_head(weight, torch.full((K,), 0.1))
    familiar = 2 * torch.eye(K).repeat_interleave(4, dim=1)[LABELS].double()
    train, valid = (familiar + 0.2 * drawn(seed, 60, WIDTH).abs() for seed in (9, 10))
    foreign = 2 * drawn(11, 60, WIDTH).abs()
    detector = NERO(None, head).fit_features(train, LABELS)
    scores = [detector.predict_features(x) for x in (valid, foreign)]
    assert ood_metrics(*scores)["auroc"] > 95


def test_it_is_a_features_detector_that_fits_a_loader() -> None:
    encoder = nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU()).double().requires_grad_(False)
    images = drawn(12, 60, 5)
    loader = DataLoader(TensorDataset(images, LABELS), batch_size=16)
    detector = NERO(encoder, HEAD)
    assert isinstance(detector, FeaturesDetector)
    assert NERO.requires_fit
    assert detector.fit(loader) is detector
    by_features = NERO(None, HEAD).fit_features(encoder(images), LABELS)
    torch.testing.assert_close(
        detector.predict(images), by_features.predict_features(encoder(images))
    )
    assert torch.equal(detector(images), detector.predict(images))
    assert detector.to("cpu") is detector


def test_without_an_encoder_only_features_are_taken() -> None:
    with pytest.raises(ModelNotSetException):
        NERO(None, HEAD).fit([])
    with pytest.raises(ModelNotSetException):
        fitted().predict(VALID)


def test_an_unfitted_detector_explains_but_does_not_predict() -> None:
    detector = NERO(nn.Identity(), HEAD)
    assert detector.relevance(VALID)[0].shape == VALID.shape
    with pytest.raises(RequiresFittingException):
        detector.predict_features(VALID)
    with pytest.raises(RequiresFittingException):
        detector.predict(VALID)


def test_bad_training_sets_are_refused() -> None:
    with pytest.raises(InputError, match="no sample has a label"):
        NERO(None, HEAD).fit_features(TRAIN, torch.full((60,), -1))
    with pytest.raises(InputError, match="one label for each row"):
        NERO(None, HEAD).fit_features(TRAIN, LABELS[1:])
    with pytest.raises(InputError, match="shape"):
        NERO(None, HEAD).fit_features(TRAIN[:, 1:], LABELS)
    with pytest.raises(InputError, match="NaN"):
        NERO(None, HEAD).fit_features(TRAIN * float("nan"), LABELS)
    with pytest.raises(InputError, match="shape"):
        fitted().predict_features(VALID[:, 1:])


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["components", "lowest"])
def test_shares_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{name}="):
        NERO(None, HEAD, **{name: value})
    with pytest.raises(InputError, match=f"^{name}="):
        fitted().set_hyperparameters(**{name: value})


@pytest.mark.parametrize("value", [0, -1e-3, float("nan"), float("inf")])
def test_an_epsilon_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"^epsilon="):
        NERO(None, HEAD, epsilon=value)


def test_the_default_search_space_is_valid_and_holds_the_defaults() -> None:
    defaults = NERO(None, HEAD).get_hyperparameters()
    for name, values in NERO.hyperparameter_space.items():
        assert defaults[name] in values
        for value in values:
            NERO(None, HEAD).set_hyperparameters(**{name: value}).fit_features(TRAIN, LABELS)


def test_the_head_is_copied_and_scores_carry_no_gradients() -> None:
    head = linear_head(HEAD.weight, HEAD.bias).requires_grad_()
    detector = fitted(head)
    with torch.no_grad():
        head.weight.zero_()
    scores = detector.predict_features(VALID.clone().requires_grad_())
    assert torch.equal(scores, fitted().predict_features(VALID))
    assert not scores.requires_grad
