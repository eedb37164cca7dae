"""Open sources of images by one line: a name known here, a data set of a library, or a path.

A source yields (image, label) pairs, one at a time. Everything random in it is drawn from a
generator seeded by the run's seed and the source's name, so that it never depends on other sources.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from opnp.data import generated
from opnp.data.decoding import printable
from opnp.data.files import open_files
from opnp.data.libraries import LIBRARIES, open_collection
from opnp.data.splits import Example, Rows, Source, Split, Unreadable
from opnp.errors import InputError, MissingError
from opnp.runtime.seeds import generator

__all__ = ["HOMES", "open_id", "open_ood", "open_part", "require"]

HOMES = {
    "downloads/imagenet": "https://image-net.org/download",
    "downloads/imagenet200": "https://image-net.org/download",
    "downloads/inaturalist": "https://github.com/deeplearning-wisc/large_scale_ood",
    "downloads/sun": "https://github.com/deeplearning-wisc/large_scale_ood",
    "downloads/places": "https://github.com/deeplearning-wisc/large_scale_ood",
    "downloads/isun": "https://github.com/facebookresearch/odin",
    "downloads/openood": "https://github.com/Jingkang50/OpenOOD",
}
"""Where to get the files that the presets expect in `downloads/`."""


def require(spec: str, what: str) -> None:
    """See that a source that is a file or folder exists, before any long work.

    Args:
        spec: the source.
        what: names it in the error, such as "The ID source".

    Raises:
        MissingError: it does not exist; the error says where to get it, if that is known.
    """
    if is_path(spec) and not exists(spec):
        home = next((page for at, page in HOMES.items() if Path(spec).is_relative_to(at)), None)
        remedy = f"get it from {home}" if home else "put it there, or name another"
        raise MissingError(f"{what} {spec} does not exist: {remedy}.")


def exists(spec: str) -> bool:
    """Whether there is a file or folder; names that no file can have do not exist."""
    try:
        return Path(spec).exists()
    except OSError:
        return False


def is_path(spec: str) -> bool:
    """Whether a spec can only be a path, not a misspelt name."""
    return ":" not in spec and ("/" in spec or Path(spec).suffix in (".csv", ".parquet"))


def open_id(spec: str) -> Source:
    """Open a source of labelled in-distribution images.

    Args:
        spec: ``digits`` (scikit-learn); ``torchvision:NAME`` (downloaded to ``downloads/``); or the
            path of a folder of images in folders named like classes, of Parquet files in Hugging
            Face layout or of IDX files, of one such Parquet file, or of a manifest.

    Returns:
        Class names, and the splits that the source comes with: ``train`` and ``test``, or ``all``
        if it is not divided.

    Raises:
        InputError: the source does not exist, or its files are damaged.
    """
    if spec == "digits":
        images, labels = zip(*generated.scanned_digits(), strict=True)
        split = Split.of(Scans(images), labels)
        return Source([str(digit) for digit in range(10)], {"all": split})
    if spec.partition(":")[0] in LIBRARIES:
        return open_collection(spec)
    require(spec, "The ID source")
    if exists(spec):
        return open_files(Path(spec))
    raise InputError(
        f"The ID source {spec!r} is neither `digits`, `torchvision:NAME` nor a file or folder of "
        "images.",
        "id",
    )


class Scans(Rows):
    """scikit-learn's digits."""

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def load(self, row: int) -> Image.Image:
        return self.images[row]

    def name(self, row: int) -> str:
        return f"digits#{row}"

    def state(self, row: int) -> object:
        return "as scikit-learn ships them"

    def size(self, row: int) -> int:
        return self.images[row].width * self.images[row].height

    def content(self, row: int) -> bytes:
        return hashlib.sha256(self.images[row].tobytes()).digest()


def open_part(spec: str, part: str, asked: str = "") -> Source:
    """Open one part of a source, with labels and classes if it has any.

    Args:
        spec: ``torchvision:NAME``, ``pytorch-ood:NAME``, one image, or a path as `open_id` takes,
            where a folder may hold images in any folders.
        part: ``train``, ``validation`` or ``test``, see `opnp.data.parts`; a source that is not
            divided is taken whole.
        asked: what the caller calls the source, for the error message.

    Raises:
        InputError: the source does not exist, or its files are damaged.
    """
    if spec.partition(":")[0] in LIBRARIES:
        return open_collection(spec, part)
    if not exists(spec):
        raise MissingError(
            f"{asked} {printable(spec)} is neither a file nor a folder, `torchvision:NAME` nor "
            "`pytorch-ood:NAME`: correct it.".strip()
        )
    return open_files(Path(spec), part)


def open_ood(
    spec: str, size: int, seed: int, unreadable: Unreadable | None = None
) -> Iterator[Example]:
    """Open a source of images from outside the distribution; labels are −1.

    Args:
        spec: ``letters``, ``photo-patches``, ``noise`` or ``digits``; ``torchvision:NAME`` or
            ``pytorch-ood:NAME``; or a path as `open_id` takes, where a folder may hold images in
            any folders. Of a divided source the test split is taken.
        size: side in pixels of images that are generated.
        seed: the run's seed.
        unreadable: takes the images that cannot be read; without it the first is an error.

    Raises:
        InputError: the source does not exist, or its files are damaged.
    """
    rng = generator(seed, spec)
    match spec:
        case "letters":
            yield from generated.rendered_letters(size, rng)
        case "photo-patches":
            yield from generated.photo_patches(rng)
        case "noise":
            yield from generated.noise(size, rng)
        case _:
            [split] = (open_id(spec) if spec == "digits" else outside(spec)).splits.values()
            rows = rng.permutation(len(split))
            yield from split.select(rows, np.full(len(rows), -1)).examples(None, unreadable)


def outside(spec: str) -> Source:
    """The test part of an OOD source that is not made here."""
    require(spec, "The OOD source")
    if spec.partition(":")[0] not in LIBRARIES and not exists(spec):
        raise InputError(
            f"The OOD source {spec!r} is neither a known name (letters, photo-patches, noise, "
            "digits, torchvision:NAME, pytorch-ood:NAME) nor an existing file or folder: correct "
            "it."
        )
    return open_part(spec, "test")
