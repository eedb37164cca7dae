"""Folders of image files, one folder for each class."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opnp.data.decoding import decode
from opnp.data.parts import HELD_OUT, divided
from opnp.data.splits import Source, Split, state_of
from opnp.errors import InputError

__all__ = ["SUFFIXES"]


SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


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
