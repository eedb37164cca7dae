"""Parquet files of images in the Hugging Face layout."""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from opnp.data.decoding import decode
from opnp.data.parts import divided
from opnp.data.splits import Source, Split, state_of
from opnp.errors import InputError
from opnp.runtime.files import full_disk

__all__ = ["LABEL_COLUMNS", "class_names"]

LABEL_COLUMNS = ("label", "labels", "fine_label")


def class_names(path: Path) -> list[str]:
    """Names of the classes, in the order of their labels, from a Parquet file's schema.

    Raises:
        InputError: the file is missing, damaged or names no classes.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        label = next((name for name in LABEL_COLUMNS if name in features), LABEL_COLUMNS[0])
        return list(features[label]["names"])
    except FileNotFoundError:
        raise InputError(f"{path} is missing: fetch or replace it.") from None
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is damaged or names no classes ({reason}): fetch or replace it."
        ) from None


IMAGE_COLUMNS = ("image", "img")
SHARD = re.compile(r"(train|test|validation|val)(?:-(\d+)-of-(\d+).*)?\.parquet")


def parquet_files(folder: Path, part: str | None) -> dict[str, list[Path]]:
    """The Parquet files of a folder, or of `data` in it, by split.

    Raises:
        InputError: some of the files that a split is cut into are missing.
    """
    for place in (folder, folder / "data"):
        paths = sorted(place.glob("*.parquet"))
        shards: dict[str, list[tuple[Path, str | None]]] = {}
        for path in paths:
            if matched := SHARD.fullmatch(path.name):
                shards.setdefault(matched[1], []).append((path, matched[3]))
        for split, found in shards.items():
            for path, count in found:
                if len(found) != int(count or 1):
                    raise InputError(
                        f"{place} holds {len(found)} Parquet file(s) of the split {split} where "
                        f"{path.name} is one of {int(count or 1)}: fetch them again."
                    )
        if shards:
            files = {split: [path for path, _ in found] for split, found in shards.items()}
            return divided(files, part)
        if holding := [path for path in paths if column_names(path) & set(IMAGE_COLUMNS)]:
            return {"all": holding}  # a table of scores, say, may lie among images
    return {}


def open_parquet(files: dict[str, list[Path]], part: str | None) -> Source:
    """Images in Parquet files, which must agree on their classes if images must be labelled."""
    labelled = part is None
    paths = [path for split in files.values() for path in split]
    names = class_names if labelled else names_if_any
    classes = names(paths[0])
    others = [path for path in paths[1:] if names(path) != classes]
    if others and labelled:
        raise InputError(f"{others[0]} names other classes than {paths[0]}: replace one of them.")
    splits = {name: parquet_split(split, labelled) for name, split in files.items()}
    if not classes:  # then they are numbers, if there are no more of them than images
        labels = np.concatenate([split.labels for split in splits.values()])
        count = int(labels.max(initial=-1)) + 1
        classes = [str(label) for label in range(count)] if count <= len(labels) else []
    return Source([] if others else classes, splits)


def names_if_any(path: Path) -> list[str]:
    try:
        return class_names(path)
    except (TypeError, ValueError):  # a file that is damaged is told of when it is read
        return []


def parquet_split(paths: Sequence[Path], labelled: bool) -> Split:
    """Images of Parquet files, copied once, still encoded, into a temporary file.

    A row of a Parquet file cannot be read without a good part of the file. The copy takes as much
    of the disk (of TMPDIR) as the files, and no memory.
    """
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the images)
    states = [state_of(path) for path in paths]  # before they are read: what changes later is told
    ends, labels, starts = [0], [np.empty(0, np.int64)], [0]
    for path in paths:
        for encoded, y in parquet_rows(path, labelled):
            labels.append(y)
            for scalar in encoded:
                data = scalar.as_py() or b""
                spooled(spool, data)
                ends.append(ends[-1] + len(data))
        starts.append(len(ends) - 1)
    offsets, first = np.array(ends), np.array(starts)

    def file_of(row: int) -> int:
        return int(np.searchsorted(first, row, side="right")) - 1

    def name(row: int) -> str:
        return f"{paths[file_of(row)]}#{row - first[file_of(row)]}"

    def load(row: int) -> Image.Image:
        data = os.pread(spool.fileno(), int(offsets[row + 1] - offsets[row]), int(offsets[row]))
        return decode(data, name(row))

    spool.flush()
    return Split(np.concatenate(labels), load, name, lambda row: states[file_of(row)])


def spooled(spool: IO[bytes], data: bytes) -> None:
    """Add to a temporary file.

    Raises:
        InputError: the disk is full.
    """
    try:
        spool.write(data)
    except OSError as error:
        if reason := full_disk(error, Path(tempfile.gettempdir())):
            raise InputError(reason) from error
        raise


def parquet_rows(path: Path, labelled: bool) -> Iterator[tuple[pa.BinaryArray, NDArray[np.int64]]]:
    """Encoded images and labels of a Parquet file, some at a time; −1 where there are none."""
    try:
        # Buffered ahead, all that has been read would stay in memory.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            image = next((name for name in IMAGE_COLUMNS if name in names), IMAGE_COLUMNS[0])
            label = next((name for name in LABEL_COLUMNS if name in names), None)
            if labelled and label is None:
                raise KeyError(f"no column {LABEL_COLUMNS[0]}")
            if label and not (labelled or pa.types.is_integer(file.schema_arrow.field(label).type)):
                label = None
            columns = [f"{image}.bytes", *([label] if label else [])]
            for batch in file.iter_batches(256, columns=columns):
                encoded = pc.struct_field(batch.column(image), "bytes")
                labels = np.full(len(encoded), -1)
                if label:
                    labels = batch.column(label).cast(pa.int64()).fill_null(-1).to_numpy()
                yield encoded, labels
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is no whole Parquet file with a column image.bytes ({reason}): replace it."
        ) from None


def column_names(path: Path) -> set[str]:
    try:
        return set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is no whole Parquet file ({reason}): replace it.") from None
