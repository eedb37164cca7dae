"""Sources of images and their splits, whose images are decoded when they are asked for."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from opnp.errors import InputError

__all__ = ["Example", "Source", "Split", "Unreadable"]


Example = tuple[Image.Image, int]


class Unreadable:
    """Images of a source that cannot be decoded: left out, counted and named, up to a limit.

    Args:
        limit: so many may be left out.

    Attributes:
        images: which ones, in words.
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
                f"{len(self.images)} images cannot be read, more than data.max_unreadable "
                f"({self.limit}) allows; the last: {error}"
            )


@dataclass(frozen=True)
class Split:
    """Part of a source: its labels are known, its images are decoded when they are asked for.

    Attributes:
        labels: int64 (N,); −1 where there are none.
        load: decodes the image of a row; raises `InputError` if that is none.
        name: names the image of a row: the path of its file, or ``file#row``, counted from 0.
        state: what differs once the image of a row is another, as JSON has it: of its file, size
            and time.
    """

    labels: NDArray[np.int64]
    load: Callable[[int], Image.Image]
    name: Callable[[int], str]
    state: Callable[[int], object]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: ArrayLike, labels: ArrayLike) -> "Split":
        """These rows alone, in this order and with these labels."""
        chosen = np.asarray(rows, np.int64)
        return Split(
            np.asarray(labels, np.int64),
            lambda row: self.load(int(chosen[row])),
            lambda row: self.name(int(chosen[row])),
            lambda row: self.state(int(chosen[row])),
        )

    def examples(
        self, rows: Iterable[int] | None = None, unreadable: Unreadable | None = None
    ) -> Iterator[Example]:
        """Images and labels, one at a time.

        Args:
            rows: which, and in which order; all of them without it.
            unreadable: takes the images that cannot be decoded; without it the first is an error.

        Raises:
            InputError: more images cannot be decoded than may be left out.
        """
        unreadable = unreadable or Unreadable()
        for row in range(len(self)) if rows is None else rows:
            try:
                image = self.load(int(row))
            except InputError as error:
                unreadable.add(self.name(int(row)), error)
                continue
            yield image, int(self.labels[row])


class Source(NamedTuple):
    """Images of one origin.

    Attributes:
        classes: their names, in the order of the labels; none where images have no labels.
        splits: ``train`` and ``test``, or ``all`` where the source is not divided; or the one
            that was asked for.
    """

    classes: list[str]
    splits: dict[str, Split]


def state_of(path: Path | str) -> list[int]:
    """Size and time of a file, which differ once it is another; nothing if it is not there."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]
