"""Images that need no files: scans and photographs that ship with libraries, and drawn ones.

Letters, patches and noise are drawn without end, from a generator that the caller gives.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from opnp.data.splits import Example

__all__ = ["noise", "photo_patches", "rendered_letters", "scanned_digits"]

# Upper and lower case, without letters that look like digits.
LETTERS = "ACEFHJKLMNPRTUVWXYadefhjkmnprtuvwxy"
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono")
CANVAS = 96  # pixels: letters are drawn large and scaled down, as a scan would be


def scanned_digits() -> Iterator[Example]:
    """scikit-learn's 1,797 handwritten digits: scans of 8 × 8 pixels in 17 grey levels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for image, label in zip(pixels, digits.target, strict=True):
        yield Image.fromarray(image), int(label)


def rendered_letters(size: int, rng: np.random.Generator) -> Iterator[Example]:
    """Letters in the fonts that ship with matplotlib: white on black, slightly rotated."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), CANVAS * 3 // 4) for name in FONTS]
    while True:
        font = fonts[rng.integers(len(fonts))]
        letter = LETTERS[rng.integers(len(LETTERS))]
        canvas = Image.new("L", (CANVAS, CANVAS))
        draw = ImageDraw.Draw(canvas)
        centre = CANVAS / 2 + rng.uniform(-0.05, 0.05, 2) * CANVAS
        draw.text((float(centre[0]), float(centre[1])), letter, fill=255, font=font, anchor="mm")
        turned = canvas.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
        yield turned.resize((size, size), Image.Resampling.BOX), -1


def photo_patches(rng: np.random.Generator) -> Iterator[Example]:
    """Square patches of scikit-learn's two photographs, 24 to 160 pixels wide."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    while True:
        photo = photos[rng.integers(len(photos))]
        side = int(rng.integers(24, 161))
        left = int(rng.integers(photo.width - side + 1))
        top = int(rng.integers(photo.height - side + 1))
        yield photo.crop((left, top, left + side, top + side)), -1


def noise(size: int, rng: np.random.Generator) -> Iterator[Example]:
    """Impulse noise, stripes and exponential noise in turn; no family of proxies imitates them."""
    while True:
        impulses = np.full((size, size), rng.integers(256))
        hit = rng.random((size, size)) < rng.uniform(0.1, 0.5)
        impulses[hit] = 255 * rng.integers(0, 2, int(hit.sum()))
        stripes = np.tile(rng.integers(0, 256, size), (size, 1))
        stripes = stripes if rng.integers(2) else stripes.T
        exponential = np.minimum(rng.exponential(64, (size, size)), 255)
        for pixels in (impulses, stripes, exponential):
            yield Image.fromarray(np.rint(pixels).astype(np.uint8)), -1
