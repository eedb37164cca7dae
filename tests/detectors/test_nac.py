"""Which layers NAC-UE looks at."""

import pytest

from opnp.backbones.backbone import build
from opnp.detectors import base
from opnp.detectors.base import Samples, TrainedModel, score
from opnp.detectors.nac import last_blocks
from tests.detectors.test_zoo import K, fitted, one_thread, pictures

__all__ = ["one_thread"]  # a fixture that all tests here use


@pytest.mark.parametrize("name", ["resnet", "convnext", "vit"])
def test_nac_looks_at_the_end_of_each_stage(name: str) -> None:
    model = build(name, 1, K, 8, width=8, depth=2).eval().requires_grad_(False)
    ends = last_blocks(model)
    blocks = [m for m in base.layers_of(model.encoder) if isinstance(m, type(ends[-1]))]
    assert len(blocks) == 6
    assert ends == blocks[1::2]
    images, labels = pictures(2, 12)
    features = model.encoder(images)
    whole = TrainedModel(model.head, 1.0, model)
    samples = Samples(features, labels, lambda: images)
    detector = fitted("nac", whole, samples)
    assert [len(layer.counts) for layer in detector._stats] == [
        {"resnet": 8 << stage, "convnext": 8 << stage, "vit": 32}[name] for stage in range(3)
    ]
    assert score(detector, whole, samples).isfinite().all()
