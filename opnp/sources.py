"""Where images come from: scans, letters, photographs and noise that ship with the libraries,
torchvision's data sets, and a user's own files.

A source yields (image, label) pairs, one at a time; everything random in it is drawn from a
generator seeded by the run's seed and the source's name, so that it never depends on other sources.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from opnp.errors import InputError, UnavailableError

__all__ = [
    "INTERPOLATIONS",
    "Example",
    "Unreadable",
    "class_names",
    "decode",
    "fit",
    "generator",
    "open_id",
    "open_ood",
]

Example = tuple[Image.Image, int]
Array = NDArray[np.uint8]

# Upper and lower case, without the letters that a digit classifier may rightly take for a digit.
LETTERS = "ACEFHJKLMNPRTUVWXYadefhjkmnprtuvwxy"
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono")
UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # as Pillow raises
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
CANVAS = 96  # pixels: letters are drawn large and scaled down, as a scan would be


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
        self.images.append(image)
        if len(self.images) > max(1, self.limit):
            raise InputError(
                f"{len(self.images)} images cannot be read, more than data.max_unreadable "
                f"({self.limit}) allows; the last: {error}"
            )
        if self.limit == 0:
            raise error


def decode(data: bytes, where: str) -> Image.Image:
    """Decode an encoded image; ``where`` names it in the error.

    Raises:
        InputError: the bytes are no whole image.
    """
    from io import BytesIO

    try:
        image = Image.open(BytesIO(data))
        image.load()
    except UNDECODABLE as error:
        raise InputError(f"{where} is not a whole image ({error}): replace or remove it.") from None
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


def open_id(
    spec: str, unreadable: Unreadable | None = None
) -> tuple[list[str], dict[str, Iterator[Example]]]:
    """Open a source of labelled in-distribution images.

    Args:
        spec: ``digits`` (scikit-learn), ``torchvision:NAME`` (downloaded to ``downloads/``), or a
            folder: of train.parquet and test.parquet in Hugging Face layout with named classes, or
            of IDX files as torchvision keeps them raw.
        unreadable: takes the images that cannot be decoded; without it the first is an error.

    Returns:
        Class names, and the examples of each split the source comes with: ``train`` and ``test``,
        or ``all`` where it is not divided.

    Raises:
        InputError: there is no such source, or its files are missing or broken.
    """
    unreadable = unreadable or Unreadable()
    if spec == "digits":
        return [str(digit) for digit in range(10)], {"all": scanned_digits()}
    if spec.startswith("torchvision:"):
        learnt, held = (torchvision_set(spec, train) for train in (True, False))
        if not hasattr(learnt, "classes"):
            raise InputError(f"{spec} does not name its classes: take a folder of Parquet files.")
        splits = {"train": learnt, "test": held}
        return list(learnt.classes), {
            name: readable(dataset, range(len(dataset)), f"the {name} split of {spec}", unreadable)
            for name, dataset in splits.items()
        }
    folder = Path(spec)
    train, test = folder / "train.parquet", folder / "test.parquet"
    if train.is_file() and test.is_file():
        return class_names(train), {
            "train": parquet_examples(train, unreadable),
            "test": parquet_examples(test, unreadable),
        }
    if folder.is_dir():
        parts = (("train", "train"), ("test", "t10k"))
        return idx_classes(folder), {name: idx_folder(folder, part) for name, part in parts}
    raise InputError(
        f"data.id is {spec!r}, which is neither `digits`, `torchvision:NAME` nor a folder "
        "of Parquet or IDX files: correct it in params.yaml."
    )


def open_ood(
    spec: str, size: int, seed: int, unreadable: Unreadable | None = None
) -> Iterator[Example]:
    """Open a source of images from outside the distribution; labels are −1.

    Args:
        spec: ``letters``, ``photo-patches``, ``noise`` or ``digits``; ``torchvision:NAME``; or the
            path of a Parquet file in Hugging Face layout or of a folder of IDX files.
        size: side in pixels of the images that are made, not read.
        seed: the run's seed.
        unreadable: takes the images that cannot be decoded; without it the first is an error.

    Raises:
        InputError: there is no such source, or its files are missing or broken.
    """
    rng = generator(seed, spec)
    path, unreadable = Path(spec), unreadable or Unreadable()
    match spec:
        case "letters":
            yield from rendered_letters(size, rng)
        case "photo-patches":
            yield from photo_patches(rng)
        case "noise":
            yield from noise(size, rng)
        case "digits":
            yield from shuffled(list(scanned_digits()), rng)
        case _ if spec.startswith("torchvision:"):
            dataset = torchvision_set(spec, train=False)
            order = rng.permutation(len(dataset)).tolist()
            for image, _ in readable(dataset, order, spec, unreadable):
                yield image, -1
        case _ if path.is_dir():
            yield from shuffled(list(idx_folder(path, "t10k")), rng)
        case _ if path.suffix == ".parquet" and path.is_file():
            yield from shuffled(list(parquet_examples(path, unreadable)), rng)
        case _:
            raise InputError(
                f"OOD source {spec!r} is neither a known name (letters, photo-patches, noise, "
                "digits, torchvision:NAME) nor an existing Parquet file or folder: correct it in "
                "params.yaml."
            )


def class_names(path: Path) -> list[str]:
    """Names of the classes, in the order of their labels, from a Parquet file's schema.

    Raises:
        InputError: the file is missing, damaged or names no classes.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return list(features["label"]["names"])
    except FileNotFoundError:
        raise InputError(f"{path} is missing: fetch or replace it.") from None
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is damaged or names no classes ({reason}): fetch or replace it."
        ) from None


