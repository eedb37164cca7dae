"""Penultimate features, computed once and kept: uncompressed Arrow IPC shards of a fixed size.

A shard is the unit of work, of retry and of resume. Its metadata state what it was made from
(backbone, preprocessing, images, rows, dtype), name the images that could not be read, and hold a
checksum of its columns, so that a damaged shard, or one made from something else, is recognized
without trusting its name.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from opnp.errors import InputError, first_line
from opnp.runtime.files import atomic

__all__ = [
    "Encoded",
    "Shard",
    "Stored",
    "described",
    "divide",
    "is_whole",
    "load",
    "read_metadata",
    "read_shard",
    "shard_paths",
    "write_once",
    "write_shard",
]

logger = logging.getLogger(__name__)

UNREADABLE = "unreadable"  # in the metadata, where images were left out


@dataclass(frozen=True)
class Shard:
    """Rows ``start`` to ``stop`` of the split ``split``.

    Attributes:
        split: ``train``, ``validation``, ``test``, ``ood/NAME``, ``outliers/NAME`` or
            ``proxies/NAME``.
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

    def path(self, folder: Path) -> Path:
        """The file of the shard in the folder of all features."""
        return folder / self.split / f"{self.index:05d}.arrow"


@dataclass(frozen=True)
class Encoded:
    """The features of a shard's images.

    Attributes:
        features: float32 (n, L).
        labels: int64 (n,); −1 for OOD images, proxies, and images without a label.
        rows: of the split, (n,); without them all rows of the shard.
        unreadable: the images that could not be read, each with the reason.
    """

    features: Tensor
    labels: NDArray[np.int64]
    rows: Sequence[int] | None = None
    unreadable: Sequence[str] = field(default=())


class Stored(NamedTuple):
    """A shard that was read.

    Attributes:
        features: (n, L), in the dtype they are stored in.
        labels: int64 (n,).
        metadata: what the shard was made from, and which rows of which split it stands for.
        rows: the rows of the split whose images could be read, int64 (n,).
        unreadable: the images that could not be read, each with the reason.
    """

    features: Tensor
    labels: NDArray[np.int64]
    metadata: dict[str, str]
    rows: NDArray[np.int64]
    unreadable: list[str]


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


def write_once(
    path: Path,
    shard: Shard,
    origin: dict[str, str],
    work: Callable[[], Encoded],
    dtype: str = "float32",
) -> bool:
    """Write what ``work`` returns, unless the shard is there, whole and made from ``origin``.

    Returns:
        False if the shard was there.

    Raises:
        InputError: as `write_shard`.
    """
    if is_whole(path, shard, origin):
        return False
    write_shard(path, shard, work(), origin, dtype)
    return True


def write_shard(
    path: Path, shard: Shard, encoded: Encoded, origin: dict[str, str], dtype: str
) -> None:
    """Write one shard atomically.

    Args:
        path: the file.
        shard: which rows of which split it stands for.
        encoded: their features.
        origin: what the features were made from.
        dtype: ``float32`` or ``float16``.

    Raises:
        InputError: a feature is NaN or infinite, or exceeds the range of float16.
    """
    labels, values = encoded.labels, encoded.features.numpy().astype(dtype)
    given = range(shard.start, shard.stop) if encoded.rows is None else encoded.rows
    rows = np.array(given, dtype=np.int64)
    if not np.isfinite(values).all():
        row = int(rows[~np.isfinite(values).all(axis=1)][0])
        raise InputError(
            f"The features of {shard.split} hold NaN or infinite values as {dtype} (first in row "
            f"{row}): check the backbone and the images"
            f"{', or store float32' * (dtype == 'float16')}."
        )
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    lost = {UNREADABLE: json.dumps(list(encoded.unreadable))} if encoded.unreadable else {}
    table = pa.table(
        {"features": column, "label": pa.array(labels), "index": pa.array(rows)}
    ).replace_schema_metadata(
        {**described(shard, origin), **lost, "checksum": checksum(values, labels, rows)}
    )
    with atomic(path) as temporary, pa.ipc.new_file(temporary, table.schema) as writer:
        writer.write_table(table)


