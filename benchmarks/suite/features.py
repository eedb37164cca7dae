"""The features of a set of images, which is all that the suite judges: computed once, then kept."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from opnp.backbones.backbone import Backbone
from opnp.backbones.encoding import encode
from opnp.data import proxies
from opnp.data.images import Images
from opnp.data.imagesets import unit
from opnp.runtime import tensors
from opnp.runtime.progress import track

__all__ = ["Features", "Labelled", "of_backbone", "read", "write"]

BATCH = 16
CPU = torch.device("cpu")

Labelled = tuple[Tensor, Tensor]
"""Features (N, L) and labels (N,)."""


@dataclass(frozen=True)
class Features:
    """Penultimate features, float32, of everything that a comparison needs.

    Attributes:
        head: the last layer, (K, L).
        train: of the training images.
        validation: of the ID validation images; masks and detectors are chosen on them.
        test: of the ID test images.
        proxies: (N, L) of the proxy outliers of each family, made from validation images.
        ood: (N, L) of each OOD test set.
    """

    head: nn.Linear
    train: Labelled
    validation: Labelled
    test: Labelled
    proxies: dict[str, Tensor]
    ood: dict[str, Tensor]


def write(path: Path, features: Features) -> None:
    """Write features to one safetensors file, atomically."""
    splits = {"train": features.train, "validation": features.validation, "test": features.test}
    state = {
        "head.weight": features.head.weight.detach(),
        "head.bias": features.head.bias.detach(),
        **{f"{name}.features": split[0].contiguous() for name, split in splits.items()},
        **{f"{name}.labels": split[1] for name, split in splits.items()},
        **{f"proxies.{name}": h.contiguous() for name, h in features.proxies.items()},
        **{f"ood.{name}": h.contiguous() for name, h in features.ood.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors.save(path, state, {})


def read(path: Path) -> Features:
    """Read what `write` wrote."""
    state, _ = tensors.load(path, "")
    classes, width = state["head.weight"].shape
    head = nn.Linear(width, classes).requires_grad_(False)
    head.weight.copy_(state["head.weight"])
    head.bias.copy_(state["head.bias"])

    def under(prefix: str) -> dict[str, Tensor]:
        found = (name for name in state if name.startswith(prefix))
        return {name.removeprefix(prefix): state[name] for name in found}

    train, validation, test = (
        (state[f"{name}.features"], state[f"{name}.labels"])
        for name in ("train", "validation", "test")
    )
    return Features(head, train, validation, test, under("proxies."), under("ood."))


def of_backbone(
    backbone: Backbone,
    train: Images,
    validation: Images,
    test: Images,
    ood: Mapping[str, Iterable[Image.Image]],
    seed: int,
) -> Features:
    """Encode everything with a trained backbone.

    Args:
        backbone: with its preprocessing.
        train, validation, test: labelled images.
        ood: images of each OOD set.
        seed: of the proxies.
    """
    encoder, preprocessing = backbone.classifier.encoder, backbone.preprocessing

    def labelled(name: str, images: Images) -> Labelled:
        labels = images.labels(backbone.classes)
        assert labels is not None
        rows = range(len(images))
        batches = images.batches(preprocessing, rows, BATCH)
        counted = track(batches, f"features of {name} (batches)", -(-len(rows) // BATCH))
        pixels = (unit(np.stack(batch.pixels)) for batch in counted)
        h = encode(encoder, map(preprocessing.normalize, pixels), CPU)
        return h, torch.from_numpy(labels)

    def outside(images: Iterable[Image.Image]) -> Tensor:
        batches = (unit(np.stack(part)) for part in chunks(map(preprocessing.pixels, images)))
        return encode(encoder, map(preprocessing.normalize, batches), CPU)

    kept = [
        pixels
        for batch in validation.batches(preprocessing, range(len(validation)), BATCH)
        for pixels in batch.pixels
    ]
    inside = unit(np.stack(kept)).numpy()

    def proxy(family: str) -> Tensor:
        rows = range(len(inside))
        made = (proxies.make(family, inside, rows[at : at + BATCH], seed) for at in rows[::BATCH])
        return encode(encoder, map(preprocessing.normalize, map(torch.from_numpy, made)), CPU)

    return Features(
        backbone.classifier.head,
        labelled("train", train),
        labelled("validation", validation),
        labelled("test", test),
        {name: proxy(name) for name in track(proxies.FAMILIES, "proxies", len(proxies.FAMILIES))},
        {name: outside(images) for name, images in track(ood.items(), "OOD sets", len(ood))},
    )


def chunks(arrays: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    iterator = iter(arrays)
    while part := list(islice(iterator, BATCH)):
        yield part
