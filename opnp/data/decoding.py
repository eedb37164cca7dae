"""Decode encoded images one at a time, in bounded memory, whatever their bytes are.

A header is read first: an image whose pixels would take more than `MEMORY` is refused, or, if it is
a JPEG, decoded at a half, a quarter or an eighth of its size. Any exception of a decoder becomes an
`InputError` that names the image, so that callers can leave out that image and go on.
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from opnp.data.colors import STORED, check_depth
from opnp.errors import InputError, first_line

__all__ = ["FORMATS", "MEMORY", "PIXELS", "check_header", "decode", "faults_of", "printable"]

PIXELS = 89_478_485  # of one image: where Pillow begins to warn
SIDE = 65_535  # pixels, as in a JPEG: decoders take memory for each row and each column, too
MEMORY = 224_000_000  # bytes that decoding one image may take: 56 million pixels in RGB

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are read. Pillow knows more, some of which run other programs (EPS), decode in
Python, byte by byte, or take any bytes for an image."""

REPLACE = "replace or remove it"
ORIENTATION, ROWS_PER_STRIP = 0x0112, 278  # tags of EXIF and TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what makes an image upright, by its orientation

Encoded = BytesIO | BufferedReader

warnings.simplefilter("error", Image.DecompressionBombWarning)  # also where other libraries decode


def decode(data: bytes | Path, where: str, turn: bool = False, pixels: int = PIXELS) -> Image.Image:
    """Decode an image: of an animation or of several pages, the first.

    Args:
        data: the encoded image, or the path of its file.
        where: names the image in errors; the returned image carries it as its ``filename``.
        turn: turn the image upright, as its EXIF orientation says. TIFF images are always turned,
            since Pillow does so itself.
        pixels: refuse images with more pixels than this.

    Returns:
        The image in the mode that it is stored in.

    Raises:
        InputError: the image is missing, damaged, too large or of no format in `FORMATS`.
    """
    with faults_of(where), opened(data) as file:
        image = identified(file, where, pixels)
        if image.format == "PNG":  # its orientation may stand behind the pixels
            shrink(image, file, where)
        method = TURNS.get(image.getexif().get(ORIENTATION, 1)) if turn else None
        shrink(image, file, where, copies=1 if method is None else 2)
        deep = any(";16" in str(tile.args) for tile in image.tile)
        image.load()
        if deep and "I" not in image.mode:
            check_depth(image, where)
        found: Image.Image = image
        if method is not None and image.format != "TIFF":
            found = image.transpose(method)
    found.filename = where  # type: ignore[attr-defined]
    return found


def check_header(data: bytes, where: str, pixels: int = PIXELS) -> None:
    """Refuse an encoded image that `decode` would refuse, as far as its header tells.

    Raises:
        InputError: it is damaged, too large or of no format in `FORMATS`.
    """
    with faults_of(where), opened(data) as file:
        shrink(identified(file, where, pixels), file, where)


@contextmanager
def faults_of(where: str) -> Iterator[None]:
    """Turn any exception that one image causes into an `InputError` that names it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{where} is missing: put it back, or leave it out.") from None
    except PermissionError:
        raise InputError(f"{where} cannot be read: permission is denied.") from None
    except UnidentifiedImageError:
        raise InputError(f"{where} is not a whole image of a known format: {REPLACE}.") from None
    except Exception as error:  # decoders raise about anything when bytes are damaged
        reason = printable(first_line(error))
        raise InputError(f"{where} is not a whole image ({reason}): {REPLACE}.") from None


def printable(name: str | Path) -> str:
    """A file's name as text to print and store: bytes in it that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@contextmanager
