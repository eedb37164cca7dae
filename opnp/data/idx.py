"""Read IDX files, the format of MNIST."""

import gzip
import hashlib
import math
import tempfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opnp.data.decoding import PIXELS, printable
from opnp.data.parquet import spooled
from opnp.data.parts import divided
from opnp.data.splits import Rows, Source, Split, state_of
from opnp.errors import InputError

__all__ = ["read_idx"]

DEFLATED = 1032  # DEFLATE makes nothing smaller than by this factor


def open_idx(folder: Path, part: str | None) -> Source:
    """Open ``train-`` and ``t10k-images-idx3-ubyte`` with their labels, plain or .gz."""
    wanted = divided({"train": "train", "test": "t10k"}, part, folder)
    splits = {name: idx_split(folder, prefix) for name, prefix in wanted.items()}
    count = int(next(iter(splits.values())).labels.max(initial=-1)) + 1
    return Source([str(label) for label in range(count)], splits)


def idx_split(folder: Path, part: str) -> Split:
    path = folder / f"{part}-images-idx3-ubyte"
    state = state_of(path) or state_of(f"{path}.gz")
    images, labels = read_idx(path), read_idx(folder / f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(
            f"{folder} holds {len(images)} {part} images but {len(labels)} labels: replace them."
        )
    if images[0].size > PIXELS:
        raise InputError(f"{folder} holds {part} images of over {PIXELS} pixels: replace them.")
    return Split.of(Pixels(path, images, state), labels)


class Pixels(Rows):
    """The images of an IDX file.

    Args:
        path: of the file.
        images: uint8 (N, H, W).
        state: size and time of the file.
    """

    def __init__(self, path: Path, images: NDArray[np.uint8], state: list[int]) -> None:
        self.file, self.images, self.stated = path, images, state

    def __len__(self) -> int:
        return len(self.images)

    def load(self, row: int) -> Image.Image:
        image = Image.fromarray(np.array(self.images[row]))
        image.filename = self.name(row)  # type: ignore[attr-defined]
        return image

    def name(self, row: int) -> str:
        return f"{printable(self.file)}#{row}"

    def state(self, row: int) -> object:
        return self.stated

    def size(self, row: int) -> int:
        return int(self.images[row].size)

    def content(self, row: int) -> bytes:
        return hashlib.sha256(self.images[row].tobytes()).digest()


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Map an IDX file of unsigned bytes, plain or gzipped, into memory.

    A gzipped file is unpacked into a temporary file, no further than its header says.

    Args:
        path: the file's path without ``.gz``.

    Returns:
        Its contents, uint8, of the shape that it states.

    Raises:
        InputError: the file is missing, truncated or of another format.

    Source:
        The format is described on the page of the MNIST database.
    """
    packed = path.with_name(path.name + ".gz")
    plain = path.exists()
    broken = InputError(f"{path} is not a whole IDX file of unsigned bytes: replace it.")
    try:
        limit = path.stat().st_size if plain else DEFLATED * packed.stat().st_size
        with open(path, "rb") if plain else gzip.open(packed) as file:
            head = file.read(4)
            dimensions = head[3] if head[:3] == b"\0\0\x08" and len(head) == 4 else 0
            sizes = file.read(4 * dimensions)
            shape = np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4").tolist()
            count, start = math.prod(shape), 4 + 4 * dimensions
            if len(shape) != dimensions or dimensions == 0 or not 0 < count <= limit:
                raise broken
            if plain:
                if limit != start + count:
                    raise broken
                return np.memmap(path, np.uint8, "r", start, tuple(shape))
            spool, left = tempfile.TemporaryFile(), count + 1  # noqa: SIM115
            while left and (block := file.read(min(left, 1 << 20))):
                spooled(spool, block)
                left -= len(block)
    except FileNotFoundError:
        raise InputError(f"{path} is missing (plain or .gz): put it there.") from None
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{packed} is damaged ({error}): replace it.") from None
    if left != 1:
        raise broken
    spool.flush()
    return np.memmap(spool, np.uint8, "r", shape=tuple(shape))
