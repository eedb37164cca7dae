"""Features: the backbone runs over every split and proxy family once, shard by shard."""

import hashlib
import json
import threading
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opnp import artifacts, backbones, datasets, devices, heads, networks, proxies, sources
from opnp import features as shards
from opnp.datasets import data_file
from opnp.errors import InputError
from opnp.features import Shard
from opnp.files import digest, remove_others
from opnp.parameters import Parameters
from opnp.progress import track
from opnp.stages import fetch
from opnp.storage import RemoteFile, Storage


def run(parameters: Parameters) -> None:
    """Compute the penultimate features of every split and of the proxy outliers."""
    planned = plan(parameters)
    for shard in track(planned, "features (shards)", len(planned)):
        compute(parameters, shard)
    finish(planned)


def plan(parameters: Parameters) -> list[Shard]:
    """The shards to compute, in order."""
    manifest, size = fetch.manifest_of(parameters), parameters.features.shard_size
    backbone = backbones.load(artifacts.BACKBONE, parameters.train.backbone)
    classes = backbone.classes
    fetch.check_images(parameters, backbone.preprocessing)
    if classes != manifest.classes:
        raise InputError(
            f"The backbone has {len(classes)} classes and the data {len(manifest.classes)}, or "
            "others: run `python -m flows.train` again."
        )
    counts = {name: entry.count for name, entry in manifest.sets.items()}
    validation = counts["validation"]
    counts |= {f"proxies/{family}": validation for family in parameters.search.proxies}
    return [shard for split, count in counts.items() for shard in shards.divide(split, count, size)]


def compute(parameters: Parameters, shard: Shard) -> bool:
    """Compute one shard on this worker's device; False if it was there already, whole."""
    origin = origin_of(parameters, shard)
    if shards.is_whole(shard, origin):
        return False
    device = devices.device()
    model, _ = backbone_on(origin["backbone"], device, parameters.train.backbone)
    images, labels = load_images(parameters, shard.split, shard.start, shard.stop)
    batches = images.split(parameters.features.batch_size)
    with devices.deterministic(threads=1):
        encoded = shards.encode(model.encoder, batches, device)
    shards.write_shard(shard, encoded, labels, origin, parameters.features.dtype)
    return True


def origin_of(parameters: Parameters, shard: Shard) -> dict[str, str]:
    """What a shard is made from on this worker's device, besides its rows."""
    expected, device = expected_metadata(parameters, shard.split), devices.device()
    _, preprocessing = backbone_on(expected["backbone"], device, parameters.train.backbone)
    return {
        **expected,
        "preprocessing": json.dumps(preprocessing.as_json()),
        "device": device.type,
        "code": code_digest(backbones, heads, networks, datasets, shards, proxies, sources),
    }


def images_of(split: str, sha256: str, storage: str | None) -> Path | RemoteFile:
    """Where the images of a split are read: in `data/`, else in the storage at a URL."""
    path = data_file(split)
    return path if storage is None or path.is_file() else Storage(storage).open(sha256)


def load_images(
    parameters: Parameters, split: str, start: int, stop: int
) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Normalized images (N, C, H, W) and labels (N,) of some rows of a split."""
    expected, storage = expected_metadata(parameters, split), parameters.engine.storage
    cpu = torch.device("cpu")
    _, preprocessing = backbone_on(expected["backbone"], cpu, parameters.train.backbone)
    if split.startswith("proxies/"):
        rows = range(start, stop)
        with one_at_a_time:
            validation = validation_images(expected["images"], preprocessing, storage)
        made = proxies.make(split.removeprefix("proxies/"), validation, rows, parameters.seed)
        images, labels = torch.from_numpy(made), np.full(len(rows), -1, np.int64)
    else:
        file = images_of(split, expected["images"], storage)
        pixels, labels = datasets.read(file, preprocessing.mode, preprocessing.size, start, stop)
        images = datasets.unit(pixels)
    return preprocessing.normalize(images), labels


def expected_metadata(parameters: Parameters, split: str) -> dict[str, str]:
    """What the shards of a split must say of themselves, wherever they are read."""
    proxy = split.startswith("proxies/")
    return {
        "backbone": digest(artifacts.BACKBONE),
        "images": fetch.manifest_of(parameters).sets["validation" if proxy else split].sha256,
        "dtype": parameters.features.dtype,
        **({"seed": str(parameters.seed)} if proxy else {}),
    }


def code_digest(*modules: ModuleType) -> str:
    """SHA-256 over the sources of modules: what was made by other code is made again."""
    sha = hashlib.sha256()
    for module in modules:
        sha.update(Path(str(module.__file__)).read_bytes())
    return sha.hexdigest()


def finish(plan: list[Shard]) -> None:
    """Remove shards that are not in the plan."""
    remove_others(artifacts.FEATURES, {shard.path for shard in plan})
    for optional in ("outliers", "proxies"):  # DVC wants each of its outputs
        (artifacts.FEATURES / optional).mkdir(exist_ok=True)


@lru_cache(maxsize=16)
def backbone_on(
    sha256: str, device: torch.device, spec: str
) -> tuple[backbones.Classifier, backbones.Preprocessing]:
    """The backbone on a device, loaded once a process as long as its file stays the same."""
    backbone = backbones.load(artifacts.BACKBONE, spec)
    return backbone.classifier.to(device), backbone.preprocessing


one_at_a_time = threading.Lock()  # tasks that start together must not all decode all images


@lru_cache(maxsize=1)
def validation_images(
    sha256: str, preprocessing: backbones.Preprocessing, storage: str | None
) -> np.ndarray[Any, Any]:
    """All validation images in [0, 1], (N, C, H, W), of which proxies are made."""
    file = images_of("validation", sha256, storage)
    pixels, _ = datasets.read(file, preprocessing.mode, preprocessing.size)
    return datasets.unit(pixels).numpy()


def load(parameters: Parameters, *splits: str) -> list[tuple[Tensor, Tensor]]:
    """Features, float32 (N, L), and labels (N,) of each split.

    Raises:
        InputError: shards are missing, damaged, or made from something else than is here now.
    """
    return [shards.load(split, expected_metadata(parameters, split)) for split in splits]


def outlier_splits(parameters: Parameters) -> dict[str, str]:
    """What masks and hyperparameters are chosen on besides ID validation: splits by name."""
    settings = parameters.search
    splits = {family: f"proxies/{family}" for family in settings.proxies}
    return splits | {name: f"outliers/{name}" for name in settings.outliers}


def load_outliers(parameters: Parameters) -> dict[str, Tensor]:
    """Features of each proxy family and each real outlier set, by name; see `load_features`."""
    splits = outlier_splits(parameters)
    loaded = load(parameters, *splits.values())
    return {name: features for name, (features, _) in zip(splits, loaded, strict=True)}
