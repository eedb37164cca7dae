"""Features: the backbone runs over every split and proxy family once, shard by shard."""

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from opnp import workspace
from opnp.backbones import backbone as backbones
from opnp.backbones import encoding, heads, networks, shards
from opnp.backbones.backbone import Classifier, load_backbone
from opnp.backbones.shards import Shard
from opnp.data import decoding, imagesets, proxies
from opnp.data.imagesets import data_file
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.stages import fetch
from opnp.runtime import devices
from opnp.runtime.files import digest, remove_others
from opnp.runtime.progress import track
from opnp.runtime.storage import RemoteFile, Storage


def run(parameters: Parameters) -> None:
    """Compute the penultimate features of every split and of the proxy outliers."""
    planned = plan(parameters)
    for shard in track(planned, "features (shards)", len(planned)):
        compute(parameters, shard)
    finish(planned)


def plan(parameters: Parameters) -> list[Shard]:
    """The shards to compute, in order."""
    manifest, size = fetch.manifest_of(parameters), parameters.features.shard_size
    backbone = load_backbone(workspace.BACKBONE, parameters.train.backbone)
    classes = backbone.classes
    fetch.check_images(parameters, backbone.preprocessing)
    if classes != manifest.classes:
        raise InputError(
            f"The backbone has {len(classes)} classes and the data {len(manifest.classes)}, or "
            "others.",
            "stage:train",
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
    settings = parameters.features
    encoder = encoder_on(origin["backbone"], device, parameters.train.backbone, settings.compile)
    images, labels = open_images(parameters, shard.split, shard.start, shard.stop)
    starts = range(shard.start, shard.stop, settings.batch_size)
    rows = [range(at, min(at + settings.batch_size, shard.stop)) for at in starts]
    with devices.deterministic(threads=1):
        batches = ahead(images, rows, decoders(parameters, device))
        encoded = encoding.encode(encoder, batches, device, settings.precision)
    shards.write_shard(shard, encoded, labels, origin, settings.dtype)
    return True


def origin_of(parameters: Parameters, shard: Shard) -> dict[str, str]:
    """What a shard is made from on this worker's device, besides its rows."""
    return {
        **expected_metadata(parameters, shard.split),
        "device": devices.device().type,
        "code": code_digest(backbones, heads, networks, imagesets, decoding, shards, proxies),
    }


def images_of(split: str, sha256: str, storage: str | None) -> Path | RemoteFile:
    """Where the images of a split are read: in `data/`, else in the storage at a URL."""
    path = data_file(split)
    return path if storage is None or path.is_file() else Storage(storage).open(sha256)


def open_images(
    parameters: Parameters, split: str, start: int, stop: int
) -> tuple[Callable[[range], Tensor], NDArray[np.int64]]:
    """Rows ``start`` to ``stop`` of a split.

    Returns:
        A function that gives the normalized images (N, C, H, W) of some of these rows, and the
        labels (N,) of all of them.
    """
    expected, storage = expected_metadata(parameters, split), parameters.engine.storage
    device, spec = devices.device(), parameters.train.backbone
    _, preprocessing = backbone_on(expected["backbone"], device, spec)
    if split.startswith("proxies/"):
        with one_at_a_time:
            validation = validation_images(expected["images"], preprocessing, storage)

        def made(rows: range) -> Tensor:
            family = split.removeprefix("proxies/")
            images = proxies.make(family, validation, rows, parameters.seed)
            return preprocessing.normalize(torch.from_numpy(images))

        return made, np.full(stop - start, -1, np.int64)
    found = imagesets.read_encoded(images_of(split, expected["images"], storage), start, stop)

    def decoded(rows: range) -> Tensor:
        pixels = found.decode(rows, preprocessing.mode, preprocessing.size)
        return preprocessing.normalize(imagesets.unit(pixels))

    return decoded, found.labels


def load_images(parameters: Parameters, split: str, stop: int) -> Tensor:
    """The first ``stop`` images of a split, normalized, (N, C, H, W)."""
    images, _ = open_images(parameters, split, 0, stop)
    return images(range(stop))


def ahead(
    images: Callable[[range], Tensor], rows: Iterable[range], threads: int
) -> Iterator[Tensor]:
    """The images of each range of rows, of which threads prepare as many while one is used."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Tensor]] = deque()
        for each in rows:
            waiting.append(pool.submit(images, each))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def decoders(parameters: Parameters, device: torch.device) -> int:
    """Threads that decode images for this worker: its share of the cores where it has a GPU."""
    if parameters.engine.decoders is not None:
        return parameters.engine.decoders
    if device.type == "cpu":
        return 1  # there is a worker for each core
    return max(1, (os.cpu_count() or 1) // torch.cuda.device_count())


def expected_metadata(parameters: Parameters, split: str) -> dict[str, str]:
    """What the shards of a split must say of themselves, wherever they are read."""
    proxy, backbone = split.startswith("proxies/"), digest(workspace.BACKBONE)
    _, preprocessing = backbone_on(backbone, devices.device(), parameters.train.backbone)
    return {
        "backbone": backbone,
        "images": fetch.manifest_of(parameters).sets["validation" if proxy else split].sha256,
        "dtype": parameters.features.dtype,
        "precision": parameters.features.precision,
        "compiled": str(parameters.features.compile),
        **({"seed": str(parameters.seed)} if proxy else {}),
        "preprocessing": json.dumps(preprocessing.as_json()),
    }


def code_digest(*modules: ModuleType) -> str:
    """SHA-256 over the sources of modules: what was made by other code is made again."""
    sha = hashlib.sha256()
    for module in modules:
        sha.update(Path(str(module.__file__)).read_bytes())
    return sha.hexdigest()


def finish(planned: list[Shard]) -> None:
    """Remove shards that are not in the plan."""
    remove_others(workspace.FEATURES, {shard.path for shard in planned})
    for optional in ("outliers", "proxies"):  # DVC wants each of its outputs
        (workspace.FEATURES / optional).mkdir(exist_ok=True)


@lru_cache(maxsize=16)
def backbone_on(sha256: str, device: torch.device, spec: str) -> tuple[Classifier, Preprocessing]:
    """The backbone on a device, loaded once a process as long as its file stays the same."""
    backbone = load_backbone(workspace.BACKBONE, spec)
    if device.type == "cuda":  # the faster order for its convolutions
        backbone.classifier.to(memory_format=torch.channels_last)
    return backbone.classifier.to(device), backbone.preprocessing


@lru_cache(maxsize=16)
def encoder_on(sha256: str, device: torch.device, spec: str, compiled: bool) -> nn.Module:
    """The backbone's encoder on a device, compiled once a process if wanted."""
    model, _ = backbone_on(sha256, device, spec)
    return cast(nn.Module, torch.compile(model.encoder)) if compiled else model.encoder


one_at_a_time = threading.Lock()  # tasks that start together must not all decode all images


@lru_cache(maxsize=1)
def validation_images(
    sha256: str, preprocessing: Preprocessing, storage: str | None
) -> np.ndarray[Any, Any]:
    """All validation images in [0, 1], (N, C, H, W), of which proxies are made."""
    file = images_of("validation", sha256, storage)
    pixels, _ = imagesets.read(file, preprocessing.mode, preprocessing.size)
    return imagesets.unit(pixels).numpy()


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
    """Features of each proxy family and each real outlier set, by name; see `load`."""
    splits = outlier_splits(parameters)
    loaded = load(parameters, *splits.values())
    return {name: features for name, (features, _) in zip(splits, loaded, strict=True)}
