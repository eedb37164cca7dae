"""The sets of images and backbones of the suite. Each gives its features, from a cache if it can.

``digits-S`` and ``fashion-BACKBONE-S`` and ``cifar10-trained`` train a small network with the
stages of the pipeline, S being the seed; ``cifar10-resnet20`` and ``imagenet`` take backbones that
others have trained. Every split is random.
"""

from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import cifar10
from benchmarks.backbones import RECIPES
from benchmarks.suite import features
from benchmarks.suite.features import Features
from opnp.backbones.backbone import from_spec
from opnp.data import images, proxies
from opnp.data.images import Images
from opnp.data.preprocessing import Preprocessing
from opnp.data.sources import open_ood
from opnp.pipeline import parameters, stages
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.workspace import Workspace

__all__ = ["SETS", "features_of"]

SEED = 0
OOD = 5000  # largest number of images of an OOD set
IMAGENET_OOD = ("photo-patches", "letters", "noise")


def features_of(name: str, data: Path, cache: Path) -> Features:
    """The features of a set.

    Args:
        name: a key of `SETS`.
        data: folder laid out as the README of the benchmarks says.
        cache: folder where features are kept; a set that is there is not encoded again.
    """
    path = cache / f"{name}.safetensors"
    if not path.is_file():
        features.write(path, SETS[name](data, cache / name))
    return features.read(path)


def trained(values: dict[str, Any], folder: Path) -> Features:
    """Train a small network with the stages of the pipeline, and take its features."""
    values["search"] = {**values.get("search", {}), "proxies": list(proxies.FAMILIES)}
    chosen = Parameters.model_validate(values)
    folder.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(folder)
    for stage in ("fetch", "train", "features"):
        getattr(stages, stage).run(workspace, chosen)
    run = Run(workspace, chosen)
    train, validation, test = (run.features(split) for split in ("train", "validation", "test"))
    return Features(
        run.backbone.classifier.head,
        train,
        validation,
        test,
        {name: run.features(f"proxies/{name}")[0] for name in proxies.FAMILIES},
        {name: run.features(f"ood/{name}")[0] for name in run.manifest.ood},
    )


def digits(seed: int, _: Path, folder: Path) -> Features:
    """Scanned digits: 7 of 10 classes are known."""
    values = parameters.load(Path("params.yaml")).model_dump()
    values["seed"] = values["data"]["seed"] = seed
    return trained(values, folder)


def fashion(backbone: str, seed: int, data: Path, folder: Path) -> Features:
    """Fashion-MNIST against MNIST, letters, patches of photographs, noise and textures."""
    values = parameters.load(Path("presets/fashion-mnist.yaml")).model_dump()
    values["seed"] = values["data"]["seed"] = seed
    values["data"]["near"] |= {"mnist": str(cifar10.mnist(data, folder))}
    values["data"]["far"] |= {"textures": str(data / "textures-96px.parquet")}
    values["train"] |= {"backbone": backbone, "threads": 1, **RECIPES[backbone]}
    return trained(values, folder)


def cifar10_ood(data: Path, folder: Path) -> dict[str, Iterator[Image.Image]]:
    """The OOD sets of CIFAR-10, brought to its size and its compression."""
    sources = {
        name: cifar10.mnist(data, folder) if source == "mnist" else data / source
        for name, source in cifar10.OOD.items()
    }
    return {
        name: (Image.open(BytesIO(cifar10.jpeg(image))) for image in outside(str(source), 32))
        for name, source in sources.items()
    }


def outside(spec: str, size: int) -> Iterator[Image.Image]:
    return (image for image, _ in islice(open_ood(spec, size=size, seed=SEED), OOD))


def drawn(images: Images, *counts: int) -> list[Images]:
    """Parts of some images that have none in common, drawn at random."""
    order = np.random.default_rng(SEED).permutation(len(images))
    stops = np.cumsum(counts)
    return [images.select(rows.tolist()) for rows in np.split(order[: stops[-1]], stops[:-1])]


def cifar10_resnet20(data: Path, folder: Path) -> Features:
    """CIFAR-10 with a published ResNet-20, which has seen all training images."""
    preprocessing = Preprocessing(32, "RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    train = images.find(data / "cifar10-train.parquet", part="train")
    backbone = from_spec(
        "benchmarks.suite.models:resnet20",
        weights=data / "cifar10-resnet20.safetensors",
        preprocessing=preprocessing,
        classes=train.classes,
    )
    validation, test = drawn(images.find(data / "cifar10-test.parquet"), 2000, 8000)
    [train] = drawn(train, 25000)
    ood = cifar10_ood(data, folder)
    return features.of_backbone(backbone, train, validation, test, ood, SEED)


def imagenet(data: Path, _: Path) -> Features:
    """ImageNet-1k with a published EfficientNet-Lite0; textures, photographs, letters and noise."""
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    train, validation, test = (
        images.find(data / "imagenet" / f"{part}.parquet")
        for part in ("train", "validation", "test")
    )
    backbone = from_spec(
        "benchmarks.suite.models:efficientnet_lite0",
        preprocessing=Preprocessing(224, "RGB", mean, std, resize=256, interpolation="bicubic"),
        classes=train.classes,
    )
    sources = {"textures": str(data / "textures-256px.parquet")}
    sources |= {name: name for name in IMAGENET_OOD}
    ood = {name: islice(outside(spec, 224), 600) for name, spec in sources.items()}
    return features.of_backbone(backbone, train, validation, test, ood, SEED)


SETS: dict[str, Callable[[Path, Path], Features]] = {
    **{f"digits-{seed}": partial(digits, seed) for seed in range(5)},
    "cifar10-resnet20": cifar10_resnet20,
    "imagenet": imagenet,
    **{
        f"fashion-{backbone}-{seed}": partial(fashion, backbone, seed)
        for backbone in RECIPES
        for seed in range(3)
    },
}
