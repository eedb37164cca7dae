"""Read Parquet files of images in the layout of Hugging Face's `datasets`."""

import hashlib
import json
import os
import re
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from opnp.data.decoding import MEMORY, decode, printable
from opnp.data.parts import by_split, divided, splits_named
from opnp.data.splits import Rows, Source, Split, state_of
from opnp.errors import InputError, first_line
from opnp.runtime.files import full_disk

__all__ = ["LABEL_COLUMNS", "class_names"]

LABEL_COLUMNS = ("label", "labels", "fine_label")


def class_names(path: Path) -> list[str]:
    """Read the names of the classes from a Parquet file's schema, in the order of labels.

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
        raise InputError(
            f"{path} is damaged or names no classes ({first_line(error)}): fetch or replace it."
        ) from None


IMAGE_COLUMNS = ("image", "img")
ROWS = 32  # that are read at once
SHARD = re.compile(r"(.*?)(?:-(\d+)-of-(\d+).*)?\.parquet")


def parquet_files(folder: Path, part: str | None) -> dict[str, list[Path]]:
    """The Parquet files of images in a folder, or in `data` in it, by split.

    A split is in files named like it, as ``train.parquet`` or ``train-00000-of-00002.parquet``, or
    in a folder named like it.

    Raises:
        InputError: some of the files that a split is cut into are missing, or some are named like
            splits and others are not.
    """
    for place in (folder, folder / "data"):
        if found := tables_in(place):
            return divided(splits_in(found, place), part, folder)
        inner = {each.name: each for each in place.glob("[!.]*/")}
        tables = {name: found for name, each in inner.items() if (found := tables_in(each))}
        if any(splits_named(tables).values()):
            names = by_split(tables, place, "folders")
            return divided({split: tables[name] for split, name in names.items()}, part, folder)
    return {}


def tables_in(folder: Path) -> list[Path]:
    """Parquet files in a folder that have a column of images; others may lie beside them."""
    paths = sorted(folder.glob("*.parquet"))
    return [path for path in paths if column_names(path) & set(IMAGE_COLUMNS)]


def splits_in(paths: Sequence[Path], place: Path) -> dict[str, list[Path]]:
    """Parquet files of images by split; all as ``all`` if none is named like a split."""
    shards: dict[str, list[tuple[Path, str | None]]] = {}
    for path in paths:
        if matched := SHARD.fullmatch(path.name):
            shards.setdefault(matched[1], []).append((path, matched[3]))
    for name, found in shards.items():
        for path, count in found:
            if count and len(found) != int(count):
                raise InputError(
                    f"{place} holds {len(found)} of the {int(count)} Parquet files of {name}, such "
                    f"as {path.name}: fetch them again."
                )
    numbered = {name for name, found in shards.items() if found[0][1]}
    if len(numbered) < 2 and not any(splits_named(shards).values()):
        return {"all": list(paths)}
    files = by_split(shards, place, "Parquet files")
    return {split: [path for path, _ in shards[name]] for split, name in files.items()}


def open_parquet(files: dict[str, list[Path]], part: str | None) -> Source:
    """Open Parquet files, which must agree on their classes if images must be labelled."""
    labelled = part is None
    paths = [path for split in files.values() for path in split]
    names = class_names if labelled else names_if_any
    classes = names(paths[0])
    others = [path for path in paths[1:] if names(path) != classes]
    if others and labelled:
        raise InputError(f"{others[0]} names other classes than {paths[0]}: replace one of them.")
    splits = {name: parquet_split(split, labelled) for name, split in files.items()}
    if not classes:  # then they are numbers, unless there are more of them than images
        labels = np.concatenate([split.labels for split in splits.values()])
        count = int(labels.max(initial=-1)) + 1
        classes = [str(label) for label in range(count)] if count <= len(labels) else []
    return Source([] if others else classes, splits)


def names_if_any(path: Path) -> list[str]:
    try:
        return class_names(path)
    except (TypeError, ValueError):  # a damaged file is reported when it is read
        return []


def parquet_split(paths: Sequence[Path], labelled: bool) -> Split:
    """Images of Parquet files, copied once, still encoded, into a temporary file."""
    encoded, labels = Encoded(paths), [np.empty(0, np.int64)]
    for path in paths:
        for images, y in parquet_rows(path, labelled):
            encoded.add(images)
            labels.append(y)
        encoded.close(path)
    return Split.of(encoded, np.concatenate(labels))


class Encoded(Rows):
    """Encoded images of Parquet files, in a temporary file.

    A row of a Parquet file cannot be read without a good part of the file. The copy takes as much
    of the disk (of TMPDIR) as the files, and no memory. Images are turned by their EXIF
    orientation, as Hugging Face's `datasets` turns them.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths: list[Path] = []
        self.spool = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the images)
        # Before they are read: what changes later is told.
        self.states = [state_of(path) for path in paths]
        self.ends = array("q", [0])  # of the images in the temporary file
        self.first = [0]  # row of each file, and one after the last

    def add(self, images: pa.BinaryArray) -> None:
        """Add rows of the file that is being read."""
        for scalar in images:
            data = scalar.as_py() or b""
            spooled(self.spool, data)
            self.ends.append(self.ends[-1] + len(data))

    def close(self, path: Path) -> None:
        """End the file that is being read."""
        self.spool.flush()
        self.paths.append(path)
        self.first.append(len(self))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def file_of(self, row: int) -> int:
        return bisect_right(self.first, row) - 1

    def name(self, row: int) -> str:
        file = self.file_of(row)
        return f"{printable(self.paths[file])}#{row - self.first[file]}"

    def bytes_of(self, row: int) -> bytes:
        size = self.size(row)
        if size > MEMORY:
            raise ValueError(f"it has {size} bytes, more than {MEMORY}")
        return os.pread(self.spool.fileno(), size, self.ends[row])

    def load(self, row: int) -> Image.Image:
        return decode(self.bytes_of(row), self.name(row), turn=True)

    def state(self, row: int) -> object:
        return self.states[self.file_of(row)]

    def size(self, row: int) -> int:
        return self.ends[row + 1] - self.ends[row]

    def content(self, row: int) -> bytes:
        return hashlib.sha256(self.bytes_of(row)).digest()


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
    """Encoded images and labels of a Parquet file, some at a time; labels are −1 if absent."""
    try:
        # Read a little at a time: buffered ahead, everything that was read would stay in memory.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            image = next((name for name in IMAGE_COLUMNS if name in names), IMAGE_COLUMNS[0])
            label = next((name for name in LABEL_COLUMNS if name in names), None)
            if labelled and label is None:
                raise KeyError(f"no column {LABEL_COLUMNS[0]}")
            if label and not (labelled or pa.types.is_integer(file.schema_arrow.field(label).type)):
                label = None
            columns = [f"{image}.bytes", *([label] if label else [])]
            for batch in file.iter_batches(ROWS, columns=columns):
                encoded = pc.struct_field(batch.column(image), "bytes")
                labels = np.full(len(encoded), -1)
                if label:
                    labels = batch.column(label).cast(pa.int64()).fill_null(-1).to_numpy()
                yield encoded, labels
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a whole Parquet file with a column image.bytes ({first_line(error)}): "
            "replace it."
        ) from None


def column_names(path: Path) -> set[str]:
    try:
        return set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} is not a whole Parquet file ({first_line(error)}): replace it."
        ) from None
