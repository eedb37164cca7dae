"""Detectors exported: run as their users would, they give the same scores."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import opnp
from opnp import SavedDetector
from opnp.deployment import export
from opnp.deployment.scorer import Scorer
from opnp.errors import InputError, UnavailableError
from tests.helpers import own_model

Run = Callable[[Path, torch.Tensor], tuple[NDArray[np.float32], NDArray[np.float32]]]


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> SavedDetector:
    return opnp.load(detector_folder, trust=own_model.SPEC)


def run_torch(path: Path, images: torch.Tensor) -> tuple[NDArray[np.float32], ...]:
    logits, score = torch.export.load(path).module()(images)
    return logits.numpy(), score.numpy()


def run_onnx(path: Path, images: torch.Tensor) -> tuple[NDArray[np.float32], ...]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == ["logits", "score"]
    logits, score = session.run(None, {"images": images.numpy()})
    return logits, score


def about_torch(path: Path) -> str:
    found = {"detector.json": ""}
    torch.export.load(path, extra_files=found)
    return found["detector.json"]


def about_onnx(path: Path) -> str:
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model)
    return {each.key: each.value for each in model.metadata_props}["detector.json"]


@pytest.mark.parametrize(
    ("format", "name", "run", "about"),
    [
        ("torch", "detector.pt2", run_torch, about_torch),
        ("onnx", "detector.onnx", run_onnx, about_onnx),
    ],
)
def test_the_program_gives_the_same_scores(
    format: str,
    name: str,
    run: Run,
    about: Callable[[Path], str],
    detector: SavedDetector,
    tmp_path: Path,
) -> None:
    path = tmp_path / name
    export.export(detector, path, format)
    for count in (1, 2, 33):
        images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
        logits, score = run(path, images)
        expected = detector.predict(images)
        np.testing.assert_allclose(score, expected.score, atol=1e-4)
        assert logits.shape == (count, 7)
        assert (logits.argmax(axis=1) == expected.label).all()
    assert json.loads(about(path)) == json.loads(json.dumps(detector.describe()))
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_what_cannot_be_exported(
    detector: SavedDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no format 'tflite': choose torch or onnx"):
        export.export(detector, tmp_path / "x", "tflite")

    class Branching(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :48] if float(images.sum()) > 0 else images[:, 0, 0]

    scorer = detector.scorer
    branching = Scorer(detector.backbone.preprocessing, Branching(), None, scorer.pruned, 1.0, None)
    own = type(detector).__new__(type(detector))
    own.__dict__.update(detector.__dict__, scorer=branching)
    with pytest.raises(InputError, match=r"network:Network.* cannot be exported"):
        export.export(own, tmp_path / "x.pt2", "torch")
    found = importlib.util.find_spec
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnx" else found(name))
    with pytest.raises(UnavailableError, match=r"ONNX needs onnx: install opnp\[onnx\]"):
        export.export(detector, tmp_path / "x.onnx", "onnx")
    assert not list(tmp_path.iterdir())
