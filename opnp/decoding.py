"""Images one at a time: decoded with care, fitted to a size, and left out if they cannot be."""

import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from opnp.errors import InputError

__all__ = [
    "INTERPOLATIONS",
    "LABEL_COLUMNS",
    "PIXELS",
    "UNDECODABLE",
    "Example",
    "Source",
    "Split",
    "Unreadable",
    "class_names",
    "decode",
    "fit",
    "generator",
    "whole",
]

Example = tuple[Image.Image, int]

PIXELS = 89_478_485  # at most in one image, a quarter of a GiB of RGB: where Pillow begins to warn
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
LABEL_COLUMNS = ("label", "labels", "fine_label")

# As Pillow raises; its warning of an absurd size is an error, in what other libraries open too.
UNDECODABLE = (
    OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning
)  # fmt: skip
warnings.simplefilter("error", Image.DecompressionBombWarning)


def generator(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for each named thing under one seed."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


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


def decode(data: bytes | Path, where: str) -> Image.Image:
    """Decode an image, once its header says that it is of a sensible size.

    Args:
        data: the encoded image, or the path of a file of it.
        where: names it in the error.

    Raises:
        InputError: it is no whole image, or one of more than `PIXELS` pixels.
    """
    try:
        if isinstance(data, Path):
            with Image.open(data) as image:
                return whole(image, where)
        return whole(Image.open(BytesIO(data)), where)
    except FileNotFoundError:
        raise InputError(f"{where} is missing: put it there, or name it no more.") from None
    except UNDECODABLE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is not a whole image ({error}): replace or remove it.") from None


def whole(image: Image.Image, where: str) -> Image.Image:
    """Load the pixels of an image that has been opened.

    Raises:
        InputError: it is of more than `PIXELS` pixels.
    """
    if image.width * image.height > PIXELS:
        raise InputError(
            f"{where} is of {image.width} × {image.height} pixels, more than any photograph: "
            "scale it down, or remove it."
        )
    image.load()
    return image


def fit(
    image: Image.Image,
    size: int,
    mode: str,
    resize: int | None = None,
    interpolation: str = "bilinear",
) -> Image.Image:
    """Scale and crop to ``size`` × ``size``, and convert to ``mode`` (L or RGB).

    Args:
        image: of any size and mode.
        size: side in pixels.
        mode: L or RGB.
        resize: the shorter side is scaled to so many pixels, then the centre is cropped, as
            torchvision's and timm's evaluation transforms do; without it the largest square in the
            centre is cropped, then scaled.
        interpolation: a key of `INTERPOLATIONS`.
    """
    image, filter = image.convert(mode), INTERPOLATIONS[interpolation]
    width, height = image.size
    if resize is not None:
        shorter = min(width, height)
        if shorter != resize:
            width, height = (resize * side // shorter for side in (width, height))
            image = image.resize((width, height), filter)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return image.crop((left, top, left + size, top + size))
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), filter)


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
