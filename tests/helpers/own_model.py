"""A user's trained classifier and folders of images, as the tests of detectors want them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from opnp.backbones.backbone import Backbone, from_spec
from opnp.data import generated, images
from opnp.data.preprocessing import Preprocessing
from opnp.deployment import fit
from opnp.deployment.settings import FitSettings

__all__ = ["CLASSES", "QUICK", "SPEC", "backbone", "fitted", "make"]

SPEC = "network:Network"
CLASSES = ["zero", "one", "two", "three", "four", "five", "six"]
PARTS = ("train", "train", "validation", "test")  # of every four images of a class

NETWORK = """
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(256, 48), nn.ReLU(),
        )
        self.last = nn.Linear(48, 7)

    def forward(self, images):
        return self.last(self.body(images))
"""


def make(folder: Path) -> Path:
    """Write what a user has: a network, its trained weights, and images in folders.

    ``network.py``, ``weights.pt``, ``preprocessing.json``, ``classes.txt``, and in ``images`` the
    folders ``train``, ``validation`` and ``test``, of a folder for each class, and ``others``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "network.py").write_text(NETWORK)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    preprocessing = {"size": 8, "mode": "L", "mean": [0.3], "std": [0.4]}
    (folder / "preprocessing.json").write_text(json.dumps(preprocessing))
    seen: Counter[int] = Counter()
    learnt, labels = [], []
    for image, digit in generated.scanned_digits():
        number = seen[digit]
        seen[digit] += 1
        known = digit < len(CLASSES)
        place = f"{PARTS[number % 4]}/{CLASSES[digit]}" if known else "others"
        path = folder / "images" / place / f"{digit}-{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        if known and PARTS[number % 4] == "train":
            learnt.append(np.asarray(image))
            labels.append(digit)
    pixels = torch.from_numpy(np.stack(learnt))[:, None].float() / 255
    x, y = (pixels - 0.3) / 0.4, torch.tensor(labels)
    names: dict[str, Any] = {}
    exec(NETWORK, names)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = names["Network"]()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(12):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder


def backbone(folder: Path) -> Backbone:
    """The model that `make` wrote; its folder must be one that modules are imported from."""
    preprocessing = Preprocessing.stated(folder / "preprocessing.json")
    return from_spec(SPEC, folder / "weights.pt", preprocessing, CLASSES)


QUICK = FitSettings(
    weights_low=(0, 30),
    weights_high=(0, 0.2, 2),
    neurons_low=(0, 30),
    neurons_high=(0, 5),
    neuron_sensitivity=("gradient",),
    clip=(None, 90),
    temperature=(1.0,),
)
"""A search of few masks."""


def fitted(folder: Path, out: Path, settings: FitSettings = QUICK) -> Path:
    """Fit a detector to the model, and save it."""
    train, validation = (images.find(folder / "images" / part) for part in ("train", "validation"))
    detector = fit.fit(backbone(folder), train, validation, out.with_suffix(".features"), settings)
    detector.save(out)
    return out
