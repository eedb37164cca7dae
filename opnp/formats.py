"""A user's own files of images: folders of them, Parquet, IDX, and manifests that list them.

Labels and places are read at once, images when they are asked for: a set may be larger than memory.
Files are taken in the order of their names. What lies in an image folder or is listed in a manifest
must lie in that folder: links and paths that lead out of it are refused.
"""

import gzip
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from opnp.decoding import LABEL_COLUMNS, PIXELS, Source, Split, class_names, decode
from opnp.errors import InputError, MissingError
from opnp.files import full_disk

__all__ = ["PARTS", "SUFFIXES", "open_files", "read_idx"]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
HELD_OUT = ("test", "validation", "val")  # the first that is there is the test split
PARTS = {"train": ("train",), "validation": ("validation", "val", "test"), "test": HELD_OUT}
"""The splits that serve as a part of a source: the first that is there."""
IMAGE_COLUMNS = ("image", "img")
SHARD = re.compile(r"(train|test|validation|val)(?:-(\d+)-of-(\d+).*)?\.parquet")
DEFLATED = 1032  # times smaller at most is what DEFLATE makes of anything

Found = TypeVar("Found")


def open_files(path: Path, part: str | None = None) -> Source:
    """Open a file or folder of images, of whichever kind it is.

    Args:
        path: a Parquet file in Hugging Face layout, a manifest (.csv or .parquet), or a folder: of
            Parquet files, of IDX files, or of images; with ``part`` also one image.
        part: a key of `PARTS`: of a source that is divided one split is opened, with labels and
            classes where it has any. Without it all is opened, and must be labelled.

    Raises:
        InputError: it is none of these, or broken, or leads out of its folder.
        MissingError: it is not there.
    """
    if path.is_file():
        if path.suffix == ".csv" or (path.suffix == ".parquet" and is_manifest(path)):
            return open_manifest(path, part)
        if path.suffix == ".parquet":
            return open_parquet({"all": [path]}, part)
        if part is None:
            raise InputError(
                f"{path} is neither a Parquet file nor a manifest (.csv): name another."
            )
        return Source([], {"all": file_split([str(path)], np.array([-1]))})
    if not path.is_dir():
        raise MissingError(f"{path} is not there: put it there, or name another.")
    if found := parquet_files(path, part):
        return open_parquet(found, part)
    if any(path.glob("*-idx[13]-ubyte*")):
        return open_idx(path, part)
    return open_tree(path, part)


def divided(found: dict[str, Found], part: str | None) -> dict[str, Found]:
    """What is there as ``train`` and ``test``, or as ``all``; of one part, by its own name."""
    if part is not None and (name := next((n for n in PARTS[part] if n in found), None)):
        return {name: found[name]}
    held = next((found[name] for name in HELD_OUT if name in found), None)
    if held is not None and "train" in found:
        return {"train": found["train"], "test": held}
    return {"all": found["train"] if held is None else held}


# Parquet in Hugging Face layout


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


def state_of(path: Path | str) -> list[int]:
    """Size and time of a file, which differ once it is another; nothing if it is not there."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


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


# Image files


def open_tree(folder: Path, part: str | None) -> Source:
    """Image files: FOLDER/train/CLASS and FOLDER/test/CLASS, or FOLDER/CLASS.

    Of a part they may lie anywhere; those in no folder of a class have no label.

    Raises:
        InputError: there are none, or a class has test images only.
    """
    parts = {name: folder / name for name in ("train", *HELD_OUT) if (folder / name).is_dir()}
    whole = len(parts) < 2 or "train" not in parts
    found = {"all": folder} if whole else divided(parts, part)
    first = next(iter(found.values()))
    classes = sorted(class_folders(first))
    if part is None and not classes:
        raise InputError(
            f"{folder} holds no folders named like classes, and no Parquet or IDX files: see "
            "docs/data.md."
        )
    number: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    splits = {}
    for split, place in found.items():
        if unknown := sorted(set(class_folders(place)) - set(classes)):
            raise InputError(
                f"{place} has a folder {unknown[0]!r}, and {first} has none: name "
                "classes alike in both."
            )
        paths, labels = [], []
        for path, top in image_files(place):
            if top is not None or part is not None:
                paths.append(path)
                labels.append(number.get(top, -1))
        splits[split] = file_split(paths, np.array(labels, np.int64))
    if part is not None and not any(map(len, splits.values())):
        raise InputError(f"{folder} holds no images, Parquet or IDX files: name another.")
    return Source(classes, splits)


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, but hidden ones; in no order."""
    root, entries = folder.resolve(), list(visible(folder))
    return [entry.name for entry in entries if entry.is_dir() and stays(entry, root)]


