"""Every detector by name, on cached features and on images, against pytorch-ood itself."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_ood.detector import (
    ASH,
    DICE,
    GMM,
    KNN,
    ODIN,
    SCALE,
    SHE,
    EnergyBased,
    GradNorm,
    Gram,
    MaxLogit,
    MaxSoftmax,
    RankFeat,
    ReAct,
    ViM,
)
from pytorch_ood.detector.ash import ash_s
from pytorch_ood.detector.rankfeat import _remove_rank1
from pytorch_ood.detector.scale import scale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from opnp.backbones.backbone import build
from opnp.backbones.networks import Pool
from opnp.detectors import base
from opnp.detectors.base import Samples, SearchChoice, TrainedModel, features_seen, fit, make, score
from opnp.detectors.names import DETECTORS
from opnp.errors import InputError, UnavailableError
from opnp.metrics.separation import ood_metrics
from opnp.pruning.candidates import Candidate
from opnp.pruning.masks import PruningMask

K, WIDTH, T = 3, 16, 1.5
LIMIT = 5.0  # of contributions, as if the model were trained by SPCP
OF_IMAGES = tuple(key for key, row in DETECTORS.items() if row.takes == "images")
CHOICES = {  # of a mask search
    "clip": SearchChoice(Candidate(clip=0.06, temperature=2.0), 90.0),
    "opp": SearchChoice(Candidate((0, 5), (0, 0))),
    "onp": SearchChoice(Candidate((0, 0), (10, 0), "taylor")),
    "opnp": SearchChoice(Candidate((10, 2), (0, 10), temperature=2.0), trials=77),
    "opnp+react": SearchChoice(Candidate((0, 5), (0, 0), clip=1.0), 90.0),
}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Three patterns under noise, and which it is."""
    labels = torch.arange(n) % K
    return drawn(1, K, 1, 8, 8)[labels] + 0.3 * drawn(seed, n, 1, 8, 8), labels


def noise(seed: int, n: int) -> Tensor:
    return 0.3 * drawn(seed, n, 1, 8, 8)