def shuffled(examples: list[Example], rng: np.random.Generator) -> Iterator[Example]:
    for index in rng.permutation(len(examples)):
        yield examples[index][0], -1


def scanned_digits() -> Iterator[Example]:
    """scikit-learn's 1,797 handwritten digits, scanned to 8 × 8 pixels of 17 grey levels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for image, label in zip(pixels, digits.target, strict=True):
        yield Image.fromarray(image), int(label)


def rendered_letters(size: int, rng: np.random.Generator) -> Iterator[Example]:
    """Letters in the fonts that ship with matplotlib, white on black, a little askew."""
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
    """Square patches, 24 to 160 pixels wide, of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    while True:
        photo = photos[rng.integers(len(photos))]
        side = int(rng.integers(24, 161))
        left = int(rng.integers(photo.width - side + 1))
        top = int(rng.integers(photo.height - side + 1))
        yield photo.crop((left, top, left + side, top + side)), -1


def noise(size: int, rng: np.random.Generator) -> Iterator[Example]:
    """Impulse noise, stripes and exponential noise in turn, which no proxy outlier imitates."""
    while True:
        impulses = np.full((size, size), rng.integers(256))
        hit = rng.random((size, size)) < rng.uniform(0.1, 0.5)
        impulses[hit] = 255 * rng.integers(0, 2, int(hit.sum()))
        stripes = np.tile(rng.integers(0, 256, size), (size, 1))
        stripes = stripes if rng.integers(2) else stripes.T
        exponential = np.minimum(rng.exponential(64, (size, size)), 255)
        for pixels in (impulses, stripes, exponential):
            yield Image.fromarray(np.rint(pixels).astype(np.uint8)), -1


def torchvision_set(spec: str, train: bool):  # type: ignore[no-untyped-def]
    """One of torchvision's data sets by name, downloaded if it is not in ``downloads/`` yet."""
    import inspect

    from torchvision import datasets

    name = spec.removeprefix("torchvision:")
    factory = getattr(datasets, name, None) if name in datasets.__all__ else None
    accepted = inspect.signature(factory).parameters if factory else {}
    if factory is None or "download" not in accepted:
        loadable = [n for n in datasets.__all__ if n[0].isupper()]
        near = get_close_matches(name, loadable, 1, cutoff=0)[0]
        raise InputError(
            f"torchvision has no data set {name!r} to download; did you mean `torchvision:{near}`?"
        )
    split = {"train": train} if "train" in accepted else {"split": "train" if train else "test"}
    try:
        return factory("downloads", download=True, **split)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{spec} is not divided into train and test ({error}): name another."
        ) from None
    except (OSError, RuntimeError) as error:
        raise UnavailableError(
            f"{spec} could not be had ({error}): put its files under downloads/{name}, or name a "
            "local folder instead."
        ) from error


def readable(
    dataset: Any, order: Iterable[int], name: str, unreadable: Unreadable
) -> Iterator[Example]:
    """The examples of a data set that decodes an image when it is asked for."""
    for index in order:
        try:
            yield dataset[index]
        except UNDECODABLE as error:
            image = f"image {index} of {name}"
            unreadable.add(image, InputError(f"{image} is not a whole image ({error}): remove it."))


def parquet_examples(path: Path, unreadable: Unreadable) -> Iterator[Example]:
    """Images and labels of a Parquet file in Hugging Face layout; −1 where it has no labels."""
    try:
        file = pq.ParquetFile(path)
        named = "label" in file.schema_arrow.names
        table = file.read(columns=["image.bytes", "label"] if named else ["image.bytes"])
        encoded = table.column("image").combine_chunks().field("bytes")
        labels = table.column("label").to_pylist() if named else [-1] * len(encoded)
    except (OSError, pa.ArrowException, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is no whole Parquet file with a column image.bytes ({error}): replace it."
        ) from None
    for index, (data, label) in enumerate(zip(encoded, labels, strict=True)):
        try:
            image = decode(data.as_py() or b"", f"Image {index} of {path}")
        except InputError as error:
            unreadable.add(f"image {index} of {path}", error)
            continue
        yield image, label


def idx_folder(folder: Path, part: str) -> Iterator[Example]:
    """Images and labels of ``PART-images-idx3-ubyte`` and ``PART-labels-idx1-ubyte`` (or .gz)."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise InputError(
            f"{folder} holds {len(images)} {part} images but {len(labels)} labels: replace them."
        )
    for image, label in zip(images, labels, strict=True):
        yield Image.fromarray(image), int(label)


def idx_classes(folder: Path) -> list[str]:
    return [
        str(label) for label in range(int(read_idx(folder / "train-labels-idx1-ubyte").max()) + 1)
    ]


def read_idx(path: Path) -> Array:
    """Read an IDX file of unsigned bytes, plain or gzipped (the format's home: the MNIST page).

    Raises:
        InputError: the file is missing, truncated or of another format.
    """
    packed = path.with_name(path.name + ".gz")
    try:
        data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing (plain or .gz): put it there.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{packed} is damaged ({error}): replace it.") from None
    dimensions = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, header, 4)]
    if dimensions == 0 or len(data) != header + int(np.prod(shape)):
        raise InputError(f"{path} is not a whole IDX file of unsigned bytes: replace it.")
    return cast(Array, np.frombuffer(data, np.uint8, offset=header).reshape(shape))
