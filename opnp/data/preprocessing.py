"""Turn images into the input of a backbone: mode, scale, crop, mean and standard deviation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil, floor
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from opnp.data.colors import bands, check_values, memory_of, seen
from opnp.data.decoding import MEMORY, check_size, faults_of
from opnp.errors import InputError

__all__ = ["INTERPOLATIONS", "Preprocessing", "fit"]

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
REACH = {"bilinear": 1, "bicubic": 2}  # pixels that the filter takes in on each side
WHOLE = 3_000_000  # pixels of a scaled image that may be computed and cropped away
LARGEST = 2048  # pixels of a side: what larger images would take in memory is not bounded


@dataclass(frozen=True)
class Axis:
    """How one axis of an image is read, scaled and cropped.

    Attributes:
        start: first pixel that is read.
        stop: pixel after the last that is read.
        span: what is scaled, from and to, in pixels after ``start``.
        scaled: pixels that it is scaled to.
        offset: the first of these that is kept.
    """

    start: int
    stop: int
    span: tuple[float, float]
    scaled: int
    offset: int

    @classmethod
    def square(cls, length: int, side: int, size: int) -> Self:
        """The central ``side`` pixels of an axis, scaled to ``size``."""
        start = (length - side) // 2
        return cls(start, start + side, (0, side), size, 0)

    @classmethod
    def scaled_whole(cls, length: int, scaled: int, resize: int, size: int, reach: int) -> Self:
        """An axis scaled to ``scaled`` pixels, the central ``size`` of them kept.

        All of it is scaled, as torchvision and timm do, unless the image is so thin that this would
        take much memory: then only the part that is kept, with as many pixels beside it as the
        filter reaches. That part begins between two pixels, at a place that Pillow rounds to 24
        bits, which can change values by one level.
        """
        offset = round((scaled - size) / 2)
        if scaled * resize <= WHOLE:
            return cls(0, length, (0, length), scaled, offset)
        scale = length / scaled
        first, last, margin = offset * scale, (offset + size) * scale, reach * max(1, scale) + 1
        start, stop = max(0, floor(first - margin)), min(length, ceil(last + margin))
        return cls(start, stop, (first - start, min(last - start, stop - start)), size, 0)


def fit(
    image: Image.Image,
    size: int,
    mode: str,
    resize: int | None = None,
    interpolation: str = "bilinear",
) -> Image.Image:
    """Scale and crop to ``size`` × ``size``, and convert to ``mode`` (L or RGB).

    Beside the image itself this takes little memory, or as much as decoding may (`MEMORY`): what
    the result does not need is not computed.

    Args:
        image: of any size and mode; its ``filename``, if any, names it in errors.
        size: side in pixels.
        mode: L or RGB.
        resize: the shorter side is scaled to this many pixels, then the centre is cropped, as the
            evaluation transforms of torchvision and timm do; without it the largest square in the
            centre is cropped, then scaled.
        interpolation: a key of `INTERPOLATIONS`.

    Raises:
        InputError: the image has no equivalent in 8 bits, see `opnp.data.colors`, or is damaged.
    """
    where = str(getattr(image, "filename", "")) or "The image"
    with faults_of(where):
        check_size(image, where)
        check_values(image, where)
        filter, shorter = INTERPOLATIONS[interpolation], min(image.size)
        if resize is None:
            x, y = (Axis.square(length, shorter, size) for length in image.size)
        else:
            reach = REACH[interpolation]
            x, y = (
                Axis.scaled_whole(length, resize * length // shorter, resize, size, reach)
                for length in image.size
            )
        box = (x.start, y.start, x.stop, y.stop)
        if memory_of(image, box, mode) <= MEMORY:
            span = (x.span[0], y.span[0], x.span[1], y.span[1])
            scaled = seen(image, box, mode).resize((x.scaled, y.scaled), filter, span)
            return scaled.crop((x.offset, y.offset, x.offset + size, y.offset + size))
        return fit_in_bands(image, x, y, size, mode, filter)


def fit_in_bands(
    image: Image.Image, x: Axis, y: Axis, size: int, mode: str, filter: Image.Resampling
) -> Image.Image:
    """What `fit` does, some rows at a time: at first along x, then along y.

    Pillow may take the axes in the other order, which changes values by a level or a few.
    """
    columns = Image.new(mode, (size, y.stop - y.start))
    for box in bands((x.start, y.start, x.stop, y.stop), x.scaled):
        rows = box[3] - box[1]
        span = (x.span[0], 0, x.span[1], rows)
        part = seen(image, box, mode).resize((x.scaled, rows), filter, span)
        columns.paste(part.crop((x.offset, 0, x.offset + size, rows)), (0, box[1] - y.start))
    scaled = columns.resize((size, y.scaled), filter, (0, y.span[0], size, y.span[1]))
    return scaled.crop((0, y.offset, size, y.offset + size))


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the encoder sees it; stored with the weights.

    Images are scaled by Pillow, with antialiasing, as the evaluation transforms of torchvision and
    timm scale Pillow's images.

    Attributes:
        size: side of the square image in pixels.
        mode: ``L`` or ``RGB``, as in Pillow.
        mean: subtracted from pixels in [0, 1], one for each channel.
        std: divides what is left, one for each channel.
        resize: the shorter side is scaled to this many pixels, then the centre is cropped; without
            it the largest square in the centre is cropped, then scaled.
        interpolation: ``bilinear`` or ``bicubic``.

    Raises:
        InputError: a value is out of range.
    """

    size: int
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        channels = {"L": 1, "RGB": 3}.get(self.mode)
        for name, sound, wanted in (
            ("size", is_side(self.size), f"a number of pixels up to {LARGEST}"),
            ("mode", channels is not None, "L or RGB"),
            ("mean", are_numbers(self.mean, channels), "a number for each channel"),
            (
                "std",
                are_numbers(self.std, channels) and min(self.std) > 0,
                "a number above 0 for each channel",
            ),
            (
                "resize",
                self.resize is None or (is_side(self.resize) and self.resize >= self.size),
                f"at least the size, {self.size}, and at most {LARGEST}, or none",
            ),
            (
                "interpolation",
                self.interpolation in INTERPOLATIONS,
                " or ".join(INTERPOLATIONS),
            ),
        ):
            if not sound:
                value = getattr(self, name)
                raise InputError(f"The preprocessing's {name} must be {wanted}, not {value!r}.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if max(map(abs, values)) > 1:
                raise InputError(
                    f"The preprocessing's {name}, {values}, must be that of pixels in [0, 1]: "
                    "divide it by 255 if it is that of pixels from 0 to 255."
                )

    @classmethod
    def measured(
        cls,
        pixels: NDArray[np.uint8],
        resize: int | None = None,
        interpolation: str = "bilinear",
    ) -> Self:
        """Measure mean and standard deviation on training images, uint8 (N, H, W, C)."""
        scaled = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64) / 255
        return cls(
            size=pixels.shape[1],
            mode="L" if pixels.shape[-1] == 1 else "RGB",
            mean=tuple(round(float(value), 6) for value in scaled.mean(axis=0)),
            std=tuple(round(float(value), 6) for value in scaled.std(axis=0)),
            resize=resize,
            interpolation=interpolation,
        )

    @classmethod
    def stated(cls, values: Mapping[str, Any] | Path) -> Self:
        """Read the values from what `as_json` gives, or from a JSON file.

        Raises:
            InputError: the file is missing or not JSON, or a value is absent, unknown or out of
                range.
        """
        where = "The preprocessing"
        if isinstance(values, Path):
            where = f"The preprocessing in {values}"
            try:
                values = json.loads(values.read_text())
            except (OSError, ValueError) as error:
                raise InputError(f"{where} cannot be read ({error}): state it there.") from None
        names = {each.name for each in fields(cls)}
        needed = {"size", "mode", "mean", "std"}
        if not isinstance(values, Mapping) or not needed <= set(values) <= names:
            raise InputError(
                f"{where} must state {', '.join(sorted(needed))}, and may state "
                f"{' and '.join(sorted(names - needed))}, and nothing else."
            )
        listed: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in values.items()
        }
        return cls(**listed)

    def as_json(self) -> dict[str, Any]:
        """The values by name, without those that are the default."""
        values = ((each.name, getattr(self, each.name), each.default) for each in fields(self))
        return {name: value for name, value, default in values if value != default}

    @property
    def channels(self) -> int:
        return len(self.mean)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Scale and crop an image of any size and mode.

        Returns:
            uint8 (H, W, C).

        Raises:
            InputError: see `fit`.
        """
        fitted = fit(image, self.size, self.mode, self.resize, self.interpolation)
        return np.array(fitted).reshape(self.size, self.size, self.channels)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images in [0, 1], float32 (N, C, H, W).

        Raises:
            InputError: the images have another size or other channels.
        """
        wanted = (self.channels, self.size, self.size)
        if tuple(images.shape[1:]) != wanted:
            raise InputError(
                f"The images are of shape {tuple(images.shape[1:])}, and the backbone wants "
                f"{wanted}: prepare them with its own preprocessing."
            )
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images - mean) / std


def is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def are_numbers(values: object, count: int | None) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(v, int | float) and np.isfinite(v) for v in values)
    )
