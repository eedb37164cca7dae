"""OPNP as a detector of pytorch-ood, alone and before other detectors."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_ood.api import FeaturesDetector, ModelNotSetException, RequiresFittingException
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.detector import GEN, KNN, EnergyBased, ReAct, ViM
from pytorch_ood.detector.ash import ash_s
from pytorch_ood.detector.scale import scale
from pytorch_ood.utils import GridSearch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opnp import OPNP
from opnp.detectors import knn
from opnp.detectors.base import TrainedModel, make
from opnp.detectors.gmm import GMM
from opnp.detectors.mahalanobis import Mahalanobis
from opnp.errors import InputError, UnavailableError
from opnp.metrics.separation import ood_metrics
from opnp.pruning.energy import bias_of, energy_score, linear_head
from opnp.pruning.masks import Percentages, PruningMask
from opnp.pruning.sensitivity import NeuronSensitivity, neuron_sensitivity, parameter_sensitivity

K, WIDTH = 3, 20


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Encoder(nn.Module):
    """A layer of ReLUs that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear_head(drawn(1, WIDTH, 5), drawn(2, WIDTH))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.layer(x)
        return y.relu()


def without_bias() -> nn.Linear:
    bare = nn.Linear(WIDTH, K, bias=False).requires_grad_(False)
    bare.weight.copy_(drawn(9, K, WIDTH))
    return bare


ENCODER, HEAD = Encoder(), linear_head(drawn(3, K, WIDTH), drawn(4, K))
MODEL = nn.Sequential(ENCODER, HEAD)
TRAIN, VALID, OUTLIERS = drawn(5, 90, 5), drawn(6, 50, 5), 2 * drawn(7, 40, 5) + 1
LABELS = torch.arange(90) % K
CUTS: dict[str, Any] = {"weights": (10, 5), "neurons": (20, 10)}


