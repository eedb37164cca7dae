"""SPCP: contributions clipped in training, by brute force, in gradients and in whole trainings."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from opnp.backbones import spcp, training
from opnp.backbones.backbone import Classifier
from opnp.backbones.spcp import Rectifier
from opnp.errors import InputError
from opnp.pipeline import stages
from opnp.pipeline.parameters import Train, load
from opnp.pipeline.results import Run
from opnp.pruning.energy import linear_head
from opnp.runtime import devices
from opnp.workspace import Workspace
from tests.conftest import ROOT, set_parameters

N, K, WIDTH = 5, 3, 4


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensor(value: float) -> Tensor:
    return torch.tensor(value)


def head_of(seed: int = 1) -> nn.Linear:
    return linear_head(drawn(seed, K, WIDTH), drawn(seed + 1, K)).requires_grad_()


def gradients(head: nn.Linear, features: Tensor, threshold: Tensor | None) -> list[Tensor]:
    """The logits, and the cross-entropy's gradients of features, weight and bias."""
    h = features.clone().requires_grad_()
    logits = head(h) if threshold is None else Rectifier.rectify(head, h, threshold)
    loss = F.cross_entropy(logits, torch.arange(len(h)) % K)
    return [logits.detach(), *torch.autograd.grad(loss, (h, head.weight, head.bias))]


def blobs(seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(48) % K
    return 2 * drawn(99, K, 1, 4, 4)[labels] + drawn(seed, 48, 1, 4, 4), labels


def trained(
    spcp: float | None = None, **settings: Any
) -> tuple[Classifier, list[dict[str, float]]]:
    with devices.deterministic(1):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU())
        model = Classifier(encoder, nn.Linear(32, K))
        history = training.fit(
            model,
            blobs(1),
            blobs(2),
            epochs=8,
            batch_size=16,
            learning_rate=0.1,
            weight_decay=5e-4,
            shift_pixels=0,
            seed=0,
            spcp=None if spcp is None else Rectifier(spcp),
            **settings,
        )
    return model, history


def assert_same_weights(a: Classifier, b: Classifier, same: bool = True) -> None:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs) is same


@given(st.integers(0, 10**6), st.floats(-1, 3))
def test_rectified_logits_equal_brute_force(seed: int, threshold: float) -> None:
    head, features = head_of(seed).requires_grad_(False), drawn(seed + 5, N, WIDTH)
    expected = torch.empty(N, K)
    for n, i in product(range(N), range(K)):
        terms = [min(float(head.weight[i, j] * features[n, j]), threshold) for j in range(WIDTH)]
        expected[n, i] = sum(terms) + float(head.bias[i])
    found = Rectifier.rectify(head, features, tensor(threshold))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 10**6), st.floats(-1, 3))
def test_gradients_equal_autograds_through_a_clamp(seed: int, threshold: float) -> None:
    head, features = head_of(seed), drawn(seed + 5, N, WIDTH)
    h = features.clone().requires_grad_()
    logits = (h[:, None] * head.weight).clamp(max=threshold).sum(dim=2) + head.bias
    loss = F.cross_entropy(logits, torch.arange(N) % K)
    expected = torch.autograd.grad(loss, (h, head.weight, head.bias))
    found = gradients(head, features, tensor(threshold))[1:]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_gradient_flows_through_clipped_contributions() -> None:
    head = linear_head(torch.tensor([[5.0, 1], [1, 1], [-1, 1]]), torch.zeros(3)).requires_grad_()
    features = torch.tensor([[2.0, 0.5]])  # contributions of feature 0: 10, 2 and -2
    _, _, weight, _ = gradients(head, features, tensor(3.0))
    assert weight[0, 0] == 0
    assert (weight.flatten()[1:] != 0).all()
    _, dh, weight, bias = gradients(head, features, tensor(-9.0))  # everything is clipped
    assert not dh.any()
    assert not weight.any()
    assert bias.any()


def test_a_threshold_above_every_contribution_gives_the_plain_heads_bits() -> None:
    head, features = head_of(), drawn(3, 64, WIDTH)
    for a, b in zip(
        gradients(head, features, tensor(1e6)), gradients(head, features, None), strict=True
    ):
        assert torch.equal(a, b)


def test_a_training_that_clips_nothing_gives_the_plain_trainings_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, history = trained()
    monkeypatch.setattr(Rectifier, "_estimate", lambda *_: tensor(1e6))
    shaped, same = trained(spcp=95.0)
    assert_same_weights(plain, shaped)
    assert history == same


