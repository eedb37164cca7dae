"""What the examples start from: a small trained classifier, and images of four kinds it never saw.

In practice the classifier and the images are yours. This one knows scikit-learn's scanned digits 0
to 6. The digits 7, 8 and 9, letters, patches of photographs and noise stand for whatever may come
in production; only evaluations look at them.
"""

from collections import defaultdict
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from opnp.data import generated
from opnp.data.preprocessing import Preprocessing

__all__ = ["CLASSES", "OOD", "PREPROCESSING", "Network", "tensors", "trained", "write_images"]

CLASSES = ["zero", "one", "two", "three", "four", "five", "six"]
PARTS = ("train", "train", "validation", "test")  # of every four images of a class
OOD = ("unseen", "letters", "patches", "noise")
PREPROCESSING = Preprocessing(size=8, mode="L", mean=(0.3,), std=(0.4,))


class Network(nn.Module):
    """A classifier whose logits are a linear layer of 48 penultimate features."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 48),
            nn.ReLU(),
        )
        self.head = nn.Linear(48, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 7) of normalized images (N, 1, 8, 8)."""
        logits: Tensor = self.head(self.encoder(images))
        return logits


@cache
def pictures() -> dict[str, list[tuple[Image.Image, int]]]:
    """Images and their labels, −1 where there is none, of each set by name.

    Half of the known digits are ``train``, a quarter each ``validation`` and ``test``.
    """
    found, seen = defaultdict(list), [0] * 10
    for image, digit in generated.scanned_digits():
        known = digit < len(CLASSES)
        found[PARTS[seen[digit] % 4] if known else "unseen"].append((image, digit if known else -1))
        seen[digit] += 1
    rng = np.random.default_rng(0)
    found["letters"] = list(islice(generated.rendered_letters(8, rng), 400))
    found["patches"] = list(islice(generated.photo_patches(rng), 400))
    found["noise"] = list(islice(generated.noise(8, rng), 400))
    return dict(found)


def tensors(name: str) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], float32 (N, 1, 8, 8), and labels (N,), of one set."""
    images, labels = zip(*pictures()[name], strict=True)
    pixels = np.stack([PREPROCESSING.pixels(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, torch.tensor(labels)


def write_images(folder: Path) -> None:
    """Write every set as PNG files: ``SET/CLASS/NUMBER.png``, and ``SET/NUMBER.png`` for OOD."""
    for name, examples in pictures().items():
        for number, (image, label) in enumerate(examples):
            place = folder / name / CLASSES[label] if label >= 0 else folder / name
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number:03d}.png")


def trained() -> Network:
    """The network after two seconds of training on ``train``."""
    images, labels = tensors("train")
    x = PREPROCESSING.normalize(images)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network()
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(12):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(network(x[rows]), labels[rows]).backward()
                optimizer.step()
    return network.eval().requires_grad_(False)
