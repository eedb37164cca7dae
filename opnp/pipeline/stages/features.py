"""Features: the backbone runs over every split and proxy family once, shard by shard."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from opnp.backbones import backbone, encoding, heads, networks, shards
from opnp.backbones.shards import Encoded, Shard
from opnp.data import decoding, imagesets, proxies
from opnp.errors import InputError
from opnp.pipeline.code import code_digest
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.pipeline.results.data import check_preprocessing
from opnp.pipeline.results.features import expected
from opnp.pipeline.results.images import open_images
from opnp.runtime import devices
from opnp.runtime.files import remove_others
from opnp.runtime.progress import track
from opnp.workspace import Workspace


def run(workspace: Workspace, parameters: Parameters) -> None:
    """Compute the penultimate features of every split and of the proxy outliers."""
    planned = plan(workspace, parameters)
    for shard in track(planned, "features (shards)", len(planned)):
        compute(workspace, parameters, shard)
    finish(workspace, planned)


def plan(workspace: Workspace, parameters: Parameters) -> list[Shard]:
    """The shards to compute, in order.

    Raises:
        InputError: the backbone is of other classes than the data, or needs other images.
    """
    run, size = Run(workspace, parameters), parameters.features.shard_size
    manifest, stated = run.manifest, run.backbone_stated
    check_preprocessing(parameters, stated.preprocessing)
    if stated.classes != manifest.classes:
        raise InputError(
            f"The {len(stated.classes)} classes of the backbone are not the "
            f"{len(manifest.classes)} classes of the data.",
            "stage:train",
        )
    counts = {name: entry.count for name, entry in manifest.sets.items()}
    validation = counts["validation"]
    families = dict.fromkeys((*parameters.search.proxies, *parameters.search.reported))
    counts |= {f"proxies/{family}": validation for family in families}
    return [shard for split, count in counts.items() for shard in shards.divide(split, count, size)]


def needed(workspace: Workspace, shard: Shard) -> list[Path]:
    """The files that a worker needs in its workspace to compute a shard, besides the images."""
    return [workspace.manifest, workspace.backbone]


def made(workspace: Workspace, shard: Shard) -> Path:
    """The file of a shard."""
    return shard.path(workspace.features)


def origin(workspace: Workspace, parameters: Parameters, shard: Shard) -> dict[str, str]:
    """What a shard is made from on this worker's device, and which rows it holds."""
    return shards.described(shard, made_from(Run(workspace, parameters), shard))


def made_from(run: Run, shard: Shard) -> dict[str, str]:
    """What a shard is made from on this worker's device, besides its rows."""
    return {
        **expected(run, shard.split),
        "device": devices.device().type,
        "code": code_digest(backbone, heads, networks, imagesets, decoding, shards, proxies),
    }


def compute(workspace: Workspace, parameters: Parameters, shard: Shard) -> bool:
    """Compute one shard on this worker's device.

    Returns:
        False if the shard was there already, whole.
    """
    run, settings = Run(workspace, parameters), parameters.features
    path, source = made(workspace, shard), made_from(run, shard)

    def work() -> Encoded:
        device = devices.device()
        encoder = encoder_on(run, device)
        images, labels = open_images(run, shard.split, shard.start, shard.stop)
        starts = range(shard.start, shard.stop, settings.batch_size)
        rows = [range(at, min(at + settings.batch_size, shard.stop)) for at in starts]
        with devices.deterministic(threads=1):
            batches = ahead(images, rows, decoders(parameters, device))
            return Encoded(encoding.encode(encoder, batches, device, settings.precision), labels)

    return shards.write_once(path, shard, source, work, settings.dtype)


def finish(workspace: Workspace, planned: Sequence[Shard]) -> None:
    """Remove shards that are not in the plan."""
    remove_others(workspace.features, {made(workspace, shard) for shard in planned})
    for optional in ("outliers", "proxies"):  # DVC expects each of its outputs
        workspace.shards(optional).mkdir(exist_ok=True)


def encoder_on(run: Run, device: torch.device) -> nn.Module:
    """The encoder of the backbone on a device, compiled where the parameters say so."""
    encoder = run.backbone_on(device).classifier.encoder
    return compiled(encoder) if run.parameters.features.compile else encoder


@lru_cache(maxsize=16)
def compiled(encoder: nn.Module) -> nn.Module:
    """An encoder, compiled once in each process."""
    return cast(nn.Module, torch.compile(encoder))


def ahead(
    images: Callable[[range], Tensor], rows: Iterable[range], threads: int
) -> Iterator[Tensor]:
    """The images of each range of rows; threads prepare the next ones while one is used."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Tensor]] = deque()
        for each in rows:
            waiting.append(pool.submit(images, each))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def decoders(parameters: Parameters, device: torch.device) -> int:
    """How many threads decode images for this worker: beside a GPU, its share of the cores."""
    if parameters.engine.decoders is not None:
        return parameters.engine.decoders
    if device.type == "cpu":
        return 1  # there is a worker for each core
    return max(1, (os.cpu_count() or 1) // torch.cuda.device_count())
