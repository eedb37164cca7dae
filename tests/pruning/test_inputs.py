"""Features and labels are taken however they were kept, or refused in a sentence."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opnp import OPNP, neuron_sensitivity, parameter_sensitivity, search_masks
from opnp.errors import InputError
from opnp.pruning.energy import bias_of
from opnp.pruning.inputs import as_features, as_labels, as_tensor
from opnp.pruning.sensitivity import measure
from opnp.pruning.settings import SearchSettings

K, L, N = 5, 8, 60


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("opnp"), "propagate", True)


def head(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(L, K, dtype=dtype).requires_grad_(False)


def features() -> Tensor:
    """Exact in bfloat16, so that every type holds the same numbers."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 8, (N, L), generator=generator).float() / 4


LABELS = torch.arange(N) % K

FEATURES: dict[str, Any] = {
    "float16": features().half(),
    "bfloat16": features().bfloat16(),
    "float64": features().double(),
    "numpy": features().numpy(),
    "numpy float16": features().numpy().astype(np.float16),
    "numpy big-endian": features().numpy().astype(">f4"),
    "numpy reversed": features().numpy()[::-1][::-1],
    "numpy not writable": np.frombuffer(features().numpy().tobytes(), np.float32).reshape(N, L),
    "lists": features().tolist(),
    "rows": list(features()),
    "rows of numpy": list(features().numpy()),
    "gradients": features().requires_grad_(),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_features_of_any_kind_give_the_same_scores(kind: str) -> None:
    plain = OPNP(None, head(), (0, 10), (20, 0)).fit_features(features(), LABELS)
    other = OPNP(None, head(), (0, 10), (20, 0)).fit_features(FEATURES[kind], LABELS)
    assert plain.mask is not None
    assert other.mask is not None
    assert torch.equal(plain.mask.weights, other.mask.weights)
    expected = plain.predict_features(features())
    assert torch.equal(other.predict_features(FEATURES[kind]), expected)


@pytest.mark.parametrize("kind", FEATURES)
def test_features_of_any_kind_give_the_same_sensitivity_and_search(kind: str) -> None:
    given, own = FEATURES[kind], head()
    w, b = own.weight, bias_of(own)
    expected = parameter_sensitivity(features(), w, b)
    assert torch.equal(parameter_sensitivity(given, w, b), expected)
    assert torch.equal(parameter_sensitivity(given, w.numpy(), b.tolist()), expected)
    assert torch.equal(neuron_sensitivity(given, w, b), neuron_sensitivity(features(), w, b))
    [one], [other] = measure(given, w, b), measure(features(), w, b)
    assert torch.equal(one.neurons_taylor, other.neurons_taylor)
    few = SearchSettings(weights_low=[0, 30], weights_high=[0], neurons_low=[0], neurons_high=[0])
    found = [
        search_masks(own, each, {"far": 3 * features()}, one, few, labels=labels).trials
        for each, labels in ((given, LABELS.numpy().astype(np.int16)), (features(), LABELS))
    ]
    assert found[0] == found[1]


def test_features_of_float32_are_not_copied() -> None:
    given = features()
    assert as_features(given, head().weight) is given


def test_a_head_of_half_precision_is_taken_as_it_is() -> None:
    detector = OPNP(None, head(torch.bfloat16), (0, 10)).fit_features(features(), LABELS)
    assert detector.predict_features(features()).dtype == torch.bfloat16


LABELS_OF_ANY_KIND: dict[str, Any] = {
    "int8": LABELS.to(torch.int8),
    "uint8": LABELS.to(torch.uint8),
    "int16": LABELS.short(),
    "int32": LABELS.int(),
    "numpy": LABELS.numpy(),
    "numpy uint16": LABELS.numpy().astype(np.uint16),
    "numpy uint64": LABELS.numpy().astype(np.uint64),
    "list": LABELS.tolist(),
    "tuple": tuple(LABELS.tolist()),
    "numbers of torch": list(LABELS),
    "whole floats": LABELS.double(),
    "column": LABELS[:, None],
    "column of numpy": LABELS.numpy()[:, None],
    "one-hot": nn.functional.one_hot(LABELS, K),
    "one-hot floats": nn.functional.one_hot(LABELS, K).float(),
    "one-hot flags": nn.functional.one_hot(LABELS, K).bool(),
}


@pytest.mark.parametrize("kind", LABELS_OF_ANY_KIND)
def test_labels_of_any_kind_are_classes(kind: str) -> None:
    found = as_labels(LABELS_OF_ANY_KIND[kind], N, K)
    assert found.dtype == torch.int64
    assert torch.equal(found, LABELS)
    detector = OPNP(None, head(), (0, 10), detector="knn")
    detector.fit_features(features(), LABELS_OF_ANY_KIND[kind])
    assert detector.predict_features(features()).shape == (N,)


def test_labels_below_zero_are_of_no_class() -> None:
    unknown = LABELS.clone()
    unknown[::2] = -1
    some = OPNP(None, head(), (0, 10)).fit_features(features(), unknown[:, None].int())
    expected = OPNP(None, head(), (0, 10)).fit_features(features()[1::2])
    assert some.sensitivity is not None
    assert expected.sensitivity is not None
    assert torch.equal(some.sensitivity.weights, expected.sensitivity.weights)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (LABELS[:40], "There are 40 labels for 60 samples"),
        (LABELS[None], r"shape \(N,\), \(N, 1\) or, one-hot, \(N, 5\), not \(1, 60\)"),
        (torch.zeros(N, 3), r"not \(60, 3\)"),
        (torch.rand(N, K), "must be one-hot, with a single 1 in each row; row 0 is not"),
        (torch.ones(N, K), "must be one-hot"),
        (torch.tensor(3), r"not \(\)"),
        (LABELS + 1, "There is a label 5, but the classes of the head are 0 to 4"),
        (LABELS + 0.5, "must be whole numbers"),
        (torch.full((N,), float("nan")), "must be whole numbers"),
        (LABELS > 2, "must be numbers of classes, not bool"),
        (["zero"] * N, "Labels must be a tensor, an array or lists of numbers, not list"),
        ("labels.npy", "Labels must be a tensor, an array or lists of numbers, not str"),
        (object(), "Labels must be a tensor"),
        ([[0], [1, 2]], "Labels must be a tensor"),
    ],
)
def test_labels_that_are_not_any_are_refused(given: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        OPNP(None, head()).fit_features(features(), given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (features()[:, :5], r"shape \(N, 8\) to fit the head, not \(60, 5\)"),
        (features()[0], r"not \(8,\)"),
        (features()[None], r"not \(1, 60, 8\)"),
        (features() > 1, "must be real numbers, not bool"),
        (features().to(torch.complex64), "must be real numbers, not complex64"),
        ([["a"] * L] * N, "Features must be a tensor, an array or lists of numbers"),
        ([[1.0, 2.0], [3.0]], "Features must be a tensor"),
        ([features()[0], features()[0, :3]], "Features must be a tensor"),
        (None, "Features must be a tensor, an array or lists of numbers, not NoneType"),
    ],
)
def test_features_that_are_not_any_are_refused(given: Any, said: str) -> None:
    detector = OPNP(None, head()).fit_features(features())
    for take in (OPNP(None, head()).fit_features, detector.predict_features):
        with pytest.raises(InputError, match=said):
            take(given)