def loader(*sets: tuple[Tensor, Tensor]) -> "DataLoader[tuple[Tensor, ...]]":
    x, y = (torch.cat(column) for column in zip(*sets, strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=16)


def unknown(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.full((len(x),), -1)


def fitted(**settings: Any) -> OPNP:
    return OPNP(ENCODER, HEAD, **settings).fit_features(ENCODER(TRAIN), LABELS)


def test_it_is_a_features_detector_that_must_be_fitted() -> None:
    assert isinstance(OPNP(None, HEAD), FeaturesDetector)
    assert OPNP.requires_fit


@pytest.mark.parametrize(
    "cuts", [CUTS, {"weights": (10, 5)}, {"neurons": (20, 10)}], ids=["OPNP", "OPP", "ONP"]
)
@pytest.mark.parametrize("kind", ["mean", "gradient", "taylor"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_scores_are_the_energy_of_the_pruned_head(
    cuts: dict[str, Any], kind: NeuronSensitivity, temperature: float
) -> None:
    h = ENCODER(TRAIN)
    mask = PruningMask.from_sensitivity(
        parameter_sensitivity(h, HEAD.weight, HEAD.bias, temperature),
        neuron_sensitivity(h, HEAD.weight, HEAD.bias, temperature, kind),
        **cuts,
    )
    weight = HEAD.weight * mask.weights * mask.neurons
    features = ENCODER(VALID)
    expected = -temperature * ((features @ weight.T + HEAD.bias) / temperature).exp().sum(1).log()
    detector = fitted(**cuts, neuron_sensitivity=kind, temperature=temperature)
    torch.testing.assert_close(detector.predict_features(features), expected)
    assert not torch.allclose(expected, -energy_score(HEAD(features), temperature))


def test_fitting_on_a_loader_equals_fitting_on_its_features() -> None:
    by_loader = OPNP(ENCODER, HEAD, **CUTS).fit(loader((TRAIN, LABELS)))
    assert torch.equal(by_loader.predict(VALID), fitted(**CUTS).predict(VALID))


def test_samples_with_negative_labels_are_ignored() -> None:
    x, y = torch.cat([OUTLIERS, TRAIN]), torch.cat([torch.full((40,), -1), LABELS])
    order = torch.cat([torch.arange(40, 90), torch.arange(40), torch.arange(90, 130)])
    x, y = x[order], y[order]
    scores = fitted(**CUTS).predict(VALID)
    assert torch.equal(
        OPNP(ENCODER, HEAD, **CUTS).fit_features(ENCODER(x), y).predict(VALID), scores
    )
    assert torch.equal(OPNP(ENCODER, HEAD, **CUTS).fit(loader((x, y))).predict(VALID), scores)


def test_without_labels_every_sample_counts() -> None:
    unlabelled = OPNP(ENCODER, HEAD, **CUTS).fit_features(ENCODER(TRAIN))
    assert torch.equal(unlabelled.predict(VALID), fitted(**CUTS).predict(VALID))


def test_predicting_inputs_equals_predicting_their_features() -> None:
    detector = fitted(**CUTS)
    scores = detector.predict(VALID)
    assert scores.shape == (len(VALID),)
    assert torch.equal(scores, detector.predict_features(ENCODER(VALID)))
    assert torch.equal(scores, detector(VALID))


def test_a_larger_score_means_ood() -> None:
    head = linear_head(torch.eye(3), torch.zeros(3))
    detector = OPNP(None, head).fit_features(torch.eye(3))
    confident, empty = detector.predict_features(torch.tensor([[9.0, 0, 0], [0, 0, 0]]))
    assert empty > confident


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_pruning_nothing_is_the_librarys_energy_bit_for_bit(temperature: float) -> None:
    energy = EnergyBased(MODEL, t=temperature).predict(VALID)
    assert torch.equal(fitted(temperature=temperature).predict(VALID), energy)


def test_new_percentages_prune_a_fitted_detector_anew() -> None:
    detector = fitted(**CUTS)
    assert detector.set_hyperparameters(weights=(0, 20), neurons=(0, 0)) is detector
    assert torch.equal(detector.predict(VALID), fitted(weights=(0, 20)).predict(VALID))
    detector.set_hyperparameters(weights=(0.0, 0.0))
    assert torch.equal(detector.predict(VALID), EnergyBased(MODEL).predict(VALID))


def test_percentages_set_before_fitting_are_used() -> None:
    detector = OPNP(ENCODER, HEAD).set_hyperparameters(**CUTS).fit(loader((TRAIN, LABELS)))
    assert torch.equal(detector.predict(VALID), fitted(**CUTS).predict(VALID))


def test_a_hyperparameter_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="percentile"):
        fitted().set_hyperparameters(percentile=0.9)


@pytest.mark.parametrize("name", ["weights", "neurons"])
def test_percentages_out_of_range_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}="):
        fitted(**{name: (60, 40)})
    with pytest.raises(InputError, match=f"^{name}="):
        fitted().set_hyperparameters(**{name: (60, 40)})


def test_a_known_mask_needs_no_fitting() -> None:
    detector = fitted(**CUTS, temperature=2.0)
    assert detector.mask is not None
    again = OPNP.from_mask(ENCODER, HEAD, detector.mask, temperature=2.0)
    assert torch.equal(again.predict(VALID), detector.predict(VALID))


def test_a_mask_for_another_head_is_refused() -> None:
    mask = fitted(**CUTS).mask
    assert mask is not None
    with pytest.raises(InputError, match="make a mask for this head"):
        OPNP.from_mask(None, nn.Linear(WIDTH + 1, K), mask)


def test_an_unfitted_detector_does_not_predict() -> None:
    with pytest.raises(RequiresFittingException):
        OPNP(ENCODER, HEAD).predict(VALID)
    with pytest.raises(RequiresFittingException):
        OPNP(None, HEAD).predict_features(ENCODER(VALID))


def test_without_an_encoder_only_features_are_taken() -> None:
    with pytest.raises(ModelNotSetException):
        OPNP(None, HEAD).fit(loader((TRAIN, LABELS)))
    detector = OPNP(None, HEAD, **CUTS).fit_features(ENCODER(TRAIN), LABELS)
    with pytest.raises(ModelNotSetException):
        detector.predict(VALID)
    assert torch.equal(detector.predict_features(ENCODER(VALID)), fitted(**CUTS).predict(VALID))


def test_training_sets_without_id_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="No ID"):
        OPNP(ENCODER, HEAD).fit(loader(unknown(TRAIN)))
    with pytest.raises(InputError, match="no sample"):
        OPNP(ENCODER, HEAD).fit_features(ENCODER(TRAIN), torch.full((90,), -1))


def test_features_that_are_broken_or_of_another_width_are_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        OPNP(None, HEAD).fit_features(ENCODER(TRAIN) * float("nan"), LABELS)
    with pytest.raises(InputError, match="shape"):
        OPNP(None, HEAD).fit_features(ENCODER(TRAIN)[:, 1:], LABELS)


def test_grid_search_picks_what_brute_force_picks() -> None:
    space: dict[str, list[Percentages]] = {
        "weights": [(0.0, 0.0), (0.0, 5.0), (30.0, 0.0)],
        "neurons": [(0.0, 0.0), (0.0, 10.0), (20.0, 5.0)],
    }
    detector = OPNP(ENCODER, HEAD)
    search = GridSearch(
        detector,
        loader((TRAIN, LABELS)),
        loader((VALID, torch.zeros(50, dtype=torch.long)), unknown(OUTLIERS)),
        space,
    )
    chosen = search.run()
    aurocs = {}
    for weights, neurons in product(*space.values()):
        one = fitted(weights=weights, neurons=neurons)
        aurocs[weights, neurons] = ood_metrics(one.predict(VALID), one.predict(OUTLIERS))["auroc"]
    best = max(aurocs, key=lambda key: aurocs[key])
    assert best != ((0.0, 0.0), (0.0, 0.0))  # so that choosing is seen to work
    assert (chosen["weights"], chosen["neurons"]) == best
    assert search.best_score_ == pytest.approx(aurocs[best] / 100, abs=1e-6)
    expected = fitted(weights=best[0], neurons=best[1])
    assert torch.equal(detector.predict(VALID), expected.predict(VALID))


def test_the_default_search_space_holds_valid_percentages_and_the_unpruned_head() -> None:
    for name, values in OPNP.hyperparameter_space.items():
        assert (0.0, 0.0) in values
        for value in values:
            fitted(**{name: value})


class Tiny(Benchmark):  # type: ignore[misc, unused-ignore]
    ood_names = ("shifted", "far")

    def train_set(self) -> Any:
        return TensorDataset(TRAIN, LABELS)

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Any]:
        del known, unknown
        return [
            TensorDataset(
                torch.cat([VALID, x]), torch.cat([torch.zeros(50), torch.full((len(x),), -1)])
            )
            for x in (OUTLIERS, 5 * OUTLIERS)
        ]


