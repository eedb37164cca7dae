"""Proxy outliers: images made from in-distribution validation images and from noise.

They stand in for the OOD data that a mask search must not see. Each family destroys something else
(global shape, texture, phase, contrast, pose, scale), and the search averages over several: one
family alone is a poor guide. `opnp.data.families` says which of them decide by default.

An image depends only on the seed, its family and its index, never on how the work is divided.
Images are float32 in [0, 1], shape (C, H, W), in the backbone's input space before normalization.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from opnp.errors import InputError, did_you_mean
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
                f"{image.shape[1]}.",
                "proxies",
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
    lowpass = np.exp(-2 * (np.pi * frequencies(height, width) * width / 8) ** 2)
    return stretched(filtered(rng.standard_normal(image.shape), lowpass))


def spectrum(image: Image, _: Image, rng: Rng) -> Image:
    """Noise whose amplitude falls as 1/f, as in natural images (Field, JOSA A 1987), stretched to
    [0, 1]."""
    height, width = image.shape[1:]
    frequency = frequencies(height, width)
    frequency[0, 0] = np.inf  # the mean is set by the stretch
    return stretched(filtered(rng.standard_normal(image.shape), 1 / frequency))


def zoom(image: Image, _: Image, rng: Rng) -> Image:
    """A crop of a quarter of the width, enlarged to the whole image bilinearly."""
    height, width = image.shape[1:]
    rows, columns = max(1, height // 4), max(1, width // 4)
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    crop = image[:, top : top + rows, left : left + columns]
    return enlarged(enlarged(crop, height, 1), width, 2)


def blur(image: Image, _: Image, __: Rng) -> Image:
    """Smoothed by a Gaussian of σ = an eighth of the width, mirrored at the border."""
    sigma = (0, image.shape[2] / 8, image.shape[2] / 8)
    return np.asarray(np.clip(gaussian_filter(image, sigma), 0, 1), np.float32)


def strokes(image: Image, _: Image, rng: Rng) -> Image:
    """One to five thick straight lines of random colours on a plain ground of another."""
    channels, height, width = image.shape
    drawn = np.empty_like(image)
    drawn[:] = rng.random((channels, 1, 1), dtype=np.float32)
    y, x = np.mgrid[:height, :width]
    for _stroke in range(int(rng.integers(1, 6))):
        (y0, x0), (y1, x1) = rng.random((2, 2)) * (height - 1, width - 1)
        colour = rng.random((channels, 1), dtype=np.float32)
        radius = width * rng.uniform(0.04, 0.12)
        length = max((y1 - y0) ** 2 + (x1 - x0) ** 2, 1e-12)
        along = np.clip(((y - y0) * (y1 - y0) + (x - x0) * (x1 - x0)) / length, 0, 1)
        away = np.hypot(y - y0 - along * (y1 - y0), x - x0 - along * (x1 - x0))
        drawn[:, away <= max(radius, 0.5)] = colour
    return drawn


def cutmix(image: Image, other: Image, rng: Rng) -> Image:
    """An image with a rectangle of a quarter of its area taken from another (Yun et al., ICCV
    2019)."""
    height, width = image.shape[1:]
    rows, columns = max(1, height // 2), max(1, width // 2)
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    mixed = image.copy()
    patch = (slice(None), slice(top, top + rows), slice(left, left + columns))
    mixed[patch] = other[patch]
    return mixed


def frequencies(height: int, width: int) -> NDArray[np.float64]:
    """The absolute frequency of each coefficient of `numpy.fft.rfft2`, in cycles per pixel."""
    return np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])


def filtered(noise: NDArray[np.float64], gain: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.fft.irfft2(np.fft.rfft2(noise) * gain, noise.shape[1:])


def stretched(values: NDArray[np.float64]) -> Image:
    """Values scaled to cover [0, 1]."""
    values = values - values.min()
    return (values / values.max()).astype(np.float32)


def enlarged(values: Image, size: int, axis: int) -> Image:
    """Linear interpolation along an axis; the border pixels are repeated outwards."""
    count = values.shape[axis]
    place = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, count - 1)
    share = (place - low).astype(np.float32)
    share = share.reshape([-1 if each == axis else 1 for each in range(values.ndim)])
    return values.take(low, axis) * (1 - share) + values.take(high, axis) * share


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
    "zoom": zoom,
    "blur": blur,
    "strokes": strokes,
    "spectrum": spectrum,
    "cutmix": cutmix,
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
        raise InputError(f"There is no proxy {family!r}; {did_you_mean(family, FAMILIES)}")
    made = []
    for row in rows:
        rng = generator(seed, f"{family}/{row}")
        # Another image than this one; a single image can only be paired with itself.
        other = (row + int(rng.integers(1, max(2, len(images))))) % len(images)
        made.append(FAMILIES[family](images[row], images[other], rng))
    return np.stack(made)
