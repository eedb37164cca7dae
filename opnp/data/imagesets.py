"""Write and read image sets: Parquet in the Hugging Face image layout, and a manifest of them."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from opnp.data.decoding import decode
from opnp.data.preprocessing import fit
from opnp.data.splits import Example, Unreadable
from opnp.errors import InputError, first_line
from opnp.runtime.files import atomic, digest, read_json
from opnp.runtime.storage import RemoteFile

__all__ = ["ImageSet", "Manifest", "data_file", "read", "read_manifest", "unit", "write"]

MANIFEST = "manifest.json"

ROW_GROUP = 1024  # images: what is decoded at once when some rows are read

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class ImageSet:
    """One set of images as the manifest records it.

    Attributes:
        role: ``train``, ``validation``, ``test``, ``near`` or ``far`` (OOD test sets), or
            ``outliers`` (OOD sets for the mask search).
        source: where the images came from.
        count: number of images.
        classes: images of each class, by name; empty for OOD.
        sha256: of the Parquet file.
        unreadable: images of the source that cannot be read and were left out; those of the ID
            source are all named with ``train``.
        also_id: images of an OOD set that are ID images, too.
    """

    role: str
    source: str
    count: int
    classes: dict[str, int]
    sha256: str
    unreadable: list[str] = field(default_factory=list)
    also_id: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a folder of image sets holds.

    Attributes:
        parameters: the section ``data`` that the sets were made with, and ``outliers``, if any.
        classes: names of the K known classes, in the order of their labels.
        sets: by name; an OOD test set's name starts with ``ood/``, an outlier set's for the mask
            search with ``outliers/``.
        missing: sources of the OOD test sets that were left out, since their files are not there.
    """

    parameters: dict[str, Any]
    classes: list[str]
    sets: dict[str, ImageSet]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def ood(self) -> dict[str, ImageSet]:
        """The OOD test sets, by name without ``ood/``."""
        return {
            name.removeprefix("ood/"): entry
            for name, entry in self.sets.items()
            if name.startswith("ood/")
        }

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        for entry in values["sets"].values():
            for name in ("unreadable", "also_id"):
                if not entry[name]:
                    del entry[name]
        if not values["missing"]:
            del values["missing"]
        return values


def data_file(name: str, folder: Path) -> Path:
    """Where the set ``name`` lies in a folder of sets."""
    return folder / f"{name}.parquet"


def read_manifest(folder: Path, elsewhere: bool = False) -> Manifest:
    """The manifest of a folder of image sets.

    Args:
        folder: of the sets.
        elsewhere: the sets may lie in a storage instead.

    Raises:
        InputError: a set is missing, or the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    values = read_json(path)
    try:
        manifest = Manifest(
            values["parameters"],
            values["classes"],
            {name: ImageSet(**entry) for name, entry in values["sets"].items()},
            values.get("missing", {}),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a manifest ({error}).") from None
    for name in manifest.sets:
        if not elsewhere and not data_file(name, folder).is_file():
            raise InputError(f"{data_file(name, folder)} is missing.")
    return manifest


def write(
    path: Path,
    role: str,
    source: str,
    examples: Iterable[Example],
    size: int,
    mode: str,
    classes: list[str],
    limit: int | None = None,
    resize: int | None = None,
    interpolation: str = "bilinear",
    unreadable: Unreadable | None = None,
) -> ImageSet:
    """Write images as PNG into a Parquet file, each of them ``size`` × ``size`` in ``mode``.

    Args:
        path: the file.
        role: see `ImageSet`.
        source: see `ImageSet`.
        examples: images and labels, consumed one at a time.
        size: side in pixels.
        mode: L or RGB.
        classes: names of the classes, recorded in the schema; none for OOD sets.
        limit: how many are written at most.
        resize: see `opnp.data.preprocessing.fit`.
        interpolation: see `opnp.data.preprocessing.fit`.
        unreadable: takes images that cannot be prepared; without it the first is an error.

    Raises:
        InputError: there are no images, or more cannot be prepared than may be left out.
    """
    label = (
        {"names": classes, "_type": "ClassLabel"}
        if classes
        else {"dtype": "int64", "_type": "Value"}
    )
    features = {"image": {"_type": "Image"}, "label": label}
    schema = pa.schema(
        [("image", IMAGE), ("label", pa.int64())],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    unreadable = unreadable or Unreadable()

    def prepared() -> Iterator[tuple[bytes, int]]:
        for image, y in examples:
            try:
                data = png(fit(image, size, mode, resize, interpolation))
            except InputError as error:
                unreadable.add(str(getattr(image, "filename", "")), error)
                continue
            del image  # before the next is decoded
            yield data, y

    labels: Counter[int] = Counter()
    remaining = islice(prepared(), limit)
    count = 0
    with atomic(path) as temporary:
        with pq.ParquetWriter(
            temporary, schema, compression="none", write_page_checksum=True
        ) as writer:
            # Fitted one by one: a group of whole photographs would not fit in memory.
            while group := list(islice(remaining, ROW_GROUP)):
                images = [
                    {"bytes": data, "path": f"{count + row:08d}.png"}
                    for row, (data, _) in enumerate(group)
                ]
                columns = [pa.array(images, IMAGE), pa.array([y for _, y in group], pa.int64())]
                writer.write_table(pa.table(columns, schema=schema))
                labels.update(y for _, y in group)
                count += len(group)
        if count == 0:
            raise InputError(f"The set {path.stem} is empty: {source} gave no images.")
    per_class = {classes[y]: labels[y] for y in sorted(labels)} if classes else {}
    return ImageSet(role, source, count, per_class, digest(path))


def repeated(files: Mapping[str, Path]) -> dict[str, dict[str, int]]:
    """Count the images of each set that other sets hold as well.

    Args:
        files: files of the sets by name: first train, then the other ID sets, OOD test sets, whose
            names start with ``ood/``, and last outlier sets. The first is not kept in memory.

    Returns:
        For each set but the first: of ``id``, how many of its images an ID set before it holds; for
        outlier sets, of ``ood``, how many an OOD test set holds.
    """
    first, *others = files
    found = {name: list(digests(files[name])) for name in others}
    wanted = {each for of in found.values() for each in of}
    known = {"id": {each for each in digests(files[first]) if each in wanted}, "ood": set[bytes]()}
    counts = {}
    for name, of in found.items():
        kind, _, inner = name.partition("/")
        holders = ("id", "ood") if kind == "outliers" else ("id",)
        counts[name] = {held: sum(each in known[held] for each in of) for held in holders}
        known["ood" if inner else "id"].update(of)
    return counts


def digests(path: Path) -> Iterator[bytes]:
    """Of all images of a file, in order."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(ROW_GROUP, columns=["image.bytes"]):
            for image in batch.column("image").field("bytes"):
                yield hashlib.blake2b(image.as_buffer(), digest_size=16).digest()


