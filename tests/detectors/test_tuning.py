"""How detectors are tuned, alone and on a pruned model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_ood.api import LogitsDetector
from pytorch_ood.detector import ODIN
from torch import Tensor, nn

from opnp import OPNP
from opnp.backbones.backbone import Classifier
from opnp.detectors import base
from opnp.detectors.base import Samples, features_seen, fit, make, score
from opnp.detectors.names import DETECTORS, Row
from opnp.detectors.tuning import Tuned, Tuning, tune
from opnp.errors import InputError, UnavailableError
from opnp.metrics.separation import ood_metrics
from opnp.pruning.candidates import Candidate
from opnp.pruning.energy import linear_head
from opnp.pruning.masks import PruningMask
from opnp.pruning.sensitivity import neuron_sensitivity, parameter_sensitivity
from tests.detectors.test_zoo import (
    INSIDE,
    MODEL,
    OUTSIDE,
    TRAIN,
    K,
    T,
    cached,
    drawn,
    hooks,
    noise,
    one_thread,
    pictures,
    state,
)

__all__ = ["one_thread"]  # a fixture: all tests here use it

# Close enough to the patterns that detectors differ on them.
NEAR = cached(pictures(5, 40)[0] + 0.9 * drawn(6, 40, 1, 8, 8))
SETS = {"near": NEAR, "noise": OUTSIDE}
COMPOSED = ("gen", "vra", "ash", "scale", "knn", "vim", "gmm", "mahalanobis", "odin")
CANDIDATES = [
    Candidate(),
    Candidate((0, 5), (0, 0)),
    Candidate((30, 0), (10, 0)),
    Candidate((0, 0), (20, 10), "gradient"),
    Candidate((0, 10), (0, 20), "taylor"),
]


def tuned(name: str, budget: int = 8, seed: int = 0, **changes: Any) -> Tuned:
    sets: dict[str, Any] = {"train": TRAIN, "validation": INSIDE, "outliers": SETS} | changes
    return tune(name, MODEL, budget=budget, seed=seed, **sets)


def rank(id_scores: Tensor, scores: Sequence[Tensor]) -> tuple[float, float]:
    found = [ood_metrics(id_scores, each) for each in scores]
    return (
        round(sum(m["fpr95"] for m in found) / len(found), 9),
        -round(sum(m["auroc"] for m in found) / len(found), 9),
    )


@pytest.mark.parametrize("name", ["react", "dice", "gen"])
def test_tuning_picks_what_brute_force_picks(name: str) -> None:
    default = make(name, MODEL)
    space = default.hyperparameter_space
    first, *others = space
    values: list[dict[str, Any]] = [{first: value} for value in space[first]]
    for other in others:
        values = [{**each, other: value} for each in values for value in space[other]]
    ranks = []
    for each in [default.get_hyperparameters(), *values]:
        one = make(name, MODEL).set_hyperparameters(**each)
        fit(one, MODEL, TRAIN)
        ranks.append(
            (rank(score(one, MODEL, INSIDE), [score(one, MODEL, x) for x in SETS.values()]), each)
        )
    assert len({key for key, _ in ranks}) > 1
    lowest, best = min(ranks, key=lambda entry: entry[0])
    found = tuned(name, budget=100)
    assert found.hyperparameters == best
    assert (found.fpr95, -found.auroc) == pytest.approx(lowest)
    assert found.mask is None
    assert found.model is MODEL
    assert found.fit_seconds > 0
    one = make(name, MODEL).set_hyperparameters(**best)
    fit(one, MODEL, TRAIN)
    assert torch.equal(found.score(NEAR), score(one, MODEL, NEAR))


# The search itself chooses for OPP, ONP, OPNP and OPNP with ReAct.
COMBINABLE = [
    key
    for key, row in DETECTORS.items()
    if row.takes != "search" and f"opnp+{key}" not in DETECTORS
]


@pytest.mark.parametrize("name", COMBINABLE)
def test_every_detector_can_be_tuned_alone_and_combined(name: str) -> None:
    before = state(MODEL.whole())
    found = tuned(f"opnp+{name}", budget=3, candidates=CANDIDATES)
    assert found.trials <= 6
    assert found.score(OUTSIDE).isfinite().all()
    assert state(MODEL.whole()) == before
    assert hooks(MODEL.whole()) == 0


def test_a_detector_without_hyperparameters_is_tuned_to_nothing() -> None:
    found = tuned("maxlogit")
    assert found.hyperparameters == {}
    assert found.trials == 1


class Recorder(LogitsDetector):  # type: ignore[misc, unused-ignore]
    """Remembers what is set."""

    hyperparameter_space = {"a": [1, 2, 3, 4], "b": [1, 2, 3]}
    tried: list[tuple[int, int]] = []

    def __init__(self) -> None:
        self.a, self.b = 9, 2  # not in the space

    def predict_logits(self, logits: Tensor) -> Tensor:
        """Outlier scores (N,)."""
        values = (self.a, self.b)
        if values not in self.tried:
            self.tried.append(values)
        return -logits.max(dim=1).values


MAKERS = {"recorder": lambda model: Recorder()}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setitem(DETECTORS, "recorder", Row("recorder", "Recorder", "logits", __name__))
    monkeypatch.setattr(Recorder, "tried", [])
    return Recorder


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 13, 99])
def test_the_budget_is_kept_and_holds_the_defaults(recorder: type[Recorder], budget: int) -> None:
    found = tuned("recorder", budget)
    assert len(recorder.tried) == len(set(recorder.tried)) == min(budget, 13)
    assert recorder.tried[0] == (9, 2)
    assert found.trials == len(recorder.tried)
    assert found.hyperparameters == {"a": 9, "b": 2}  # of equals, the first


def test_the_draw_depends_on_the_seed_alone(recorder: type[Recorder]) -> None:
    draws = []
    for seed in (0, 0, 1):
        recorder.tried.clear()
        tuned("recorder", 5, seed)
        draws.append(list(recorder.tried))
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(("budget", "alone", "masks"), [(1, 1, 1), (2, 2, 2), (5, 5, 4)])
def test_a_combination_tries_the_detector_and_then_as_many_masks(
    recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, budget: int, alone: int, masks: int
) -> None:
    used: list[PruningMask] = []
    prune = PruningMask.apply

    def counted(mask: PruningMask, head: nn.Linear) -> nn.Linear:
        used.append(mask)
        return prune(mask, head)

    monkeypatch.setattr(PruningMask, "apply", counted)
    found = tuned("opnp+recorder", budget, candidates=CANDIDATES)
    assert len(recorder.tried) == alone
    assert len(used) == masks
    assert found.trials == alone + masks
    # Where the detector was tuned before, only the masks are tried.
    start = tuned("recorder", budget)
    recorder.tried.clear()
    used.clear()
    again = tuned("opnp+recorder", budget, candidates=CANDIDATES, start=start)
    assert recorder.tried == [(start.hyperparameters["a"], start.hyperparameters["b"])]
    assert len(used) == masks
    assert (again.hyperparameters, again.trials) == (found.hyperparameters, found.trials)


def test_masks_are_tried_in_the_order_of_the_candidates(
    recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Candidate] = []
    mask = Candidate.mask

    def remembered(candidate: Candidate, sensitivity: Any) -> PruningMask:
        tried.append(candidate)
        return mask(candidate, sensitivity)

    monkeypatch.setattr(Candidate, "mask", remembered)
    tuned("opnp+recorder", 2, seed=3, candidates=CANDIDATES)
    assert tried == CANDIDATES[1:3]


def test_combinations_that_cannot_run_are_skipped(
    recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = recorder.predict_logits

    def refusing(self: Recorder, logits: Tensor) -> Tensor:
        scores = scored(self, logits)
        if self.a > limit:
            raise ValueError(f"a={self.a} is too much")
        return scores

    monkeypatch.setattr(recorder, "predict_logits", refusing)
    limit = 2
    found = tuned("recorder", budget=99)
    assert found.hyperparameters == {"a": 1, "b": 1}
    assert found.trials == 13
    limit = 0
    for name in ("recorder", "opnp+recorder"):
        with pytest.raises(UnavailableError, match="a=9 is too much"):
            tuned(name, candidates=CANDIDATES)
    with pytest.raises(UnavailableError, match="runs on images"):
        tuned("odin", validation=Samples(INSIDE.features))


PERCENTAGES = ("weights_low", "weights_high", "neurons_low", "neurons_high", "neuron_sensitivity")


@pytest.mark.parametrize("name", COMPOSED)
def test_with_nothing_to_prune_a_combination_is_the_detector(name: str) -> None:
    alone, found = tuned(name, 3), tuned(f"opnp+{name}", 3, candidates=[Candidate()])
    assert found.hyperparameters == alone.hyperparameters | dict(
        zip(PERCENTAGES, (0.0, 0.0, 0.0, 0.0, "mean"), strict=True)
    )
    assert torch.equal(found.score(NEAR), alone.score(NEAR))
    everything = PruningMask(torch.ones(K, 16, dtype=torch.bool), torch.ones(16).bool())
    model = MODEL.pruned(everything)
    detector = make(name, model).set_hyperparameters(**alone.hyperparameters)
    fit(detector, model, TRAIN.pruned(everything))
    kept = replace(found, detector=detector, model=model, mask=everything)
    assert torch.equal(kept.score(NEAR), alone.score(NEAR))


@pytest.mark.parametrize("name", COMPOSED)
def test_a_combination_is_never_worse_on_the_outliers_it_is_chosen_on(name: str) -> None:
    alone = tuned(name, 4)
    found = tuned(f"opnp+{name}", 4, candidates=CANDIDATES)
    assert (found.fpr95, -found.auroc) <= (alone.fpr95, -alone.auroc)


@pytest.mark.parametrize(("caught", "missed", "pruned"), [(3, 2, False), (20, 0, True)])
def test_a_mask_is_chosen_only_if_it_gains_more_than_noise(
    caught: int, missed: int, pruned: bool
) -> None:
    attempts = Tuning(partial(make, "energy"), MODEL, TRAIN, NEAR, [NEAR], seed=0)
    mask = PruningMask(torch.ones(K, 16, dtype=torch.bool), torch.arange(16) > 2)
    n = len(NEAR.features)
    inside, half = torch.linspace(0, 1, n).double(), n // 2
    without = torch.where(torch.arange(n) < half, 2.0, 0.5).double()  # half of the outliers pass
    masked = without.clone()
    masked[half : half + caught], masked[:missed] = 2.0, 0.5
    for each, outside in ((None, without), (mask, masked)):
        fpr95 = 100 * float((outside < 1).double().mean())
        entry = Tuned(make("energy", MODEL), MODEL, each, {}, 0.0, fpr95, 50.0)
        attempts.entries.append((entry, inside, outside))
    assert attempts.entries[1][0].fpr95 < attempts.entries[0][0].fpr95
    assert (attempts.winner().mask is mask) == pruned


@pytest.fixture
def masks_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tuning, "winner", lambda self: self.entries[-1][0])


@pytest.mark.usefixtures("masks_win")
@pytest.mark.parametrize("name", [name for name in COMPOSED if name != "odin"])
def test_a_combination_is_the_detector_on_the_pruned_model(name: str) -> None:
    candidate = CANDIDATES[3]
    found = tuned(f"opnp+{name}", 1, candidates=CANDIDATES[3:4])
    values = {k: v for k, v in found.hyperparameters.items() if k not in PERCENTAGES}
    assert values == make(name, MODEL).get_hyperparameters()
    assert {k: found.hyperparameters[k] for k in PERCENTAGES} == {
        "weights_low": 0, "weights_high": 0, "neurons_low": 20, "neurons_high": 10,
        "neuron_sensitivity": "gradient",
    }  # fmt: skip
    by_hand = OPNP(
        None, MODEL.head, candidate.weights, candidate.neurons, "gradient", T, detector=name
    ).fit_features(TRAIN.features, TRAIN.labels)
    assert found.mask is not None
    assert by_hand.mask is not None
    assert torch.equal(found.mask.kept, by_hand.mask.kept)
    assert torch.equal(found.score(NEAR), by_hand.predict_features(NEAR.features).double())


@pytest.mark.usefixtures("masks_win")
def test_odin_moves_images_by_the_gradient_of_the_pruned_classifier() -> None:
    found = tuned("opnp+odin", 1, candidates=CANDIDATES[2:3])
    whole = MODEL.whole()
    odin = ODIN(whole, norm_std=[0.5])
    seen = features_seen(odin, MODEL, TRAIN)
    mask = PruningMask.from_sensitivity(
        parameter_sensitivity(seen, MODEL.head.weight, MODEL.head.bias, T),
        neuron_sensitivity(seen, MODEL.head.weight, MODEL.head.bias, T),
        (30, 0),
        (10, 0),
    )

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * mask.neurons

    head = linear_head(MODEL.head.weight * mask.kept, MODEL.head.bias)
    pruned = Classifier(nn.Sequential(whole.encoder, Masked()), head)
    expected = ODIN(pruned, norm_std=[0.5]).predict(noise(4, 60)).double()
    assert torch.equal(found.score(OUTSIDE), expected)
    assert not torch.allclose(expected, odin.predict(noise(4, 60)).double())


def test_a_combination_fits_its_detector_once_for_all_sensitivities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = {"fit": 0, "features_seen": 0}
    for name in calls:
        function = getattr(base, name)

        def counted(*args: Any, name: str = name, function: Any = function) -> Any:
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(base, name, counted)
    found = tuned("opnp+she", 10, candidates=CANDIDATES)
    assert found.trials == calls["fit"] == len(CANDIDATES)  # the first is the detector alone
    assert calls["features_seen"] == 1


def test_images_are_read_once_for_all_combinations() -> None:
    calls: list[str] = []

    def counted(name: str, samples: Samples) -> Samples:
        images = samples.images
        assert images is not None

        def read() -> Tensor:
            calls.append(name)
            return images()

        return replace(samples, images=read)

    tuned(
        "opnp+odin",
        6,
        train=counted("train", TRAIN),
        validation=counted("validation", INSIDE),
        outliers={name: counted(name, samples) for name, samples in SETS.items()},
        candidates=CANDIDATES,
    )
    assert sorted(calls) == ["near", "noise", "train", "validation"]


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="'vimm'; did you mean vim"):
        tuned("opnp+vimm")
    with pytest.raises(InputError, match="budget"):
        tuned("vim", 0)
    with pytest.raises(InputError, match="outlier set"):
        tuned("vim", outliers={})
