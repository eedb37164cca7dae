"""Folders of image files, one folder for each class."""

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from opnp.data.decoding import printable
from opnp.data.parts import FILLING, by_split, divided, splits_named
from opnp.data.splits import Files, Source, Split
from opnp.errors import InputError

__all__ = ["SUFFIXES"]


SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Of image files: those of torchvision's ImageFolder."""

log = logging.getLogger(__name__)


class Passed(Counter[str]):
    """What was passed over in a folder, by suffix or in words."""

    def tell(self, folder: Path) -> None:
        """Log it in one line, if there is anything."""
        if self:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.most_common(8))
            more = ", …" if len(self) > 8 else ""
            log.warning("%s: files passed over: %s%s", printable(folder), kinds, more)


def open_tree(folder: Path, part: str | None) -> Source:
    """Image files: FOLDER/SPLIT/CLASS/…, or FOLDER/CLASS/…, see `opnp.data.parts` for splits.

    Of a part they may lie anywhere; those in no folder of a class have no label.

    Raises:
        InputError: there are none, a class has test images only, or it is unclear which folders
            are splits.
    """
    passed = Passed()
    found = divided(splits_of(folder, passed), part, folder)
    first = next(iter(found.values()))
    classes = sorted({printable(name) for name in class_folders(first)})
    if part is None and not classes:
        raise InputError(
            f"{folder} holds no folders named like classes, and no Parquet or IDX files: see "
            "docs/data.md."
        )
    number: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    splits = {}
    for split, place in found.items():
        if unknown := sorted(set(map(printable, class_folders(place))) - set(classes)):
            raise InputError(
                f"{place} has a folder {unknown[0]!r}, and {first} has none: name "
                "classes alike in both."
            )
        paths, labels = [], []
        for path, top in image_files(place, passed):
            if top is not None or part is not None:
                paths.append(path)
                labels.append(number.get(top, -1))
            else:
                passed["in no folder of a class"] += 1
        splits[split] = Split.of(Files(paths), np.array(labels, np.int64))
    passed.tell(folder)
    if part is not None and not any(map(len, splits.values())):
        raise InputError(f"{folder} holds no images, Parquet or IDX files: name another.")
    return Source(classes, splits)


def splits_of(folder: Path, passed: Passed) -> dict[str, Path]:
    """The folders that a folder is divided into, by split; itself, as ``all``, if it is not.

    Args:
        folder: of images.
        passed: counts images that lie beside splits.

    Raises:
        InputError: some folders with images are named like splits, and others are not.
    """
    names = [entry.name for entry in visible(folder) if is_folder(entry)]  # splits may be links
    like = [name for name, split in splits_named(names).items() if split]
    if not like:
        inner = [name for name in names if name.lower() in FILLING]
        if len(inner) != 1 or not any(splits_named(class_folders(folder / inner[0])).values()):
            return {"all": folder}
        # As in images/train, images/val.
        alone = inner == [name for name in names if any(image_files(folder / name))]
        return splits_of(folder / inner[0], passed) if alone else {"all": folder}
    others = [name for name in names if name not in like and any(image_files(folder / name))]
    # A class may be called train: then, as the others, it holds images and no folders of classes.
    if others and [name.lower() for name in like] == ["train"]:
        flat = not class_folders(folder / like[0])
        if flat and not any(class_folders(folder / name) for name in others):
            return {"all": folder}
    found = by_split([*like, *others], printable(folder), "folders")
    if loose := sum(is_image(entry) for entry in visible(folder)):
        if len(found) == 1:
            raise InputError(
                f"{printable(folder)} holds images ({loose}) beside a folder named like a split "
                f"({like[0]}), so that it is unclear which are meant: name the folder, or move it."
            )
        passed["images beside the splits"] += loose
    return {split: folder / name for split, name in found.items()}


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, except hidden ones; in no order."""
    root = folder.resolve()
    return [entry.name for entry in visible(folder) if is_folder(entry) and stays(entry, root)]


def image_files(folder: Path, passed: Passed | None = None) -> Iterator[tuple[str, str | None]]:
    """Paths of the image files in a folder, sorted, each with the folder in it that it lies in.

    Args:
        folder: is searched with all folders in it; hidden files and folders are ignored.
        passed: counts the files that are no images by their names, or no files.

    Raises:
        InputError: a link in it leads to a folder, or out of it.
    """
    root = folder.resolve()

    def within(place: Path | str, top: str | None) -> Iterator[tuple[str, str | None]]:
        for entry in sorted(visible(place), key=lambda entry: entry.name):
            if is_folder(entry) and stays(entry, root):
                yield from within(entry.path, top or printable(entry.name))
            elif is_image(entry) and stays(entry, root):
                yield entry.path, top
            elif passed is not None:
                passed[kind_of(entry)] += 1

    return within(folder, None)


def visible(folder: Path | str) -> list[os.DirEntry[str]]:
    """What a folder holds, except hidden files and folders; in no order."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"{printable(folder)} cannot be read ({error.strerror}): allow it."
        ) from None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """True of a folder or a link to one; False of a link that leads nowhere, or to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a file is named like an image and may be one: pipes, sockets and devices may not.

    A link that leads nowhere counts as an image, one that cannot be read.
    """
    if Path(entry.name).suffix.lower() not in SUFFIXES:
        return False
    with suppress(OSError):
        return stat.S_ISREG(entry.stat().st_mode)
    return entry.is_symlink()


def kind_of(entry: os.DirEntry[str]) -> str:
    suffix = printable(Path(entry.name).suffix.lower())
    if suffix in SUFFIXES:
        return f"pipes or devices named {suffix}"
    return suffix or "without a suffix"


def stays(entry: os.DirEntry[str], root: Path) -> bool:
    """True, unless it is a link to a folder, or out of ``root``, which is refused."""
    if entry.is_symlink() and (is_folder(entry) or leads_out(entry, root)):
        raise InputError(
            f"{printable(entry.path)} is a link that leads to a folder, or out of the image "
            "folder: put the images themselves there, or list them in a manifest above."
        )
    return True


def leads_out(entry: os.DirEntry[str], root: Path) -> bool:
    try:
        return not Path(entry.path).resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # it leads to itself
        return False