def png(image: Image.Image) -> bytes:
    """The file of an image, which depends on its pixels only."""
    buffer = BytesIO()
    image.info.clear()  # profiles and the like
    # Stored, not deflated: the bytes of a deflated image depend on the zlib that is installed.
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


@dataclass(frozen=True)
class EncodedImages:
    """Rows of a Parquet file of images that were read and are not decoded yet.

    Attributes:
        path: the file.
        start: the first row.
        encoded: the bytes of each image, as PNG or JPEG.
        labels: int64 (N,).
    """

    path: Path | RemoteFile
    start: int
    encoded: pa.BinaryArray
    labels: NDArray[np.int64]

    @property
    def rows(self) -> range:
        return range(self.start, self.start + len(self.labels))

    def decode(self, rows: range, mode: str, size: int) -> NDArray[np.uint8]:
        """Images of some of the rows, uint8 (N, H, W, C).

        Args:
            rows: of the file, one after the other.
            mode: L or RGB.
            size: side in pixels that the backbone wants; other images are cropped and scaled.

        Raises:
            InputError: an image is damaged.
        """
        part = self.encoded.slice(rows.start - self.start, len(rows))
        images = [
            np.asarray(fit(decode(data.as_py() or b"", f"Image {row} of {self.path}"), size, mode))
            for row, data in zip(rows, part, strict=True)
        ]
        return np.stack(images).reshape(len(images), size, size, -1)


def read(
    path: Path | RemoteFile, mode: str, size: int, start: int = 0, stop: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read and decode rows ``start`` to ``stop`` of a Parquet file of images.

    Returns:
        Images, uint8 (N, H, W, C), and labels, int64 (N,).

    Raises:
        InputError: as `read_encoded` and `EncodedImages.decode`.
    """
    found = read_encoded(path, start, stop)
    return found.decode(found.rows, mode, size), found.labels


def read_encoded(path: Path | RemoteFile, start: int = 0, stop: int | None = None) -> EncodedImages:
    """Read rows ``start`` to ``stop`` of a Parquet file of images.

    Only the row groups that hold them are read, and of a file in a storage fetched.

    Args:
        path: the file.
        start: first row.
        stop: row after the last; to the end without it.

    Raises:
        InputError: the file is missing, truncated or holds fewer rows or other columns.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            ends = np.cumsum(
                [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)], dtype=int
            )
            total = int(ends[-1]) if len(ends) else 0
            stop = total if stop is None else stop
            if stop > total:
                raise InputError(f"{path} holds {total} images, not {stop}.")
            if start >= stop:
                raise InputError(f"{path} holds no images.", "data")
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            table = file.read_row_groups(range(first, last + 1), columns=["image.bytes", "label"])
        encoded = table.column("image").combine_chunks().field("bytes")
        labels = table.column("label").cast(pa.int64()).to_numpy().copy()
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except (OSError, pa.ArrowException, KeyError, AttributeError) as error:
        reason = first_line(error)
        about = None if isinstance(path, Path) else "storage"
        raise InputError(f"{path} is damaged ({reason}).", about) from None
    offset = int(ends[first - 1]) if first else 0
    chosen = slice(start - offset, stop - offset)
    return EncodedImages(path, start, encoded[chosen], labels[chosen])


def unit(pixels: NDArray[np.uint8]) -> Tensor:
    """Images, uint8 (N, H, W, C), as float32 in [0, 1], (N, C, H, W)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
