"""Penultimate features, computed once and kept: uncompressed Arrow IPC shards of a fixed size.

A shard is the unit of work, of retry and of resume. Its metadata say what it was made from
(backbone, preprocessing, images, rows, dtype) and hold a checksum of its columns, so that a damaged
or a foreign shard is told from a whole one without trusting its name.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from opnp.errors import InputError
from opnp.runtime.files import atomic
from opnp.workspace import FEATURES

__all__ = [
    "Shard",
    "described",
    "divide",
    "is_whole",
    "load",
    "read_shard",
    "shard_paths",
    "write_shard",
]


@dataclass(frozen=True)
class Shard:
    """Rows ``start`` to ``stop`` of the split ``split``.

    Attributes:
        split: ``train``, ``validation``, ``test``, ``ood/NAME`` or ``proxies/NAME``.
        index: position among the split's shards.
        start: first row.
        stop: row after the last.
        count: rows of the whole split.
    """

    split: str
    index: int
    start: int
    stop: int
    count: int

    @property
    def path(self) -> Path:
        return FEATURES / self.split / f"{self.index:05d}.arrow"


def divide(split: str, count: int, size: int) -> list[Shard]:
    """The shards of ``size`` rows of a split with ``count``; the last may be smaller."""
    starts = range(0, count, size)
    return [Shard(split, i, at, min(at + size, count), count) for i, at in enumerate(starts)]


def checksum(features: NDArray[Any], labels: NDArray[np.int64], rows: NDArray[np.int64]) -> str:
    sha = hashlib.sha256()
    for column in (features, labels, rows):
        sha.update(f"{column.dtype} {column.shape} ".encode())
        sha.update(np.ascontiguousarray(column).data)
    return sha.hexdigest()


def write_shard(
    shard: Shard,
    features: Tensor,
    labels: NDArray[np.int64],
    origin: dict[str, str],
    dtype: str,
) -> None:
    """Write one shard atomically.

    Args:
        shard: which rows these are.
        features: float32 (N, L).
        labels: int64 (N,); −1 for OOD and proxies.
        origin: what the features were made from.
        dtype: ``float32`` or ``float16``.

    Raises:
        InputError: a feature is NaN or infinite, or exceeds the range of float16.
    """
    values = features.numpy().astype(dtype)
    rows = np.arange(shard.start, shard.stop, dtype=np.int64)
    if not np.isfinite(values).all():
        row = int(rows[~np.isfinite(values).all(axis=1)][0])
        raise InputError(
            f"The features of {shard.split} hold NaN or infinite values (first in row {row}): "
            f"check the backbone and the images, or set features.dtype to float32 (it is {dtype})."
        )
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    table = pa.table(
        {"features": column, "label": pa.array(labels), "index": pa.array(rows)}
    ).replace_schema_metadata(
        {**described(shard, origin), "checksum": checksum(values, labels, rows)}
    )
    with atomic(shard.path) as temporary, pa.ipc.new_file(temporary, table.schema) as writer:
        writer.write_table(table)


def described(shard: Shard, origin: dict[str, str]) -> dict[str, str]:
    """What a shard says of itself: what it is made from, and which rows it holds of which split."""
    rows = f"{shard.start}-{shard.stop}"
    return {**origin, "split": shard.split, "rows": rows, "count": str(shard.count)}


def read_shard(path: Path) -> tuple[Tensor, NDArray[np.int64], dict[str, str]]:
    """Read one shard and verify its checksum.

    Returns:
        Features (N, L) as stored, labels (N,), and the metadata.

    Raises:
        InputError: the file is missing, truncated, altered, or no shard.
    """
    again = "stage:features"
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        found = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        list_column = table.column("features").combine_chunks()
        width = list_column.type.list_size
        values = list_column.flatten().to_numpy().reshape(-1, width)
        labels = table.column("label").to_numpy()
        rows = table.column("index").to_numpy()
        damaged = found.pop("checksum") != checksum(values, labels, rows)
    except FileNotFoundError:
        raise InputError(f"Shard {path} is missing.", again) from None
    except (OSError, pa.ArrowException, KeyError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"Shard {path} is damaged ({reason}).", again) from None
    if damaged:
        raise InputError(f"Shard {path} is damaged (its checksum differs).", again)
    return torch.from_numpy(values.copy()), labels, found


def is_whole(shard: Shard, origin: dict[str, str]) -> bool:
    """Whether the shard is there, undamaged and made from exactly ``origin``; one is named if it is
    damaged."""
    if not shard.path.exists():
        return False
    try:
        return read_shard(shard.path)[2] == described(shard, origin)
    except InputError:
        print(f"features: {shard.path} is damaged, and made again", flush=True)
        return False


def shard_paths(split: str, expected: dict[str, str]) -> list[Path]:
    """The shards of a split in order, after a look at what they say they are.

    Only the metadata are read here: a shard's contents are verified when `read_shard` reads them.

    Args:
        split: see `Shard`.
        expected: metadata each shard must have, such as ``backbone``.

    Raises:
        InputError: there are none, one is damaged or made from something else, or some are missing.
    """
    again = "stage:features"
    paths = sorted((FEATURES / split).glob("*.arrow"))
    if not paths:
        raise InputError(f"{FEATURES / split} holds no shards.", again)
    stop = count = 0
    for path in paths:
        try:
            with pa.memory_map(str(path)) as source:
                metadata = pa.ipc.open_file(source).schema.metadata
            found = {key.decode(): value.decode() for key, value in metadata.items()}
            start, end = map(int, found["rows"].split("-"))
            count = int(found["count"])
        except (OSError, pa.ArrowException, KeyError, AttributeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"Shard {path} is damaged ({reason}).", again) from None
        for key, value in expected.items():
            if found.get(key) != value:
                raise InputError(f"Shard {path} was made with another {key}.", again)
        if start != stop:
            raise InputError(f"Before shard {path} rows {stop} to {start} are missing.", again)
        stop = end
    if stop != count:
        raise InputError(f"{FEATURES / split} holds {stop} rows of {count}.", again)
    return paths


def load(split: str, expected: dict[str, str]) -> tuple[Tensor, Tensor]:
    """All features of a split.

    Args:
        split: see `Shard`.
        expected: metadata each shard must have, such as ``backbone``.

    Returns:
        Features, float32 (N, L), and labels, int64 (N,).

    Raises:
        InputError: shards are missing, damaged, made from something else, or not the whole split.
    """
    parts, labels = [], []
    for path in shard_paths(split, expected):
        features, label, _ = read_shard(path)
        parts.append(features.float())
        labels.append(torch.from_numpy(label.copy()))
    return torch.cat(parts), torch.cat(labels)
