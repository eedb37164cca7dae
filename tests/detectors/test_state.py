"""What a fitted detector knows, written to JSON and tensors and read again."""

import json

import pytest
import torch
from torch import Tensor, nn

from opnp.detectors import base, names
from opnp.detectors.base import Samples, TrainedModel
from opnp.detectors.state import State, restored, state_of
from opnp.errors import InputError, UnavailableError

CLASSES, WIDTH = 4, 12
UNSAVED = {"klmatching", "openmax"}  # they keep parameters and objects of their own
KEYS = [key for key, row in names.DETECTORS.items() if row.takes in ("logits", "features")]


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    head = nn.Linear(WIDTH, CLASSES).requires_grad_(False)
    head.weight.copy_(torch.eye(CLASSES, WIDTH) * 4 + torch.randn(CLASSES, WIDTH) / 10)
    head.bias.zero_()
    return TrainedModel(head, spcp=2.0)


@pytest.fixture(scope="module")
def train() -> Samples:
    labels = torch.arange(120) % CLASSES
    return Samples(torch.rand(120, WIDTH) + 2 * torch.eye(CLASSES, WIDTH)[labels], labels)


def through_json(state: State) -> State:
    return State(state.tensors, json.loads(json.dumps(state.values)))


@pytest.mark.parametrize("key", [key for key in KEYS if key not in UNSAVED])
def test_a_detector_scores_the_same_to_the_last_bit(
    key: str, model: TrainedModel, train: Samples
) -> None:
    detector = base.make(key, model)
    if detector.requires_fit:
        base.fit(detector, model, train)
    again = restored(key, model, through_json(state_of(detector, key, model)))
    unseen = torch.rand(33, WIDTH) * 3
    assert torch.equal(base.predict(again, model, unseen), base.predict(detector, model, unseen))


def test_hyperparameters_are_part_of_the_state(model: TrainedModel, train: Samples) -> None:
    detector = base.make("kpca", model).set_hyperparameters(gamma=1.0)
    base.fit(detector, model, train)
    again = restored("kpca", model, through_json(state_of(detector, "kpca", model)))
    assert again.get_hyperparameters() == detector.get_hyperparameters()
    unseen = torch.rand(33, WIDTH)
    assert torch.equal(base.predict(again, model, unseen), base.predict(detector, model, unseen))


@pytest.mark.parametrize("key", sorted(UNSAVED))
def test_a_detector_that_keeps_something_else_is_refused(
    key: str, model: TrainedModel, train: Samples
) -> None:
    detector = base.make(key, model)
    base.fit(detector, model, train)
    with pytest.raises(UnavailableError, match=f"{key} cannot be saved"):
        state_of(detector, key, model)


def damaged(values: dict[str, object], tensors: dict[str, Tensor]) -> State:
    return State(tensors, values)


@pytest.mark.parametrize(
    "values",
    [
        {"global_mean": {"tensor": "absent"}},
        {"global_mean": {"class": "os:system", "dict": {}}},
        {"global_mean": {"class": "opnp.detectors.base:score", "dict": {}}},
        {"global_mean": {"class": "opnp.detectors.state:absent", "dict": {}}},
        {"global_mean": {"unknown": 1}},
    ],
)
def test_a_damaged_state_is_refused_and_runs_no_code(
    values: dict[str, object], model: TrainedModel
) -> None:
    with pytest.raises(InputError, match="state of the detector nci is damaged at global_mean"):
        restored("nci", model, damaged(values, {}))