@pytest.mark.parametrize("cache", [False, True])
def test_a_benchmark_evaluates_it_beside_other_detectors_from_shared_features(cache: bool) -> None:
    detectors = [fitted(**CUTS), fitted(weights=(0, 20)), EnergyBased(MODEL)]
    benchmark, batches = Tiny(), 3
    before = ENCODER.calls
    results = benchmark.evaluate(detectors, {"batch_size": 32}, cache=cache)
    # One pass for both OPNPs, and one for the logits of the energy detector, over two data sets.
    assert ENCODER.calls - before == 2 * 2 * batches
    assert [(r["Dataset"], r["Detector"]) for r in results] == list(
        product(Tiny.ood_names, ("OPNP", "OPNP", "EnergyBased"))
    )
    for result, (x, detector) in zip(
        results, product((OUTLIERS, 5 * OUTLIERS), detectors), strict=True
    ):
        expected = ood_metrics(detector.predict(VALID), detector.predict(x))
        assert result["AUROC"] == pytest.approx(expected["auroc"] / 100, abs=1e-6)
        assert result["FPR95TPR"] == pytest.approx(expected["fpr95_ood_positive"] / 100, abs=1e-6)


def test_moving_it_to_a_device_keeps_its_scores() -> None:
    detector = fitted(**CUTS)
    scores = detector.predict(VALID)
    assert detector.to("cpu") is detector
    assert (detector.weights, detector.neurons) == (CUTS["weights"], CUTS["neurons"])
    assert torch.equal(detector.predict(VALID), scores)
    assert torch.equal(detector.fit(loader((TRAIN, LABELS))).predict(VALID), scores)


def test_the_head_is_copied_and_left_as_it_was() -> None:
    head = linear_head(HEAD.weight, HEAD.bias).requires_grad_()
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    detector = OPNP(ENCODER, head, **CUTS).fit_features(ENCODER(TRAIN), LABELS)
    scores = detector.predict(VALID)
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)
    assert head.weight.requires_grad
    with torch.no_grad():
        head.weight.zero_()
    assert torch.equal(detector.set_hyperparameters(**CUTS).predict(VALID), scores)


def test_scores_carry_no_gradients() -> None:
    head = linear_head(HEAD.weight, HEAD.bias).requires_grad_()
    detector = OPNP(None, head, **CUTS).fit_features(ENCODER(TRAIN), LABELS)
    assert not detector.predict_features(ENCODER(VALID).requires_grad_()).requires_grad


