"""The README keeps its word: its Python runs as it stands, and what it names exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import mobilenet_v3_small

from opnp import SearchSettings
from opnp.pipeline.parameters import load
from opnp.pruning.candidates import grid

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder, head = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU()), nn.Linear(16, 3)
    images, labels = torch.rand(40, 3, 2, 2), torch.arange(40) % 3
    features = encoder(images).detach()
    names: dict[str, Any] = {
        "encoder": encoder,
        "head": head,
        "images": images,
        "train_loader": DataLoader(TensorDataset(images, labels), batch_size=8),
        "train_features": features,
        "id_features": features,
        "id_labels": labels,
        "blob_features": features.flip(1),
    }
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 4
    torch.save(mobilenet_v3_small(num_classes=2).state_dict(), "weights.pt")
    for block in blocks:
        exec(block, names)
    assert names["scores"].shape == (40,)
    assert names["detector"].predict(images).shape == (40,)
    assert (tmp_path / "mask.safetensors").is_file()
    assert names["mine"].classes == ["cat", "dog"]
    gate = names["gate"].fit_features(torch.rand(9, 1024), torch.zeros(9))
    assert gate.predict_features(torch.rand(3, 1024)).shape == (3,)


def test_the_files_it_names_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    for link in [*links, *re.findall(r"presets/[\w-]+\.yaml", README)]:
        assert (ROOT / link).is_file(), link


def test_the_modules_and_parameters_it_names_exist() -> None:
    parameters = (ROOT / "params.yaml").read_text()
    for module in re.findall(r"python -m (flows\.\w+)", README):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for section, key in re.findall(
        r"`(data|train|features|energy|search|evaluate)\.(?!dvc|parquet)(\w+)`", README
    ):
        assert re.search(rf"^{section}:.*?^  {key}:", parameters, re.S | re.M), (section, key)


def test_it_counts_right() -> None:
    (masks,) = re.findall(r"every mask of a grid, ([\d,]+) unless", README)
    assert int(masks.replace(",", "")) == len(grid(SearchSettings()))
    (detectors,) = re.findall(r"a comparison of (\d+) detectors on four OOD sets", README)
    chosen = load(ROOT / "params.yaml")
    assert int(detectors) == len(chosen.evaluate.detectors)
    assert len({**chosen.data.near, **chosen.data.far}) == 4
