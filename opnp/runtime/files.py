"""Files that are complete or absent: written beside their place, then renamed."""

import csv
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opnp.errors import InputError

__all__ = [
    "atomic",
    "atomic_folder",
    "digest",
    "full_disk",
    "read_json",
    "remove_others",
    "write_csv",
    "write_json",
]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path``, which replaces it only if the block succeeds.

    Raises:
        InputError: the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with enough_space(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``, which replaces it only if the block succeeds.

    Raises:
        InputError: the disk is full.
    """
    path = Path(path)
    temporary, before = (path.with_name(f".{path.name}.{os.getpid()}.{n}") for n in ("part", "old"))
    try:
        with enough_space(path):
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():  # a folder cannot be renamed onto one that is not empty
                path.rename(before)
            temporary.rename(path)
    finally:
        if before.exists() and not path.exists():
            before.rename(path)
        for leftover in (temporary, before):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def enough_space(path: Path) -> Iterator[None]:
    """Turn any library's error of a full disk into an InputError that names ``path``."""
    try:
        yield
    except Exception as error:
        if reason := full_disk(error, path):
            raise InputError(reason) from error
        raise


def full_disk(error: BaseException, path: Path | None = None) -> str | None:
    """The sentence for an error that means a full disk or an exhausted quota; None for any other.

    Args:
        error: of any library; some name the cause only in their message.
        path: the file being written, if the error does not name it.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    told = isinstance(error, OSError) and error.errno in full
    if not told and not any(os.strerror(each) in str(error) for each in full):
        return None
    place = path or getattr(error, "filename", None)
    where = f"for {place}" if place else "on the disk"
    return f"No space is left {where}: free some and run again, which resumes from here."


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def remove_others(folder: Path, keep: set[Path]) -> None:
    """Remove all files but ``keep`` and ``.gitignore``, and the folders that are then empty."""
    for path in folder.rglob("*"):
        if path.is_file() and path not in keep and path.name != ".gitignore":
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def write_csv(path: Path, columns: list[str], rows: list[dict[str, float]]) -> None:
    """Write rows as CSV, atomically."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN, which JSON lacks, is refused."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, about: str | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        about: what is at fault if it cannot be read, such as ``stage:search``; see `opnp.errors`.

    Raises:
        InputError: the file is missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing.", about) from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}).", about) from None
