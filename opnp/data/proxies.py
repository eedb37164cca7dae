"""Proxy outliers: images made from in-distribution validation images and from noise.

They stand in for the OOD data that a mask search must not see. Each family destroys something else
(global shape, texture, phase, contrast, pose), and the search averages over all of them: any one
family alone is a poor guide.

An image depends only on the seed, its family and its index, never on how the work is divided.
Images are float32 in [0, 1], shape (C, H, W), in the backbone's input space before normalization.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from opnp.errors import InputError
from opnp.runtime.seeds import generator

__all__ = ["FAMILIES", "make"]

Image = NDArray[np.float32]
Rng = np.random.Generator


def jigsaw(grid: int) -> Callable[[Image, Image, Rng], Image]:
    """Shuffle the ``grid`` × ``grid`` patches of an image; a remainder at its edge stays."""

    def shuffle(image: Image, _: Image, rng: Rng) -> Image:
        side = image.shape[1] // grid
        if side == 0:
            raise InputError(
                f"Proxy jigsaw-{grid} needs images of at least {grid} pixels, these have "
                f"{image.shape[1]}: remove it from search.proxies."
            )
        span, channels = side * grid, len(image)
        patches = image[:, :span, :span].reshape(channels, grid, side, grid, side)
        patches = patches.transpose(1, 3, 0, 2, 4).reshape(grid * grid, channels, side, side)
        patches = patches[rng.permutation(grid * grid)].reshape(grid, grid, channels, side, side)
        shuffled = image.copy()
        shuffled[:, :span, :span] = patches.transpose(2, 0, 3, 1, 4).reshape(channels, span, span)
        return shuffled

    return shuffle


def permutation(image: Image, _: Image, rng: Rng) -> Image:
    """Shuffle the pixels, all channels alike."""
    pixels = image.reshape(len(image), -1)
    return pixels[:, rng.permutation(pixels.shape[1])].reshape(image.shape)


def phase(image: Image, _: Image, rng: Rng) -> Image:
    """Keep the amplitude spectrum, take the phases of white noise."""
    spectrum = np.fft.rfft2(image)
    noise = np.fft.rfft2(rng.standard_normal(image.shape[1:]))
    noise[0, 0] = np.abs(noise[0, 0])  # the mean brightness keeps its sign
    scrambled = np.fft.irfft2(np.abs(spectrum) * np.exp(1j * np.angle(noise)), image.shape[1:])
    return np.asarray(np.clip(scrambled, 0, 1), np.float32)


def mixup(image: Image, other: Image, _: Rng) -> Image:
    """The average of two images."""
    return np.asarray((image + other) / 2, np.float32)


def inversion(image: Image, _: Image, __: Rng) -> Image:
    """The negative."""
    return 1 - image


def rotation(image: Image, _: Image, rng: Rng) -> Image:
    """A turn by 90°, 180° or 270°."""
    return np.ascontiguousarray(np.rot90(image, int(rng.integers(1, 4)), axes=(1, 2)))


def uniform(image: Image, _: Image, rng: Rng) -> Image:
    """Independent pixels, uniform in [0, 1]."""
    return rng.random(image.shape, dtype=np.float32)


def gaussian(image: Image, _: Image, rng: Rng) -> Image:
    """Independent pixels, Gaussian around 0.5 with σ = 0.25, clipped."""
    return np.clip(0.5 + 0.25 * rng.standard_normal(image.shape, dtype=np.float32), 0, 1)


def rademacher(image: Image, _: Image, rng: Rng) -> Image:
    """Independent pixels, 0 or 1 with equal chance."""
    return rng.integers(0, 2, image.shape).astype(np.float32)


def blobs(image: Image, _: Image, rng: Rng) -> Image:
    """White noise smoothed by a Gaussian of σ = an eighth of the width, stretched to [0, 1]."""
    height, width = image.shape[1:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    lowpass = np.exp(-2 * (np.pi * frequency * width / 8) ** 2)
    smooth = np.fft.irfft2(
        np.fft.rfft2(rng.standard_normal(image.shape)) * lowpass, (height, width)
    )
    smooth -= smooth.min()
    return (smooth / smooth.max()).astype(np.float32)


FAMILIES: dict[str, Callable[[Image, Image, Rng], Image]] = {
    "jigsaw-2": jigsaw(2),
    "jigsaw-4": jigsaw(4),
    "jigsaw-7": jigsaw(7),
    "permutation": permutation,
    "phase": phase,
    "mixup": mixup,
    "inversion": inversion,
    "rotation": rotation,
    "uniform": uniform,
    "gaussian": gaussian,
    "rademacher": rademacher,
    "blobs": blobs,
}
"""Every family by name; each maps (image, another image, generator) to a proxy outlier."""


def make(family: str, images: Image, rows: range, seed: int) -> Image:
    """The proxy outliers of one family for some rows of the validation images.

    Args:
        family: a key of `FAMILIES`.
        images: all validation images, float32 in [0, 1], shape (N, C, H, W).
        rows: which images to make outliers of.
        seed: the run's seed.

    Returns:
        float32 in [0, 1], shape (len(rows), C, H, W).

    Raises:
        InputError: there is no such family, or it needs larger images.
    """
    if family not in FAMILIES:
        raise InputError(
            f"There is no proxy {family!r}: choose from {', '.join(FAMILIES)} in search.proxies."
        )
    made = []
    for row in rows:
        rng = generator(seed, f"{family}/{row}")
        # Another image than this one; a single image can only be paired with itself.
        other = (row + int(rng.integers(1, max(2, len(images))))) % len(images)
        made.append(FAMILIES[family](images[row], images[other], rng))
    return np.stack(made)
