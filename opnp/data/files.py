"""Open a user's own files of images: folders of them, Parquet, IDX, and manifests that list them.

Labels and places are read at once, images when they are asked for: a set may be larger than memory.
Files are taken in the order of their names. Nothing outside of an image folder, or of the folder of
a manifest, is read: links and paths that lead out of it are refused.
"""

from pathlib import Path

import numpy as np

from opnp.data.decoding import printable
from opnp.data.folders import open_tree
from opnp.data.idx import open_idx
from opnp.data.lists import is_manifest, open_manifest
from opnp.data.parquet import open_parquet, parquet_files
from opnp.data.splits import Files, Source, Split
from opnp.errors import InputError, MissingError

__all__ = ["open_files"]


def open_files(path: Path, part: str | None = None) -> Source:
    """Open a file or folder of images of any kind.

    Args:
        path: a Parquet file in Hugging Face layout, a manifest (.csv or .parquet), or a folder: of
            Parquet files, of IDX files, or of images; with ``part`` also one image.
        part: a key of `opnp.data.parts.PARTS`: of a divided source one split is opened, with labels
            and classes if it has any. Without it all images are opened, and must be labelled.

    Raises:
        InputError: the path is none of these, or damaged, or leads out of its folder.
        MissingError: the path does not exist.
    """
    if path.is_file():
        if path.suffix == ".csv" or (path.suffix == ".parquet" and is_manifest(path)):
            return open_manifest(path, part)
        if path.suffix == ".parquet":
            return open_parquet({"all": [path]}, part)
        if part is None:
            raise InputError(
                f"{printable(path)} is neither a Parquet file nor a manifest (.csv): name another."
            )
        return Source([], {"all": Split.of(Files([str(path)]), np.array([-1]))})
    if not path.is_dir():
        raise MissingError(f"{printable(path)} does not exist: put it there, or name another.")
    if found := parquet_files(path, part):
        return open_parquet(found, part)
    if any(path.glob("*-idx[13]-ubyte*")):
        return open_idx(path, part)
    return open_tree(path, part)