def image_files(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Paths of the image files in a folder, sorted, each with the folder in it that it lies in.

    Hidden files and folders are passed over.

    Raises:
        InputError: a link in it leads to a folder, or out of it.
    """
    root = folder.resolve()

    def within(place: Path | str, top: str | None) -> Iterator[tuple[str, str | None]]:
        for entry in sorted(visible(place), key=lambda entry: entry.name):
            if entry.is_dir() and stays(entry, root):
                yield from within(entry.path, top or entry.name)
            elif Path(entry.name).suffix.lower() in SUFFIXES and stays(entry, root):
                yield entry.path, top

    return within(folder, None)


def visible(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    try:
        return (entry for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): allow it.") from None


def stays(entry: os.DirEntry[str], root: Path) -> bool:
    """True, unless it is a link to a folder, or out of ``root``, which is refused."""
    if entry.is_symlink() and (
        entry.is_dir() or not Path(entry.path).resolve().is_relative_to(root)
    ):
        raise InputError(
            f"{entry.path} is a link that leads to a folder, or out of the image folder: put the "
            "images themselves there, or list them in a manifest above."
        )
    return True


def file_split(paths: Sequence[str], labels: NDArray[np.int64]) -> Split:
    return Split(
        labels,
        lambda row: decode(Path(paths[row]), paths[row]),
        lambda row: paths[row],
        lambda row: state_of(paths[row]),
    )


# Manifests of paths


def is_manifest(path: Path) -> bool:
    """Whether a Parquet file lists paths and holds no images."""
    names = column_names(path)
    return "path" in names and not names & set(IMAGE_COLUMNS)


def column_names(path: Path) -> set[str]:
    try:
        return set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is no whole Parquet file ({reason}): replace it.") from None


def open_manifest(path: Path, part: str | None) -> Source:
    """Image files listed in columns ``path`` and ``label``, and ``split`` (train, test) if divided.

    Paths are relative to the manifest. Classes are the labels that occur, numbers in their order.

    Raises:
        InputError: a column or value is missing, a path leads out of the manifest's folder, or a
            label occurs in the test split only.
    """
    columns = read_manifest(path, ("path", "label") if part is None else ("path",))
    places = [inside(path, row, place) for row, place in enumerate(columns["path"])]
    labels = columns.get("label", [""] * len(places))
    known = set(filter(None, labels))
    numbers = all(re.fullmatch(r"\d{1,18}", label) for label in known)
    classes = sorted(known, key=(lambda label: (int(label), label)) if numbers else None)
    number = {name: label for label, name in enumerate(classes)}
    rows: dict[str, list[int]] = {}
    for row, split in enumerate(columns.get("split", ["all"] * len(places))):
        if split not in ("train", *HELD_OUT) and "split" in columns:
            raise InputError(
                f"Row {row} of {path} is of split {split!r}: call splits train and test."
            )
        rows.setdefault(split, []).append(row)
    if not places:
        raise InputError(f"{path} lists no images: fill it.")
    found = divided(rows, part) if "split" in columns else rows
    if "train" in found and part is None:
        trained = {labels[row] for row in found["train"]}
        if unknown := sorted({labels[row] for row in found["test"]} - trained):
            raise InputError(
                f"{path} has the label {unknown[0]!r} in its test split only: correct it."
            )
    splits = {}
    for split, chosen in found.items():
        y = [number.get(labels[row], -1) for row in chosen]
        splits[split] = file_split([places[row] for row in chosen], np.array(y, np.int64))
    return Source(classes, splits)


def read_manifest(path: Path, needed: tuple[str, ...]) -> dict[str, list[str]]:
    """The columns of a manifest, as text."""
    try:
        if path.suffix == ".csv":
            text = {name: pa.string() for name in ("path", "label", "split")}
            options = pa.csv.ConvertOptions(column_types=text)
            table = pa.csv.read_csv(path, convert_options=options)
        else:
            table = pq.read_table(path)
        columns = {
            name: table.column(name).cast(pa.string()).to_pylist()
            for name in ("path", "label", "split")
            if name in table.column_names
        }
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is no whole manifest ({reason}): replace it.") from None
    for name in needed:
        if name not in columns:
            raise InputError(f"{path} has no column {name}: add it.")
        if not all(columns[name]):
            row = next(row for row, value in enumerate(columns[name]) if not value)
            raise InputError(f"Row {row} of {path} has no {name}: fill it in.")
    return columns


def inside(manifest: Path, row: int, place: str) -> str:
    """The path of a manifest's row, which must not lead out of the manifest's folder."""
    full = os.path.join(manifest.parent, place)  # noqa: PTH118
    if Path(place).is_absolute() or not Path(full).resolve().is_relative_to(
        manifest.parent.resolve()
    ):
        raise InputError(
            f"Row {row} of {manifest} is {place}, which leads out of {manifest.parent}/: put the "
            "manifest above all its images, and write paths relative to it."
        )
    return full


# IDX files


def open_idx(folder: Path, part: str | None) -> Source:
    """``train-`` and ``t10k-images-idx3-ubyte`` with their labels, plain or .gz, as MNIST has."""
    wanted = divided({"train": "train", "test": "t10k"}, part)
    splits = {name: idx_split(folder, prefix) for name, prefix in wanted.items()}
    count = int(next(iter(splits.values())).labels.max(initial=-1)) + 1
    return Source([str(label) for label in range(count)], splits)


def idx_split(folder: Path, part: str) -> Split:
    path = folder / f"{part}-images-idx3-ubyte"
    state = state_of(path) or state_of(f"{path}.gz")
    images, labels = read_idx(path), read_idx(folder / f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(
            f"{folder} holds {len(images)} {part} images but {len(labels)} labels: replace them."
        )
    if images[0].size > PIXELS:
        raise InputError(f"{folder} holds {part} images of absurd dimensions: replace them.")
    return Split(
        labels.astype(np.int64),
        lambda row: Image.fromarray(np.array(images[row])),
        lambda row: f"{path}#{row}",
        lambda row: state,
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Map an IDX file of unsigned bytes, plain or gzipped (the format's home: the MNIST page).

    A gzipped one is unpacked into a temporary file, no further than its header says.

    Raises:
        InputError: the file is missing, truncated or of another format.
    """
    packed = path.with_name(path.name + ".gz")
    plain = path.exists()
    broken = InputError(f"{path} is not a whole IDX file of unsigned bytes: replace it.")
    try:
        limit = path.stat().st_size if plain else DEFLATED * packed.stat().st_size
        with open(path, "rb") if plain else gzip.open(packed) as file:
            head = file.read(4)
            dimensions = head[3] if head[:3] == b"\0\0\x08" and len(head) == 4 else 0
            sizes = file.read(4 * dimensions)
            shape = np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4").tolist()
            count, start = math.prod(shape), 4 + 4 * dimensions
            if len(shape) != dimensions or dimensions == 0 or not 0 < count <= limit:
                raise broken
            if plain:
                if limit != start + count:
                    raise broken
                return np.memmap(path, np.uint8, "r", start, tuple(shape))
            spool, left = tempfile.TemporaryFile(), count + 1  # noqa: SIM115
            while left and (block := file.read(min(left, 1 << 20))):
                spooled(spool, block)
                left -= len(block)
    except FileNotFoundError:
        raise InputError(f"{path} is missing (plain or .gz): put it there.") from None
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{packed} is damaged ({error}): replace it.") from None
    if left != 1:
        raise broken
    spool.flush()
    return np.memmap(spool, np.uint8, "r", shape=tuple(shape))