def test_a_head_without_bias_scores_as_one_with_a_zero_bias() -> None:
    bare = without_bias()
    zero = linear_head(bare.weight, torch.zeros(K))
    scores = [
        OPNP(ENCODER, head, **CUTS).fit(loader((TRAIN, LABELS))).predict(VALID)
        for head in (bare, zero)
    ]
    assert torch.equal(*scores)


def shaped(shape: Callable[[Tensor, float], Tensor], h: Tensor) -> Tensor:
    return shape(h[:, :, None, None], 0.65).flatten(1)


def threshold(h: Tensor) -> float:
    return float(np.percentile(h.numpy(), 90))


# Scores of features x of a head (K, L), fitted on h, by the library or by its formula.
SCORES: dict[str, Callable[[Tensor, Tensor, nn.Linear], Tensor]] = {
    "gen": lambda h, x, head: GEN.score(head(x)),
    "react": lambda h, x, head: EnergyBased.score(head(x.clip(max=threshold(h)))),
    "ash": lambda h, x, head: EnergyBased.score(head(shaped(ash_s, x))),
    "scale": lambda h, x, head: EnergyBased.score(head(shaped(scale, x))),
    "knn": lambda h, x, head: knn.KNN(None, head).fit_features(h, LABELS).predict_features(x),
    "vim": lambda h, x, head: (
        ViM(None, WIDTH // 2, head.weight, bias_of(head))
        .fit_features(h, LABELS)
        .predict_features(x)
    ),
    "gmm": lambda h, x, head: GMM(None, head).fit_features(h, LABELS).predict_features(x),
    "mahalanobis": lambda h, x, head: (
        Mahalanobis(None, head).fit_features(h, LABELS).predict_features(x)
    ),
}
SEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "react": lambda h: h.clip(max=threshold(h)),
    "ash": partial(shaped, ash_s),
    "scale": partial(shaped, scale),
}
LIBRARY: dict[str, Callable[[Tensor, Tensor, nn.Linear], Tensor]] = {
    "KNN": lambda h, x, head: KNN(None).fit_features(h, LABELS).predict_features(x)
}
# The same detectors as a function, and as the library's own on bare logits and features.
GIVEN: dict[str, tuple[str, Any]] = {
    **{name: (name, name) for name in SCORES},
    "GEN.score": ("gen", GEN.score),
    "GEN": ("gen", GEN(None)),
    "KNN": ("KNN", KNN(None)),
}


@pytest.mark.parametrize("case", GIVEN)
def test_with_nothing_pruned_another_detector_scores_as_it_does_alone(case: str) -> None:
    name, given = GIVEN[case]
    h, x = ENCODER(TRAIN), ENCODER(VALID)
    expected = (SCORES | LIBRARY)[name](h, x, HEAD)
    assert torch.equal(fitted(detector=given).predict_features(x), expected)
    nothing = PruningMask(torch.ones(K, WIDTH, dtype=torch.bool), torch.ones(WIDTH).bool())
    known = OPNP.from_mask(ENCODER, HEAD, nothing, detector=given)
    assert known.requires_fit == (name not in ("gen", "ash", "scale"))
    if known.requires_fit:
        with pytest.raises(RequiresFittingException):
            known.predict(VALID)
        known.fit_features(h, LABELS)
    assert torch.equal(known.predict(VALID), expected)


@pytest.mark.parametrize("case", GIVEN)
def test_another_detector_scores_the_pruned_model(case: str) -> None:
    name, given = GIVEN[case]
    h, x = ENCODER(TRAIN), ENCODER(VALID)
    seen = SEEN[name](h) if name in SEEN else h
    mask = PruningMask.from_sensitivity(
        parameter_sensitivity(seen, HEAD.weight, HEAD.bias),
        neuron_sensitivity(seen, HEAD.weight, HEAD.bias),
        **CUTS,
    )
    head = linear_head(HEAD.weight * mask.weights * mask.neurons, HEAD.bias)
    scores = (SCORES | LIBRARY)[name]
    expected = scores(h * mask.neurons, x * mask.neurons, head)
    detector = fitted(**CUTS, detector=given)
    assert torch.equal(detector.predict(VALID), expected)
    assert detector.mask is not None
    assert torch.equal(detector.mask.kept, mask.kept)
    assert not torch.allclose(expected, scores(h, x, HEAD))
    again = OPNP.from_mask(ENCODER, HEAD, mask, detector=given).fit_features(h, LABELS)
    assert again.mask is mask
    assert torch.equal(again.predict(VALID), expected)


