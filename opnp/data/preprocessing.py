"""How an image becomes the input of a backbone: mode, scale, crop, mean and standard deviation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from opnp.errors import InputError

__all__ = ["INTERPOLATIONS", "Preprocessing", "fit"]

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


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


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the encoder sees it; it travels with the weights.

    Pillow scales, which antialiases always, as the evaluation transforms of torchvision and timm do
    that are given Pillow's images.

    Attributes:
        size: side of the square image in pixels.
        mode: ``L`` or ``RGB``, as in Pillow.
        mean: subtracted from pixels in [0, 1], one for each channel.
        std: divides what is left, one for each channel.
        resize: the shorter side is scaled to so many pixels, then the centre is cropped; without
            it the largest square in the centre is cropped, then scaled.
        interpolation: ``bilinear`` or ``bicubic``.

    Raises:
        InputError: one of them has no such value.
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
            ("size", is_count(self.size), "a number of pixels"),
            ("mode", channels is not None, "L or RGB"),
            ("mean", are_numbers(self.mean, channels), "a number for each channel"),
            (
                "std",
                are_numbers(self.std, channels) and min(self.std) > 0,
                "a number above 0 for each channel",
            ),
            (
                "resize",
                self.resize is None or (is_count(self.resize) and self.resize >= self.size),
                f"at least the size, {self.size}, or none",
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
        """Mean and standard deviation of the training images, uint8 (N, H, W, C)."""
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
        """As `as_json` has it, or a file of JSON.

        Raises:
            InputError: the file is missing or no JSON, or a value is absent, unknown or unsound.
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
        """By name, without what is as it is by default."""
        values = ((each.name, getattr(self, each.name), each.default) for each in fields(self))
        return {name: value for name, value, default in values if value != default}

    @property
    def channels(self) -> int:
        return len(self.mean)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """An image of any size and mode, scaled and cropped, uint8 (H, W, C)."""
        fitted = fit(image, self.size, self.mode, self.resize, self.interpolation)
        return np.array(fitted).reshape(self.size, self.size, self.channels)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images in [0, 1], float32 (N, C, H, W).

        Raises:
            InputError: they are of another size, or have other channels.
        """
        wanted = (self.channels, self.size, self.size)
        if tuple(images.shape[1:]) != wanted:
            raise InputError(
                f"The images are of shape {tuple(images.shape[1:])}, and the backbone wants "
                f"{wanted}: prepare them with its own preprocessing."
            )
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images - mean) / std


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def are_numbers(values: object, count: int | None) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(v, int | float) and np.isfinite(v) for v in values)
    )
