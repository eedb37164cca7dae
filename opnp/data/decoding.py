"""Encoded images, decoded one at a time and with care."""

import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image

from opnp.errors import InputError

__all__ = ["PIXELS", "UNDECODABLE", "decode", "whole"]


PIXELS = 89_478_485  # at most in one image, a quarter of a GiB of RGB: where Pillow begins to warn

# As Pillow raises; its warning of an absurd size is an error, in what other libraries open too.
UNDECODABLE = (
    OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning
)  # fmt: skip
warnings.simplefilter("error", Image.DecompressionBombWarning)


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