def described(shard: Shard, origin: dict[str, str]) -> dict[str, str]:
    """What a shard says of itself: what it is made from, and which rows it holds of which split."""
    rows = f"{shard.start}-{shard.stop}"
    return {**origin, "split": shard.split, "rows": rows, "count": str(shard.count)}


def read_shard(path: Path) -> Stored:
    """Read one shard and verify its checksum.

    Raises:
        InputError: the file is missing, truncated, altered, or no shard.
    """
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
        unreadable = json.loads(found.pop(UNREADABLE, "[]"))
    except FileNotFoundError:
        raise InputError(f"Shard {path} is missing.") from None
    except (OSError, pa.ArrowException, KeyError, AttributeError, ValueError) as error:
        raise InputError(f"Shard {path} is damaged ({first_line(error)}).") from None
    if damaged:
        raise InputError(f"Shard {path} is damaged (its checksum differs).")
    return Stored(torch.from_numpy(values.copy()), labels, found, rows, unreadable)


def read_metadata(path: Path) -> dict[str, str]:
    """What a shard says of itself; its contents are not verified.

    Raises:
        InputError: the file is missing, truncated, or no shard.
    """
    try:
        with pa.memory_map(str(path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata
        return {key.decode(): value.decode() for key, value in metadata.items()}
    except FileNotFoundError:
        raise InputError(f"Shard {path} is missing.") from None
    except (OSError, pa.ArrowException, AttributeError, ValueError) as error:
        raise InputError(f"Shard {path} is damaged ({first_line(error)}).") from None


def is_whole(path: Path, shard: Shard, origin: dict[str, str]) -> bool:
    """Whether the shard is there, undamaged, and made from exactly ``origin``."""
    if not path.exists():
        return False
    try:
        return read_shard(path).metadata == described(shard, origin)
    except InputError:
        logger.warning("%s is damaged and is made again", path)
        return False


def shard_paths(folder: Path, expected: dict[str, str]) -> list[Path]:
    """The shards of a split in order, after a check of what they say of themselves.

    Only the metadata are read here: `read_shard` verifies the contents.

    Args:
        folder: of the split's shards.
        expected: the metadata that each shard must have, such as ``backbone``.

    Raises:
        InputError: the folder holds no shards, a shard is damaged or made from something else, or
            rows are missing.
    """
    paths = sorted(folder.glob("*.arrow"))
    if not paths:
        raise InputError(f"{folder} holds no shards.")
    stop = count = 0
    for path in paths:
        found = read_metadata(path)
        try:
            start, end = map(int, found["rows"].split("-"))
            count = int(found["count"])
        except (KeyError, ValueError) as error:
            raise InputError(f"Shard {path} is damaged ({first_line(error)}).") from None
        for key, value in expected.items():
            if found.get(key) != value:
                raise InputError(f"Shard {path} was made with another {key}.")
        if start != stop:
            raise InputError(f"Rows {stop} to {start} before shard {path} are missing.")
        stop = end
    if stop != count:
        raise InputError(f"{folder} holds {stop} of {count} rows.")
    return paths


def load(folder: Path, expected: dict[str, str]) -> tuple[Tensor, Tensor]:
    """All features of a split.

    Args:
        folder: of the split's shards.
        expected: the metadata that each shard must have, such as ``backbone``.

    Returns:
        Features, float32 (N, L), and labels, int64 (N,).

    Raises:
        InputError: shards are missing, damaged or made from something else, or rows are missing.
    """
    parts, labels = [], []
    for path in shard_paths(folder, expected):
        stored = read_shard(path)
        parts.append(stored.features.float())
        labels.append(torch.from_numpy(stored.labels.copy()))
    return torch.cat(parts), torch.cat(labels)
