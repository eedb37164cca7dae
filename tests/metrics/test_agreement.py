"""A classifier that is right by chance alone is told, with the likely cause."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score

from opnp.metrics.agreement import kappa, suspicion

CLASSES = [f"class {label}" for label in range(7)]


def labels(n: int = 280, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(7, size=n)


def mostly(truth: NDArray[np.int64], right: float, seed: int = 1) -> NDArray[np.int64]:
    """Predictions of which about a share is right, and the others are drawn at random."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(truth)) < right, truth, rng.integers(7, size=len(truth)))


@pytest.mark.parametrize("right", [0.0, 0.3, 0.9, 1.0])
def test_kappa_is_cohens(right: float) -> None:
    truth = labels()
    predicted = mostly(truth, right)
    assert kappa(truth, predicted) == pytest.approx(cohen_kappa_score(truth, predicted))


@pytest.mark.parametrize("right", [0.3, 0.6, 0.95, 1.0])
def test_a_classifier_that_has_learnt_is_not_suspicious(right: float) -> None:
    truth = labels()
    assert suspicion(truth, mostly(truth, right), CLASSES) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_classifier_that_guesses_is(seed: int) -> None:
    truth = labels(seed=seed)
    told = suspicion(truth, mostly(truth, 0, seed + 1), CLASSES)
    assert told is not None
    assert "near chance for 7 classes" in told
    assert "names of the classes in the order of the logits" in told
    assert "preprocessing" in told


def test_so_is_one_that_always_says_the_same() -> None:
    """Also where this is the most frequent class by far."""
    truth = np.where(np.arange(280) % 10 < 9, 2, labels())
    assert (truth == 2).mean() > 0.9
    told = suspicion(truth, np.full(280, 2), CLASSES)
    assert told is not None
    assert "near chance" in told


@pytest.mark.parametrize("order", [[1, 2, 3, 4, 5, 6, 0], [0, 1, 2, 3, 4, 6, 5]])
def test_names_in_another_order_are_told_by_the_order_that_fits(order: list[int]) -> None:
    truth = labels()
    predicted = np.array(order)[mostly(truth, 0.98)]
    told = suspicion(truth, predicted, CLASSES)
    assert told is not None
    assert "would be for 98" in told or "would be for 99" in told
    said = [f"takes most images of 'class {a}' for 'class {b}'" for a, b in enumerate(order)]
    assert any(words in told for label, words in enumerate(said) if order[label] != label)


def test_few_images_of_many_classes_fit_some_order_by_chance() -> None:
    truth = np.arange(100) % 50
    predicted = (truth + 1 + np.arange(100) // 50) % 50
    told = suspicion(truth, predicted, [str(label) for label in range(50)])
    assert told is not None
    assert "near chance for 50 classes" in told


def test_thousands_of_classes_take_little_memory() -> None:
    truth = np.arange(40_000) % 20_000
    assert suspicion(truth, truth, [str(label) for label in range(20_000)]) is None
    told = suspicion(truth, (truth + 1) % 20_000, [str(label) for label in range(20_000)])
    assert told is not None


def test_one_class_alone_is_agreed_on() -> None:
    assert suspicion(np.zeros(9, np.int64), np.zeros(9, np.int64), CLASSES) is None
