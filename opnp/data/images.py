"""A user's images, from any source: labelled by it, decoded and preprocessed in batches."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from opnp.data.decoding import printable
from opnp.data.preprocessing import Preprocessing
from opnp.data.sources import open_part
from opnp.data.splits import Joined, Split
from opnp.errors import InputError

__all__ = ["Batch", "Images", "find"]

T = TypeVar("T")

AT_ONCE = 1024  # waiting for a thread
DECODERS = 4  # threads: Pillow decodes without holding Python's lock


@dataclass(frozen=True)
class Batch:
    """Some images, decoded and preprocessed.

    Attributes:
        rows: rows of the images that could be read.
        pixels: their pixels, each uint8 (H, W, C).
        lost: why the others could not be read, by row.
    """

    rows: list[int]
    pixels: list[NDArray[np.uint8]]
    lost: dict[int, InputError]


@dataclass(frozen=True)
class Images:
    """Images of one or more sources.

    Attributes:
        source: where the images were found, in words.
        classes: names of the sources' own classes, if they have any.
        split: the images, with labels among these classes.
    """

    source: str
    classes: list[str]
    split: Split

    def __len__(self) -> int:
        return len(self.split)

    @property
    def paths(self) -> list[Path]:
        """Paths of the images.

        Raises:
            InputError: an image is a row of a larger file.
        """
        paths = [self.split.path(row) for row in range(len(self))]
        if None in paths:
            name = self.name(paths.index(None))
            raise InputError(f"{name} is not an image file of its own: name image files.")
        return [path for path in paths if path]

    def name(self, row: int) -> str:
        """The path of an image, or ``file#row``, counted from 0."""
        return self.split.name(row)

    def select(self, rows: Sequence[int]) -> "Images":
        """Only these images, in this order."""
        split = self.split.select(rows, self.split.labels[list(rows)])
        return Images(self.source, self.classes, split)

    def states(self, rows: Sequence[int]) -> list[object]:
        """The name of each image with what differs once its file is another, as JSON values."""
        with ThreadPoolExecutor(DECODERS) as pool:
            found = pool.map(self.split.state, rows)
            return [[self.name(row), state] for row, state in zip(rows, found, strict=True)]

    def digests(self) -> list[str]:
        """The SHA-256 of each image's bytes; of images that cannot be read, the name."""
        found = in_threads(self.split.content, len(self))
        return [each.hex() if each else self.name(row) for row, each in enumerate(found)]

    def also_in(self, other: "Images") -> list[int]:
        """Rows of the images that are among others as well.

        Images are compared by what is stored, not by name: copies, links and other paths to a file
        are the same image, and so is a row of a Parquet file that holds a file's bytes. Only images
        of equal size are read. Of data sets of libraries, rows are compared by name.
        """
        own, others = (list(in_threads(each.split.size, len(each))) for each in (self, other))
        shared = {size for size in set(own) & set(others) if size >= 0}
        ours = [row for row, size in enumerate(own) if size in shared]
        theirs = [row for row, size in enumerate(others) if size in shared]
        known = set(in_threads(lambda at: other.split.content(theirs[at]), len(theirs))) - {None}
        found = in_threads(lambda at: self.split.content(ours[at]), len(ours))
        return [row for row, content in zip(ours, found, strict=True) if content in known]

    def labels(self, classes: Sequence[str]) -> NDArray[np.int64] | None:
        """Labels among a model's classes, found by the names of classes.

        If the source's classes are the numbers from 0 to the number of the model's classes − 1,
        they are indices of the model's classes, unless these are called by numbers themselves.

        Args:
            classes: names of the model's classes, in the order of its logits.

        Returns:
            Labels, int64 (N,); None if no image belongs to a class named like one of the model's.

        Raises:
            InputError: only some of the images belong to such classes.
        """
        place = {name: label for label, name in enumerate(classes)}
        numbers = {str(label): label for label in range(len(classes))}
        if set(self.classes) == numbers.keys() and not numbers.keys() & place.keys():
            place = numbers
        labels = np.array([*(place.get(name, -1) for name in self.classes), -1], np.int64)
        labels = labels[self.split.labels]  # −1 is the last
        if not (labels >= 0).any():
            return None
        if (labels < 0).any():
            row = int(np.argmax(labels < 0))
            own = int(self.split.labels[row])
            odd = "one of no class" if own < 0 else f"one of the class {self.classes[own]!r}"
            raise InputError(
                f"{self.source} holds images of some of the model's classes, but also {odd} "
                f"({self.name(row)}): name all classes, or folders, like the model's, or none."
            )
        return labels

    def batches(
        self, preprocessing: Preprocessing, rows: Sequence[int], size: int
    ) -> Iterator["Batch"]:
        """Preprocess images in batches of ``size``; the next is decoded while one is used."""

        def read(row: int) -> NDArray[np.uint8] | InputError:
            try:
                return preprocessing.pixels(self.split.load(row))
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


def in_threads(work: Callable[[int], T], count: int) -> Iterator[T]:
    """The results of work that waits for files, for 0 to ``count`` − 1, in order."""
    with ThreadPoolExecutor(DECODERS) as pool:
        for start in range(0, count, AT_ONCE):
            yield from pool.map(work, range(start, min(start + AT_ONCE, count)))


def find(*places: str | Path, part: str = "test", asked: str = "") -> Images:
    """Find the images of sources, as `opnp.data.sources.open_part` opens them.

    Args:
        places: image files, folders, Parquet files, manifests, ``torchvision:NAME``, …
        part: the part to take of divided sources: ``train``, ``validation`` or ``test``.
        asked: what the caller calls the sources, for error messages.

    Raises:
        InputError: a source does not exist or is damaged, or there are no images.
    """
    words, splits = [], []
    opened = [open_part(str(place), part, asked) for place in places]
    classes = sorted({name for source in opened for name in source.classes})
    number = {name: label for label, name in enumerate(classes)}
    for place, source in zip(places, opened, strict=True):
        [(name, split)] = source.splits.items()
        where = printable(place)
        words.append(where if name == "all" else f"the {name} split of {where}")
        own = np.array([*(number[each] for each in source.classes), -1], np.int64)
        known = (split.labels >= 0) & (split.labels < len(source.classes))
        labels = own[np.where(known, split.labels, -1)]
        splits.append(split.select(np.arange(len(split)), labels))
    together = Split.of(Joined(splits), np.concatenate([split.labels for split in splits]))
    found = Images(", ".join(words), classes, together)
    if not len(found):
        raise InputError(f"{asked} {found.source} holds no images: add some.".strip())
    return found