def trained() -> TrainedModel:
    """Random convolutions, and a head that tells the three patterns apart by least squares."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = build("resnet", 1, K, 8, width=WIDTH // 4).eval().requires_grad_(False)
    images, labels = pictures(1, 300)
    h = F.pad(classifier.encoder(images), (0, 1), value=1).double()
    gram = h.T @ h + 0.01 * torch.eye(WIDTH + 1)
    weight = 10 * torch.linalg.solve(gram, h.T @ F.one_hot(labels, K).double()).T.float()
    classifier.head.weight.copy_(weight[:, :WIDTH])
    classifier.head.bias.copy_(weight[:, WIDTH])
    return TrainedModel(classifier.head, T, classifier, (0.5,), CHOICES, LIMIT)


MODEL = trained()
CLASSIFIER = MODEL.whole()


def cached(images: Tensor, labels: Tensor | None = None) -> Samples:
    return Samples(CLASSIFIER.encoder(images), labels, lambda: images)


TRAIN, INSIDE, OUTSIDE = cached(*pictures(2, 150)), cached(pictures(3, 60)[0]), cached(noise(4, 60))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Layers this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fitted(name: str, model: TrainedModel = MODEL, train: Samples = TRAIN) -> Any:
    detector = make(name, model)
    fit(detector, model, train)
    return detector


def state(module: nn.Module) -> list[tuple[str, bytes, bool, bool]]:
    return [
        (name, tensor.detach().numpy().tobytes(), tensor.requires_grad, tensor.grad is None)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    ]


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_fits_and_scores_obvious_outliers_higher(name: str) -> None:
    before = state(CLASSIFIER)
    detector = fitted(name)
    inside, outside = score(detector, MODEL, INSIDE), score(detector, MODEL, OUTSIDE)
    assert inside.shape == outside.shape == (60,)
    assert inside.dtype == torch.float64
    assert torch.cat([inside, outside]).isfinite().all()
    # Of maps of 2 × 2 RankFeat takes one of four singular values, and what is left tells nothing.
    assert name == "rankfeat" or ood_metrics(inside, outside)["auroc"] > 85
    features_seen(detector, MODEL, TRAIN)
    assert state(CLASSIFIER) == before
    assert hooks(CLASSIFIER) == 0
    assert not any(module.training for module in CLASSIFIER.encoder.modules())


def maps(images: Tensor) -> Tensor:
    features: Tensor = CLASSIFIER.encoder(images)
    return features[:, :, None, None]


ENCODER, HEAD = CLASSIFIER.encoder, MODEL.head
ENERGY = partial(EnergyBased.score, t=T)
ON_MAPS = nn.Sequential(nn.Flatten(), HEAD)
UNPOOLED = nn.Sequential(*base.layers_of(ENCODER)[:-1])

# The library run on images.
DIRECT: dict[str, Callable[[], Any]] = {
    "msp": lambda: MaxSoftmax(CLASSIFIER, t=T),
    "maxlogit": lambda: MaxLogit(CLASSIFIER),
    "energy": lambda: EnergyBased(CLASSIFIER, t=T),
    "react": lambda: ReAct(ENCODER, HEAD, percentile=0.9, detector=ENERGY),
    "dice": lambda: DICE(ENCODER, HEAD.weight, HEAD.bias, p=0.9, detector=ENERGY),
    "ash": lambda: ASH(maps, ON_MAPS, detector=ENERGY),
    "scale": lambda: SCALE(maps, ON_MAPS, detector=ENERGY),
    "she": lambda: SHE(ENCODER, HEAD),
    "knn": lambda: KNN(ENCODER),
    "vim": lambda: ViM(ENCODER, WIDTH // 2, HEAD.weight, HEAD.bias),
    "odin": lambda: ODIN(CLASSIFIER, norm_std=[0.5]),
    "gradnorm": lambda: GradNorm(CLASSIFIER, lambda name: name == "head.weight"),
    "rankfeat": lambda: RankFeat(UNPOOLED, nn.Sequential(Pool(), HEAD), detector=ENERGY),
}


@pytest.mark.parametrize("name", DIRECT)
def test_cached_samples_score_as_the_library_scores_images(name: str) -> None:
    direct = DIRECT[name]()
    images, labels = pictures(2, 150)
    direct.fit(DataLoader(TensorDataset(images, labels), batch_size=64))
    expected = direct.predict(noise(4, 60)).detach().double()
    found = score(fitted(name), MODEL, OUTSIDE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in DETECTORS if name not in OF_IMAGES])
def test_features_suffice_in_any_number_and_with_a_head_without_bias(name: str) -> None:
    head = nn.Linear(WIDTH, K, bias=False).requires_grad_(False)
    head.weight.copy_(HEAD.weight)
    model = TrainedModel(head, choices=CHOICES, spcp=LIMIT)
    features = TRAIN.features.repeat(7, 1)[: base.BATCH + 5]
    detector = fitted(name, model, Samples(TRAIN.features, TRAIN.labels))
    scores = score(detector, model, Samples(features))
    assert scores.shape == (base.BATCH + 5,)
    tail = score(detector, model, Samples(features[-9:]))
    torch.testing.assert_close(scores[-9:], tail, rtol=1e-5, atol=1e-4)


def test_spcp_clips_contributions_at_the_threshold_of_training() -> None:
    limit, contributions = 0.008, OUTSIDE.features[:, None] * HEAD.weight
    assert (contributions > limit).any()
    model = replace(MODEL, spcp=limit)
    logits = contributions.clamp(max=limit).sum(dim=2) + HEAD.bias
    found = score(make("spcp", model), model, OUTSIDE)
    torch.testing.assert_close(found, ENERGY(logits).double(), rtol=1e-5, atol=1e-5)
    plain = score(make("spcp", replace(MODEL, spcp=1e9)), MODEL, OUTSIDE)
    torch.testing.assert_close(plain, score(make("energy", MODEL), MODEL, OUTSIDE))
    with pytest.raises(UnavailableError, match="trained with it here, and this one was not"):
        make("spcp", BARE)


@pytest.mark.parametrize("name", ["knn", "nnguide"])
def test_there_are_no_more_neighbours_than_training_samples(name: str) -> None:
    few = cached(*pictures(2, 7))
    found, all_of_them = make(name, MODEL), make(name, MODEL)
    found.set_hyperparameters(k=1000)
    fit(found, MODEL, few)
    assert found.get_hyperparameters() == {"k": 7}
    all_of_them.set_hyperparameters(k=7)
    fit(all_of_them, MODEL, few)
    assert torch.equal(score(found, MODEL, OUTSIDE), score(all_of_them, MODEL, OUTSIDE))


@pytest.mark.parametrize(
    ("name", "value"), [("energy", "t"), ("msp", "t"), ("rankfeat", "temperature")]
)
def test_the_temperature_is_a_hyperparameter(name: str, value: str) -> None:
    detector = make(name, MODEL)
    assert detector.get_hyperparameters() == {value: T}
    colder = make(name, replace(MODEL, temperature=5.0))
    detector.set_hyperparameters(**{value: 5.0})
    assert torch.equal(score(detector, MODEL, OUTSIDE), score(colder, MODEL, OUTSIDE))


@pytest.mark.parametrize("name", DETECTORS)
def test_all_values_to_try_can_be_set(name: str) -> None:
    for parameter, values in make(name, MODEL).hyperparameter_space.items():
        assert len(values) == len({str(value) for value in values})
        for value in values:
            detector = make(name, MODEL).set_hyperparameters(**{parameter: value})
            assert detector.get_hyperparameters()[parameter] == value


def test_memory_bounds_the_rows_scored_at_once() -> None:
    assert base.rows_at_once(HEAD) == base.BATCH
    assert base.rows_at_once(nn.Linear(4096, 1000, device="meta")) == 32


def test_logits_are_shared_where_they_are_given() -> None:
    detector = fitted("energy")
    shared = replace(OUTSIDE, logits=torch.zeros(60, K))
    assert torch.equal(score(detector, MODEL, shared), ENERGY(torch.zeros(60, K)).double())
    pruned = shared.pruned(some_mask())
    assert pruned.logits is None


def test_images_are_asked_for_only_by_detectors_of_images() -> None:
    calls: list[int] = []
    images, labels = pictures(2, 150)

    def counted() -> Tensor:
        calls.append(1)
        return images

    samples = Samples(CLASSIFIER.encoder(images), labels, counted)
    for name in DETECTORS:
        calls.clear()
        score(fitted(name, train=samples), MODEL, samples)
        assert bool(calls) == (name in OF_IMAGES), name


def some_mask() -> PruningMask:
    return PruningMask(drawn(5, K, WIDTH) > -1, drawn(6, WIDTH) > -0.5)


def test_a_pruned_model_scores_pruned_features_alone_and_within_the_classifier() -> None:
    mask, images = some_mask(), noise(4, 60)
    model, samples = MODEL.pruned(mask), OUTSIDE.pruned(mask)
    assert 0 < mask.neurons.sum() < WIDTH
    assert torch.equal(samples.features, OUTSIDE.features * mask.neurons)
    expected = OUTSIDE.features @ (HEAD.weight * mask.kept).T + HEAD.bias
    torch.testing.assert_close(model.head(samples.features), expected)
    torch.testing.assert_close(model.whole()(images), expected)
    assert torch.equal(model.whole().encoder(images), samples.features)
    before, after = model.at_pooling()
    torch.testing.assert_close(after(before(images)), expected)
    assert (model.temperature, model.std) == (T, (0.5,))


SHAPED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "react": lambda h, d: h.clip(max=d.threshold),
    "vra": lambda h, d: h.clip(h.quantile(0.01, dim=0), h.quantile(0.99, dim=0)),
    "ash": lambda h, d: ash_s(h[:, :, None, None], d.percentile).flatten(1),
    "scale": lambda h, d: scale(h[:, :, None, None], d.percentile).flatten(1),
    "rankfeat": lambda h, d: _remove_rank1(UNPOOLED(pictures(2, 150)[0])).mean(dim=(2, 3)),
}


@pytest.mark.parametrize("name", SHAPED)
def test_what_the_head_is_given_is_what_the_detector_shapes(name: str) -> None:
    detector = fitted(name)
    seen = features_seen(detector, MODEL, TRAIN)
    torch.testing.assert_close(seen, SHAPED[name](TRAIN.features, detector))
    assert not torch.allclose(seen, TRAIN.features)


def test_odin_gives_the_head_the_features_of_the_moved_image() -> None:
    seen = features_seen(fitted("odin"), MODEL, TRAIN)
    assert seen.shape == TRAIN.features.shape
    assert not seen.requires_grad
    assert 0 < (seen - TRAIN.features).abs().max() < 0.1


@pytest.mark.parametrize("name", sorted(DETECTORS.keys() - SHAPED.keys() - {"odin"}))
def test_features_that_no_detector_shapes_are_seen_as_they_are(name: str) -> None:
    assert features_seen(fitted(name), MODEL, TRAIN) is TRAIN.features


def test_hooks_go_even_if_scoring_fails() -> None:
    detector = fitted("react")
    with pytest.raises(RuntimeError):
        features_seen(detector, MODEL, Samples(TRAIN.features[:, 1:]))
    assert hooks(CLASSIFIER) == 0


def few_of_many() -> tuple[TrainedModel, Samples, Samples]:
    """A model of 20 classes, training samples of 9 of them, one of a single one, and new ones."""
    centres = 3 * drawn(11, 20, WIDTH).abs()
    head = nn.Linear(WIDTH, 20).requires_grad_(False)
    head.weight.copy_(centres / 20)
    head.bias.copy_(-centres.square().sum(dim=1) / 40)  # the nearest centre is predicted
    labels = torch.cat([torch.tensor([0, 1, 2, 3, 5, 7, 11, 18]).repeat(15), torch.tensor([19])])
    train, new = (
        (centres[each] + 0.3 * drawn(seed, len(each), WIDTH)).relu()
        for each, seed in ((labels, 12), (torch.arange(20).repeat(3), 13))
    )
    return TrainedModel(head, choices=CHOICES, spcp=LIMIT), Samples(train, labels), Samples(new)


@pytest.mark.parametrize("name", [name for name in DETECTORS if name not in OF_IMAGES])
def test_classes_without_training_samples_or_with_one_are_no_obstacle(name: str) -> None:
    model, train, new = few_of_many()
    scores = score(fitted(name, model, train), model, new)
    assert scores.shape == (60,)
    assert scores.unique().numel() > 1


assert TRAIN.labels is not None
WRONG = Samples(TRAIN.features, (TRAIN.labels + 1) % K)
SILENT = Samples(torch.zeros(9, WIDTH))
BARE = TrainedModel(HEAD)
FEATURES = Samples(TRAIN.features, TRAIN.labels)

# Name, model, training samples, samples to score, the reason and the type of what caused it.
CANNOT: list[tuple[str, TrainedModel, Samples, Samples, str, type[Exception] | None]] = [
    ("she", BARE, WRONG, INSIDE, "no training sample is classified as its label says", InputError),
    ("gmm", BARE, Samples(TRAIN.features), OUTSIDE, "labels, and there are none", ValueError),
    ("nero", BARE, FEATURES, Samples(TRAIN.features / 0), "NaN", InputError),
    ("ash", BARE, FEATURES, SILENT, "not finite", ValueError),
    ("odin", BARE, FEATURES, OUTSIDE, "whole classifier", None),
    ("odin", MODEL, FEATURES, FEATURES, "runs on images", ValueError),
]


@pytest.mark.parametrize("case", CANNOT, ids=lambda case: case[0])
def test_a_detector_that_cannot_run_says_why(
    case: tuple[str, TrainedModel, Samples, Samples, str, type[Exception] | None],
) -> None:
    name, model, train, samples, reason, cause = case
    with pytest.raises(UnavailableError, match=reason) as error:
        score(fitted(name, model, train), model, samples)
    assert str(error.value).count("\n") == 0
    assert str(error.value).endswith(".")
    assert cause is None or isinstance(error.value.__cause__, cause)


def test_a_singular_covariance_is_a_reason() -> None:
    with pytest.raises(UnavailableError, match="positive definite"):
        fit(GMM(None, reg=0.0), BARE, Samples(torch.ones(9, WIDTH), torch.arange(9) % K))


def test_rankfeat_needs_feature_maps() -> None:
    tokens = build("vit", 1, K, 8, width=8).eval()
    with pytest.raises(UnavailableError, match="does not pool any"):
        make("rankfeat", TrainedModel(tokens.head, 1.0, tokens))


def test_programming_errors_are_not_taken_for_reasons() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        score(fitted("energy"), MODEL, Samples(TRAIN.features[:, 1:]))
    gram = Gram(HEAD, [ENCODER], K)
    with pytest.raises(TypeError, match="Gram takes neither"):
        score(gram, MODEL, TRAIN)
