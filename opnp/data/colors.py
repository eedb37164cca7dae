"""Images as a person sees them, in 8 bits of grey or of red, green and blue.

What is transparent shows white. Numbers of more than 8 bits are scaled by the range of their type,
never by what one image holds, so that all images of a set are scaled alike; where that would turn
a picture black or white, it is refused instead.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opnp.errors import InputError

__all__ = ["STORED", "bands", "check_depth", "check_values", "memory_of", "seen"]

STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Bytes that Pillow keeps for a pixel; 4 in other modes."""

BAND = 1_000_000  # pixels that are converted at once
DEEP = frozenset({"I;16", "I;16B", "I;16L", "I;16N", "I", "F"})  # one number of over 8 bits a pixel
PLAIN = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
CLEAR = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})  # with an alpha channel
BITS, PHOTOMETRIC, SAMPLES = 258, 262, 339  # tags of TIFF

Box = tuple[int, int, int, int]


def bands(box: Box, width: int = 0) -> Iterator[Box]:
    """A box cut into boxes of whole rows and about `BAND` pixels, or rows of ``width`` pixels."""
    left, top, right, bottom = box
    rows = max(1, BAND // max(right - left, width))
    for first in range(top, bottom, rows):
        yield left, first, right, min(first + rows, bottom)


def check_values(image: Image.Image, where: str) -> None:
    """Refuse an image that has no sensible equivalent in 8 bits.

    Args:
        image: of any mode, loaded.
        where: names it in the error.

    Raises:
        InputError: the mode is unknown, or its numbers are outside of the range of their type, or
            use so little of it that 8 bits would show hardly more than black.
    """
    if image.mode not in DEEP:
        if image.mode not in PLAIN | CLEAR | {"LAB"}:
            raise InputError(f"{where} is of the mode {image.mode}: save it as RGB or in greys.")
        if image.mode == "L" and tag(image, SAMPLES) == 2:
            raise InputError(f"{where} holds signed numbers of 8 bits: save it without signs.")
        return
    parts = (np.asarray(image.crop(box)) for box in bands((0, 0, *image.size)))
    ends = np.array([(part.min(), part.max()) for part in parts])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())  # NaN stays
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"{where} holds floating-point numbers from {low:g} to {high:g}, and only those "
                "from 0 to 1 are known to mean black to white: scale them."
            )
        return
    most = (1 << depth(image)) - 1
    if low < 0 or high > most:
        raise InputError(
            f"{where} holds whole numbers from {low:.0f} to {high:.0f}, and only those from 0 to "
            f"{most} are known to mean black to white: scale them, or save it with 8 bits."
        )
    if 0 < high < (most + 1) // 16:
        raise InputError(almost_black(where, most, f"{high:.0f}"))


def check_depth(image: Image.Image, where: str) -> None:
    """Refuse an image of 16 bits for each color, of which Pillow keeps 8, if it is all but black.

    Raises:
        InputError: the 16 bits hold no more than 12.
    """
    shown = image.getextrema()[: len(image.getbands()) - (image.mode in CLEAR)]
    high = max(int(each[1]) for each in shown if isinstance(each, tuple))
    if 0 < high < 16:
        raise InputError(almost_black(where, 65535, str(256 * high + 255)))


def almost_black(where: str, most: int, high: str) -> str:
    return (
        f"{where} has room for numbers up to {most} and uses none above {high}, so that it would "
        f"be all but black: scale them to {most}, or save it with 8 bits."
    )


def seen(image: Image.Image, box: Box, mode: str) -> Image.Image:
    """A part of an image as a person sees it.

    Args:
        image: as `check_values` lets pass.
        box: left, upper, right and lower edge of the part, in pixels.
        mode: L or RGB.

    Returns:
        The part, or the image itself where nothing is to be done.
    """
    if is_plain(image, box, mode):
        return image
    parts = list(bands(box))
    if len(parts) == 1:
        return converted(image, box, mode)
    whole = Image.new(mode, (box[2] - box[0], box[3] - box[1]))
    for part in parts:
        whole.paste(converted(image, part, mode), (0, part[1] - box[1]))
    return whole


def is_plain(image: Image.Image, box: Box, mode: str) -> bool:
    whole = box == (0, 0, *image.size)
    return whole and image.mode == mode and not image.has_transparency_data


def memory_of(image: Image.Image, box: Box, mode: str) -> int:
    """Bytes that an image and what `seen` makes of it take together."""
    own = STORED.get(image.mode, 4) * image.width * image.height
    if is_plain(image, box, mode):
        return own
    return own + STORED.get(mode, 4) * (box[2] - box[0]) * (box[3] - box[1])


def converted(image: Image.Image, box: Box, mode: str) -> Image.Image:
    part = image.crop(box)
    if image.mode in DEEP:
        part = Image.fromarray(eight_bits(image, np.asarray(part)))
    elif image.mode == "LAB":  # Pillow converts it to RGB alone
        part = part.convert("RGB")
    elif part.has_transparency_data:
        clear = part.convert("LA" if image.mode in ("La", "LA") else "RGBA")
        part = Image.new("L" if clear.mode == "LA" else "RGB", part.size, "white")
        part.paste(clear.convert(part.mode), mask=clear.getchannel("A"))
    return part if part.mode == mode else part.convert(mode)


def eight_bits(image: Image.Image, numbers: NDArray[Any]) -> NDArray[np.uint8]:
    """Numbers of some pixels in 8 bits."""
    if image.mode == "F":
        grey = np.rint(numbers * np.float32(255)).astype(np.uint8)
    else:
        grey = (numbers >> (depth(image) - 8)).astype(np.uint8)
    # Pillow inverts a TIFF image in which 0 means white only if it has 8 bits or fewer.
    if tag(image, PHOTOMETRIC) == 0:
        grey = 255 - grey
    clear = image.info.get("transparency")
    return np.where(numbers == clear, np.uint8(255), grey) if isinstance(clear, int) else grey


def depth(image: Image.Image) -> int:
    """Bits of the numbers that mean black to white: 16, or 12 where a TIFF image says so."""
    return 12 if tag(image, BITS) == 12 else 16


def tag(image: Image.Image, number: int) -> int | None:
    """The one number that a tag of a TIFF image states, if it is one and does."""
    stated = getattr(image, "tag_v2", {}).get(number)
    values = stated if isinstance(stated, tuple) else (stated,)
    return values[0] if len(values) == 1 else None
