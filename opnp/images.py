"""A user's image files: found in folders, labelled by them, decoded and preprocessed in batches."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opnp.backbones import Preprocessing
from opnp.decoding import decode
from opnp.errors import InputError
from opnp.formats import SUFFIXES

__all__ = ["Batch", "Images", "find"]

DECODERS = 4  # threads: Pillow decodes without holding Python's lock


@dataclass(frozen=True)
class Batch:
    """Some images, decoded and preprocessed.

    Attributes:
        rows: of those that could be read.
        pixels: theirs, each uint8 (H, W, C).
        lost: the reason why another could not be read, by row.
    """

    rows: list[int]
    pixels: list[NDArray[np.uint8]]
    lost: dict[int, InputError]


@dataclass(frozen=True)
class Images:
    """Files of images.

    Attributes:
        source: where they were found, in words.
        paths: of the files, sorted.
        folders: for each, the folder below the one that was searched; none if it lies in that one.
    """

    source: str
    paths: list[Path]
    folders: list[str | None]

    def __len__(self) -> int:
        return len(self.paths)

    def labels(self, classes: Sequence[str]) -> NDArray[np.int64] | None:
        """Labels (N,) by names of folders; None if no folder is named like a class.

        Raises:
            InputError: some folders are named like classes, and others are not.
        """
        named = sorted({folder for folder in self.folders if folder is not None})
        unknown = [folder for folder in named if folder not in classes]
        if len(unknown) == len(named):
            return None
        if unknown or None in self.folders:
            odd = f"the folder {unknown[0]!r}" if unknown else "an image outside of all folders"
            raise InputError(
                f"{self.source} holds folders of some of the model's classes, but also {odd}: "
                "name all folders like classes, or none."
            )
        place = {name: label for label, name in enumerate(classes)}
        return np.array([place[str(folder)] for folder in self.folders], np.int64)

    def batches(
        self, preprocessing: Preprocessing, rows: Sequence[int], size: int
    ) -> Iterator["Batch"]:
        """Preprocessed images, ``size`` at a time; the next are decoded while these are used."""

        def read(row: int) -> NDArray[np.uint8] | InputError:
            path = self.paths[row]
            try:
                return preprocessing.pixels(decode(path.read_bytes(), str(path)))
            except OSError as error:
                return InputError(f"{path} cannot be read ({error.strerror}): correct the path.")
            except InputError as error:
                return error

        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        with ThreadPoolExecutor(DECODERS) as pool:
            coming = [pool.submit(read, row) for row in parts[0]] if parts else []
            for part, following in zip(parts, [*parts[1:], []], strict=True):
                waiting, coming = coming, [pool.submit(read, row) for row in following]
                read_now = dict(zip(part, (each.result() for each in waiting), strict=True))
                whole = {r: each for r, each in read_now.items() if isinstance(each, np.ndarray)}
                lost = {r: each for r, each in read_now.items() if isinstance(each, InputError)}
                yield Batch(list(whole), list(whole.values()), lost)


def find(*places: str | Path) -> Images:
    """Image files by their paths, and those of folders, at any depth, by their suffixes.

    Raises:
        InputError: a path does not exist, or there is no image.
    """
    paths: list[Path] = []
    folders: list[str | None] = []
    for place in map(Path, places):
        if place.is_file():
            paths.append(place)
            folders.append(None)
            continue
        if not place.is_dir():
            raise InputError(f"{place} is neither a file nor a folder: correct the path.")
        below = sorted(
            path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        paths += below
        parts = [path.relative_to(place).parts for path in below]
        folders += [each[0] if len(each) > 1 else None for each in parts]
    source = ", ".join(map(str, places))
    if not paths:
        raise InputError(f"{source} holds no image ({', '.join(sorted(SUFFIXES))}): add some.")
    return Images(source, paths, folders)