@pytest.mark.parametrize("name", SEEN)
def test_the_sensitivity_is_of_the_features_that_the_head_is_given(name: str) -> None:
    found = fitted(detector=name).sensitivity
    assert found is not None
    h = ENCODER(TRAIN)
    expected = parameter_sensitivity(SEEN[name](h), HEAD.weight, HEAD.bias)
    torch.testing.assert_close(found.weights, expected)
    assert not torch.allclose(expected, parameter_sensitivity(h, HEAD.weight, HEAD.bias))


def test_a_detector_that_is_given_is_copied() -> None:
    given = KNN(None, k=5)
    one, other = fitted(detector=given), OPNP(ENCODER, HEAD, detector=given)
    other.set_hyperparameters(k=7)
    assert given.k == 5
    assert not given._is_fitted
    assert one.get_hyperparameters()["k"] == 5
    assert other.get_hyperparameters()["k"] == 7


def test_hyperparameters_are_those_of_the_pruning_and_of_the_detector() -> None:
    detector = OPNP(ENCODER, HEAD, **CUTS, detector="react")
    space = OPNP.hyperparameter_space | make("react", TrainedModel(HEAD)).hyperparameter_space
    assert detector.hyperparameter_space == space
    assert OPNP(ENCODER, HEAD).hyperparameter_space == OPNP.hyperparameter_space
    assert detector.get_hyperparameters() == {**CUTS, "percentile": 0.9}
    detector.set_hyperparameters(percentile=0.95, weights=(0, 20))
    assert detector.get_hyperparameters() == {**CUTS, "percentile": 0.95, "weights": (0, 20)}
    with pytest.raises(ValueError, match="gamma"):
        detector.set_hyperparameters(gamma=1.0)


def test_new_hyperparameters_of_the_detector_must_be_fitted() -> None:
    detector = fitted(**CUTS, detector="ash")
    detector.set_hyperparameters(weights=(0, 20))  # the detector is none to be fitted
    assert torch.equal(
        detector.predict(VALID),
        fitted(detector="ash", **{**CUTS, "weights": (0, 20)}).predict(VALID),
    )
    detector.set_hyperparameters(percentile=0.9)  # which changes what the head is given
    with pytest.raises(RequiresFittingException):
        detector.predict(VALID)
    known = OPNP.from_mask(ENCODER, HEAD, all_but_one(), detector="ash")
    scores = known.predict(VALID)
    assert not torch.equal(known.set_hyperparameters(percentile=0.9).predict(VALID), scores)
    knn = fitted(**CUTS, detector="knn").set_hyperparameters(neurons=(0, 0))
    with pytest.raises(RequiresFittingException):
        knn.predict(VALID)


def all_but_one() -> PruningMask:
    neurons = torch.ones(WIDTH, dtype=torch.bool)
    neurons[0] = False
    return PruningMask(torch.ones(K, WIDTH, dtype=torch.bool), neurons)


def test_grid_search_tunes_a_composition_as_one_detector() -> None:
    space = {"neurons": [(0.0, 0.0), (20.0, 5.0)], "percentile": [0.85, 0.99]}
    valid = loader((VALID, torch.zeros(50, dtype=torch.long)), unknown(OUTLIERS))
    detector = OPNP(ENCODER, HEAD, detector="react")
    chosen = GridSearch(detector, loader((TRAIN, LABELS)), valid, space).run()
    again = OPNP(ENCODER, HEAD, detector="react").set_hyperparameters(**chosen)
    assert torch.equal(detector.predict(VALID), again.fit(loader((TRAIN, LABELS))).predict(VALID))


def test_detectors_that_cannot_be_composed_are_refused() -> None:
    with pytest.raises(InputError, match="'reakt'; did you mean react or"):
        OPNP(ENCODER, HEAD, detector="reakt")
    with pytest.raises(UnavailableError, match="whole classifier"):
        OPNP(ENCODER, HEAD, detector="odin")
    with pytest.raises(InputError, match="not ReAct: give its name"):
        OPNP(ENCODER, HEAD, detector=ReAct(ENCODER, HEAD))
    with pytest.raises(UnavailableError, match="labels"):
        OPNP(ENCODER, HEAD, detector="gmm").fit_features(ENCODER(TRAIN))


def test_moving_a_composition_keeps_its_scores() -> None:
    detector = fitted(**CUTS, detector="vim")
    scores = detector.predict(VALID)
    assert torch.equal(detector.to("cpu").predict(VALID), scores)
