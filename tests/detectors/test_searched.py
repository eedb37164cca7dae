"""OPP, ONP and OPNP as detectors: they score, tune and are recorded as any other."""

from typing import Any

import pytest
import torch
from pytorch_ood.api import ModelNotSetException, RequiresFittingException

from opnp.detectors.base import Samples, TrainedModel, fit, make, score
from opnp.detectors.searched import SearchedMask
from opnp.errors import InputError
from opnp.pruning.energy import energy_score
from opnp.pruning.masks import PruningMask
from opnp.pruning.sensitivity import neuron_sensitivity, parameter_sensitivity
from tests.detectors.test_tuning import CANDIDATES, tuned
from tests.detectors.test_zoo import (
    CHOICES,
    FEATURES,
    HEAD,
    MODEL,
    OUTSIDE,
    TRAIN,
    K,
    fitted,
    one_thread,
    pictures,
)

__all__ = ["one_thread"]  # a fixture that all tests here use


@pytest.mark.parametrize("method", CHOICES)
def test_scores_are_the_energy_of_the_head_pruned_as_the_search_chose(method: str) -> None:
    candidate = CHOICES[method].candidate
    t, clip = candidate.temperature, candidate.clip
    h, x = (
        each.features if clip is None else each.features.clamp(max=clip)
        for each in (TRAIN, OUTSIDE)
    )
    mask = PruningMask.from_sensitivity(
        parameter_sensitivity(h, HEAD.weight, HEAD.bias, t),
        neuron_sensitivity(h, HEAD.weight, HEAD.bias, t, candidate.neuron_sensitivity),
        candidate.weights,
        candidate.neurons,
    )
    assert (0 < mask.pruned < 1) == (method != "clip")
    expected = -energy_score(x @ (HEAD.weight * mask.kept).T + HEAD.bias, t)
    detector = fitted(method)
    torch.testing.assert_close(score(detector, MODEL, OUTSIDE), expected.double())
    unpruned = -energy_score(HEAD(TRAIN.features), t).double()
    assert not torch.allclose(score(detector, MODEL, TRAIN), unpruned)
    assert torch.equal(detector.mask.kept, mask.kept)


@pytest.mark.parametrize("method", CHOICES)
def test_it_is_tuned_and_recorded_as_any_other(method: str) -> None:
    choice, found = CHOICES[method], tuned(method, candidates=CANDIDATES)
    assert found.trials == choice.trials  # those of the search
    assert found.fit_seconds > 0
    assert found.hyperparameters == choice.candidate.record() | {
        "clip": choice.percentile,
        "temperature": choice.candidate.temperature,
    }
    detector = fitted(method)
    assert found.pruned == 100 * detector.mask.pruned
    assert (detector.mask.pruned > 0) == (method != "clip")
    assert torch.equal(found.score(OUTSIDE), score(detector, MODEL, OUTSIDE))
    logits = found.pruned_logits(OUTSIDE.features)
    assert logits is not None
    assert logits.shape == (len(OUTSIDE.features), K)
    assert 0 < found.fpr95 < 100 or found.auroc > 50


def test_only_a_detector_that_may_prune_says_how_much_it_prunes() -> None:
    alone, combined = tuned("energy"), tuned("opnp+energy", 4, candidates=[])
    assert (alone.pruned, combined.pruned) == (None, 0.0)
    assert alone.pruned_logits(TRAIN.features) is combined.pruned_logits(TRAIN.features) is None


def test_pruned_logits_keep_the_classification() -> None:
    labels = pictures(2, 150)[1]
    logits = tuned("opp").pruned_logits(TRAIN.features)
    assert logits is not None
    assert (logits.argmax(dim=1) == labels).double().mean() > 0.9


def test_nothing_but_the_choice_of_the_search_can_be_set() -> None:
    detector = make("opnp", MODEL)
    values = detector.get_hyperparameters()
    assert detector.set_hyperparameters(**values) is detector
    for changed in ({"weights_low": 11}, {"temperature": 1.0}, {"k": 3}):
        with pytest.raises(ValueError, match="is not what the mask search chose"):
            detector.set_hyperparameters(**changed)
    assert detector.get_hyperparameters() == values


def test_it_must_be_fitted_and_takes_features_only() -> None:
    detector: Any = SearchedMask(HEAD, CHOICES["opnp"])
    with pytest.raises(RequiresFittingException):
        detector.predict_features(TRAIN.features)
    with pytest.raises(RequiresFittingException):
        detector.logits(TRAIN.features)
    with pytest.raises(ModelNotSetException):
        detector.predict(pictures(2, 3)[0])
    with pytest.raises(InputError, match="shape"):
        detector.fit_features(TRAIN.features[:, 1:])


def test_the_head_is_left_as_it_is() -> None:
    before = HEAD.weight.clone()
    bare = TrainedModel(HEAD, choices=CHOICES)
    detector = make("opnp", bare)
    fit(detector, bare, FEATURES)
    assert torch.equal(HEAD.weight, before)
    assert score(detector, bare, Samples(OUTSIDE.features)).isfinite().all()
