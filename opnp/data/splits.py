"""Sources of images and their splits, whose images are decoded when they are asked for."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from opnp.data.decoding import decode, faults_of, opened, printable
from opnp.errors import InputError

__all__ = ["Example", "Files", "Rows", "Source", "Split", "Unreadable"]


Example = tuple[Image.Image, int]


class Unreadable:
    """Images of a source that cannot be read: left out, counted and named, up to a limit.

    Args:
        limit: how many may be left out.

    Attributes:
        images: their names.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.images: list[str] = []

    def add(self, image: str, error: InputError) -> None:
        """Leave out one more.

        Raises:
            InputError: it is one too many.
        """
        if self.limit == 0:
            raise error
        self.images.append(image)
        if len(self.images) > self.limit:
            raise InputError(
                f"{len(self.images)} images cannot be read, more than the {self.limit} that may be "
                f"left out; the last: {error}"
            )


class Rows(ABC):
    """The images of one origin, by number from 0 on; each kind of source has a class of its own."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def load(self, row: int) -> Image.Image:
        """Decode an image; any exception means that it cannot be read."""

    @abstractmethod
    def name(self, row: int) -> str:
        """The image's name for people: the path of its file, or ``file#row``."""

    @abstractmethod
    def state(self, row: int) -> object:
        """What differs once the image is another, as JSON has it: size and time of its file."""

    @abstractmethod
    def size(self, row: int) -> int:
        """The number of the bytes that `content` is the digest of; −1 if it cannot be read."""

    @abstractmethod
    def content(self, row: int) -> bytes:
        """A digest that is the same for the same image, wherever it lies and whatever its name."""

    def path(self, row: int) -> Path | None:
        """The file that holds this image and nothing else."""
        return None


class Files(Rows):
    """Image files, as they lie: not turned by their EXIF orientation, as in torchvision's folders.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, row: int) -> Image.Image:
        return decode(Path(self.paths[row]), self.name(row))

    def name(self, row: int) -> str:
        return printable(self.paths[row])

    def state(self, row: int) -> object:
        return state_of(self.paths[row])

    def size(self, row: int) -> int:
        return next(iter(state_of(self.paths[row])), -1)

    def content(self, row: int) -> bytes:
        with opened(Path(self.paths[row])) as file:
            return hashlib.file_digest(file, "sha256").digest()

    def path(self, row: int) -> Path:
        return Path(self.paths[row])


class Joined(Rows):
    """The images of several splits, one split after the other."""

    def __init__(self, splits: Sequence["Split"]) -> None:
        self.splits = splits
        self.ends = np.cumsum([len(split) for split in splits])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def at(self, row: int) -> tuple[Rows, int]:
        place = int(np.searchsorted(self.ends, row, side="right"))
        split = self.splits[place]
        return split.rows, int(split.places[row - int(self.ends[place]) + len(split)])

    def load(self, row: int) -> Image.Image:
        rows, own = self.at(row)
        return rows.load(own)

    def name(self, row: int) -> str:
        rows, own = self.at(row)
        return rows.name(own)

    def state(self, row: int) -> object:
        rows, own = self.at(row)
        return rows.state(own)

    def size(self, row: int) -> int:
        rows, own = self.at(row)
        return rows.size(own)

    def content(self, row: int) -> bytes:
        rows, own = self.at(row)
        return rows.content(own)

    def path(self, row: int) -> Path | None:
        rows, own = self.at(row)
        return rows.path(own)


@dataclass(frozen=True)
class Split:
    """Part of a source: its labels are known, its images are decoded when they are asked for.

    Attributes:
        labels: int64 (N,); −1 where there are none.
        rows: the images of its origin.
        places: which of them these are, int64 (N,).
    """

    labels: NDArray[np.int64]
    rows: Rows
    places: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Rows, labels: ArrayLike) -> "Split":
        """All images of an origin, with their labels (N,)."""
        return cls(np.asarray(labels, np.int64), rows, np.arange(len(rows)))

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, row: int) -> Image.Image:
        """Decode the image of a row.

        Raises:
            InputError: it cannot be read, whatever the reason.
        """
        with faults_of(self.name(row)):
            return self.rows.load(int(self.places[row]))

    def name(self, row: int) -> str:
        """See `Rows.name`."""
        return self.rows.name(int(self.places[row]))

    def state(self, row: int) -> object:
        """See `Rows.state`."""
        return self.rows.state(int(self.places[row]))

    def path(self, row: int) -> Path | None:
        """See `Rows.path`."""
        return self.rows.path(int(self.places[row]))

    def size(self, row: int) -> int:
        """See `Rows.size`."""
        return self.rows.size(int(self.places[row]))

    def content(self, row: int) -> bytes | None:
        """See `Rows.content`; None if the image cannot be read."""
        try:
            return self.rows.content(int(self.places[row]))
        except (OSError, ValueError):
            return None

    def select(self, rows: ArrayLike, labels: ArrayLike) -> "Split":
        """Only these rows, in this order and with these labels."""
        chosen = np.asarray(rows, np.int64)
        return Split(np.asarray(labels, np.int64), self.rows, self.places[chosen])

    def examples(
        self, rows: Iterable[int] | None = None, unreadable: Unreadable | None = None
    ) -> Iterator[Example]:
        """Images and labels, one at a time.

        Args:
            rows: which, and in which order; all of them without it.
            unreadable: takes the images that cannot be read; without it the first is an error.

        Raises:
            InputError: more images cannot be read than may be left out.
        """
        unreadable = unreadable or Unreadable()
        for row in range(len(self)) if rows is None else rows:
            try:
                image = self.load(int(row))
            except InputError as error:
                unreadable.add(self.name(int(row)), error)
                continue
            yield image, int(self.labels[row])
            del image  # before the next is decoded


class Source(NamedTuple):
    """Images of one origin.

    Attributes:
        classes: their names, in the order of the labels; none where images have no labels.
        splits: ``train`` and ``test``, or ``all`` where the source is not divided; or the one
            that was asked for, by its own name.
    """

    classes: list[str]
    splits: dict[str, Split]


def state_of(path: Path | str) -> list[int]:
    """Size and time of a file, which differ once it is another; nothing if it is not there."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):  # ValueError: the name has a zero byte
        return []
    return [found.st_size, found.st_mtime_ns]