def opened(data: bytes | Path) -> Iterator[Encoded]:
    """Encoded bytes as a file, after a look at whether it is a regular one of sensible size."""
    if isinstance(data, bytes):
        if not data:
            raise ValueError("it has no bytes")
        yield BytesIO(data)
        return
    # A pipe would be waited for, a device might never end.
    with open(data, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is a pipe, a socket or a device")
        if about.st_size > MEMORY:
            raise ValueError(f"its file has {about.st_size} bytes, more than {MEMORY}")
        yield file


def identified(file: Encoded, where: str, pixels: int) -> ImageFile.ImageFile:
    """The image whose header a file holds, not decoded yet.

    Raises:
        InputError: it has more pixels than allowed.
    """
    image = Image.open(file, formats=available())
    check_size(image, where, pixels)
    return image


@cache
def available() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_size(image: Image.Image, where: str, pixels: int = PIXELS) -> None:
    """Refuse an image by its width and height.

    Raises:
        InputError: it has more pixels than allowed.
    """
    if image.width * image.height > pixels:
        over = f"more than the {pixels} allowed"
    elif max(image.size) > SIDE:
        over = f"more than {SIDE} on a side"
    else:
        return
    raise InputError(
        f"{where} has {image.width} × {image.height} pixels, {over}: scale it down, or remove it."
    )


def shrink(image: ImageFile.ImageFile, file: Encoded, where: str, copies: int = 1) -> None:
    """Have a JPEG that would take too much memory decoded at a fraction of its size.

    Args:
        image: not decoded yet.
        file: its encoded bytes.
        where: names it in the error.
        copies: how many times the decoded image will be in memory.

    Raises:
        InputError: decoding would still take more than `MEMORY`.
    """
    own, stored = cost(image, file), STORED.get(image.mode, 4)
    pixels = image.width * image.height
    if pixels * max(stored + own, stored * copies) <= MEMORY:
        return
    if image.format in ("JPEG", "MPO"):
        for part in (2, 4, 8):
            decoded = -(-image.width // part) * -(-image.height // part)
            if pixels * own + decoded * stored * copies <= MEMORY and image.height >= part:
                image.draft(None, (image.width // part, image.height // part))
                return
    raise InputError(
        f"{where} has {image.width} × {image.height} pixels, and decoding it would take more than "
        f"{MEMORY // 1_000_000} MB of memory: scale it down, or store it as PNG or as a JPEG that "
        "is not progressive."
    )


def cost(image: ImageFile.ImageFile, file: Encoded) -> float:
    """Bytes for each pixel that decoding takes beside the decoded image, measured (Pillow 13)."""
    bands = len(image.getbands())
    about: Any = image
    match image.format:
        case "JPEG" | "MPO" if not in_one_scan(image, file):  # libjpeg keeps all coefficients
            wide, high = (max(layer[axis] for layer in about.layer) for axis in (1, 2))
            return sum(2 * layer[1] * layer[2] / (wide * high) for layer in about.layer)
        case "WEBP":
            return 12.2
        case "AVIF":
            return 5.5
        case "JPEG2000":
            return 5.2 * bands
        case "TIFF" if about.tag_v2.get(ORIENTATION, 1) != 1:  # Pillow turns it
            return 4
        case "TIFF" if image.tile and image.tile[0].codec_name != "raw":
            # A strip at a time, out of the whole file.
            rows = min(int(about.tag_v2.get(ROWS_PER_STRIP, image.height)), image.height)
            length = file.seek(0, os.SEEK_END)
            return (4 * rows + length / image.width) / image.height
        case "PNG" if about.is_animated:
            return 8
        case "GIF":
            return 1
    return 0


def in_one_scan(image: ImageFile.ImageFile, file: Encoded) -> bool:
    """Whether the first scan of a JPEG holds all of its components, and it is not progressive.

    Only then is it decoded row by row. A file that is oddly built counts as one that is not.
    """
    if image.info.get("progressive"):
        return False
    position = 2
    while True:
        file.seek(position)
        head = file.read(5)  # 0xFF, the kind of the segment, its length in two bytes, its content
        if len(head) < 5 or head[0] != 0xFF or not (0xC0 <= head[1] < 0xD0 or head[1] >= 0xDA):
            return False
        if head[1] == 0xDA:  # start of scan, with the number of its components
            return head[4] == len(image.getbands())
        position += 2 + int.from_bytes(head[2:4], "big")