def test_few_contributions_held_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head, features = head_of(), drawn(3, 64, WIDTH)
    whole = gradients(head, features, tensor(0.5))
    monkeypatch.setattr(spcp, "CONTRIBUTIONS", 1)
    for a, b in zip(gradients(head, features, tensor(0.5)), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_the_threshold_of_a_large_head_is_estimated_from_a_batchs_first_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, features = head_of().requires_grad_(False), drawn(3, 64, WIDTH)
    first = Rectifier(90)._estimate(features[:7], head.weight)
    monkeypatch.setattr(spcp, "CONTRIBUTIONS", 7 * K * WIDTH + 1)
    assert torch.equal(Rectifier(90)._estimate(features, head.weight), first)


def test_the_threshold_follows_the_mean_percentile_of_the_samples() -> None:
    head, batches = head_of(), [drawn(seed, N, WIDTH) for seed in range(4)]
    rectifier = Rectifier(80, decay=0.75)
    expected = None
    for features in batches:
        logits = rectifier(head, features)
        per_sample = [torch.quantile((h * head.weight.detach()).flatten(), 0.8) for h in features]
        mean = float(sum(per_sample)) / N
        expected = mean if expected is None else 0.75 * expected + 0.25 * mean
        assert rectifier.threshold is not None
        assert float(rectifier.threshold) == pytest.approx(expected, rel=1e-5)
        assert not rectifier.threshold.requires_grad
        # The batch that moved the threshold is clipped by the moved one.
        assert torch.equal(logits, Rectifier.rectify(head, features, rectifier.threshold))


def test_a_lower_percentile_clips_more() -> None:
    head, features = head_of().requires_grad_(False), drawn(3, 64, WIDTH)
    thresholds = [float(Rectifier(p)._estimate(features, head.weight)) for p in (10, 50, 90, 99)]
    assert thresholds == sorted(thresholds)
    assert (Rectifier(50)(head, features) <= head(features)).all()


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "adamw"}, {"precision": "bfloat16"}], ids=str
)
def test_a_small_model_is_trained_deterministically(settings: dict[str, Any]) -> None:
    shaped, history = trained(spcp=80.0, **settings)
    again, same = trained(spcp=80.0, **settings)
    plain, _ = trained(**settings)
    assert_same_weights(shaped, again)
    assert history == same
    assert_same_weights(shaped, plain, same=False)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["validation_accuracy"] > 90


def test_a_trained_model_is_a_plain_classifier() -> None:
    shaped, history = trained(spcp=80.0)
    plain, _ = trained()
    assert type(shaped.head) is nn.Linear
    assert shaped.state_dict().keys() == plain.state_dict().keys()
    images, labels = blobs(2)
    h = shaped.encoder(images)
    logits = h @ shaped.head.weight.T + shaped.head.bias
    assert (100 * (logits.argmax(dim=1) == labels).float().mean()).item() == pytest.approx(
        history[-1]["validation_accuracy"]
    )
    torch.testing.assert_close(shaped(images), logits)


@pytest.mark.parametrize("percentile", [None, 90])
def test_the_stage_records_the_learnt_threshold(percentile: float | None, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    few = {"data.ood_count": 10, "train.width": 4, "train.epochs": 1, "train.spcp": percentile}
    set_parameters(tmp_path, few)
    workspace = Workspace(tmp_path)
    chosen = load(workspace.parameters)
    stages.fetch.run(workspace, chosen)
    stages.train.run(workspace, chosen)
    threshold = Run(workspace, chosen).training.record["spcp_threshold"]
    assert threshold is None if percentile is None else 0 < threshold < 10


@pytest.mark.parametrize("value", [None, 0.5, 95, 99.9])
def test_percentiles_are_taken(value: float | None) -> None:
    assert Train.model_validate({"spcp": value}).spcp == value
    assert Train().spcp is None


@pytest.mark.parametrize("value", [0, 100, -5, 250, float("nan"), "95", True])
def test_bad_percentiles_are_refused(tmp_path: Path, value: object) -> None:
    text = (ROOT / "params.yaml").read_text()
    stated = {"95": "'95'", "nan": ".nan", "True": "true"}.get(str(value), str(value))
    file = tmp_path / "params.yaml"
    file.write_text(text.replace("spcp: null", f"spcp: {stated}"))
    with pytest.raises(InputError, match=r"train\.spcp"):
        load(file)


@pytest.mark.parametrize("name", ["params.yaml", "presets/fashion-mnist.yaml"])
def test_the_presets_train_plainly(name: str) -> None:
    settings = load(ROOT / name).train
    assert (settings.optimizer, settings.precision, settings.spcp) == ("sgd", "float32", None)