def test_a_tensor_stays_as_it_is() -> None:
    given = features().half()
    assert as_tensor(given, "Features") is given


@pytest.mark.parametrize(
    ("weights", "neurons", "warned"),
    [
        ((0, 0.05), (0.1, 0.02), True),  # as pytorch-ood's fractions are
        ((0, 0.5), (0, 0), True),
        ((0, 0), (0, 0), False),
        ((0, 0.5), (0, 2), False),
        ((1, 0), (0, 0), False),
    ],
)
def test_percentages_that_look_like_fractions(
    weights: Any, neurons: Any, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    OPNP(None, head(), weights, neurons)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warned
    if warned:
        told = caplog.records[0].getMessage()
        assert f"weights={weights}, neurons={neurons}" in told
        assert "If fractions are meant, multiply by 100." in told


def test_a_grid_of_fractions(caplog: pytest.LogCaptureFixture) -> None:
    own = head()
    [measured] = measure(features(), own.weight, bias_of(own))
    for high, warned in (([0, 0.01, 0.05], True), ([0, 0.2, 5], False)):
        grid = SearchSettings(
            weights_low=[0, 0.3], weights_high=high, neurons_low=[0], neurons_high=[0]
        )
        caplog.clear()
        search_masks(own, features(), {"far": 3 * features()}, measured, grid)
        assert ["The grid of the search" in each.getMessage() for each in caplog.records] == [
            True
        ] * warned
