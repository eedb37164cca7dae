"""Storage: a folder at any fsspec URL, through which workers without a shared disk exchange files.

`URL/files/SHA256` holds a file under the digest of its contents. `URL/results/SHA256` names, under
the digest of what a result is made from, the file that is the result. So no object ever changes,
whoever writes it, and all of them may be deleted: they are made again.
"""

import hashlib
import json
import re
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.spec import AbstractBufferedFile

from opnp.errors import InputError, UnavailableError, first_line
from opnp.runtime.files import atomic, digest, full_disk, remove_others

__all__ = ["RemoteFile", "Storage"]

# Here an object appears only once it is complete; elsewhere it is written beside and renamed.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "r2"}

NOTE = "Workers of OPNP exchange files here. All files may be deleted: they are made again.\n"


class Storage:
    """The storage at a URL.

    Args:
        url: URL of a folder: ``s3://BUCKET/FOLDER``, ``file:///FOLDER`` or any other that fsspec
            knows. Its library takes the credentials from the environment.

    Raises:
        InputError: no installed library knows the URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            # Without a cache of listings, objects that others write are seen at once.
            self.system, self.root = url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"Storage {self.url} cannot be opened ({first_line(error)}): correct the URL, or "
                "install its library (for S3, opnp[s3])."
            ) from None
        protocols = self.system.protocol
        names = {protocols} if isinstance(protocols, str) else set(protocols)
        self.renames = not names & OBJECT_STORES

    def check(self) -> None:
        """Write a note to the storage and read it back.

        Raises:
            InputError: the bucket is missing, or access is denied.
            UnavailableError: the storage could not be reached.
        """
        self.write("README.txt", NOTE.encode())
        self.read("README.txt")

    def put(self, path: Path, sha256: str | None = None, replace: bool = False) -> str:
        """Upload a file, unless the storage holds it already.

        Args:
            path: the file.
            sha256: the file's digest, if known; the file is then read only to be uploaded.
            replace: whether to upload the file in any case.

        Returns:
            The digest, under which `get` and `open` find the file.

        Raises:
            InputError: the file is missing, or its digest is not ``sha256``.
            UnavailableError: the storage could not be reached.
        """
        if not path.is_file():
            raise InputError(f"{path} is missing: make it again.")
        name = f"files/{sha256 or digest(path)}"
        if not replace and self.size(name) == path.stat().st_size:
            return name.removeprefix("files/")
        if sha256 and digest(path) != sha256:
            raise InputError(f"{path} does not have its recorded SHA-256: make it again.")
        with self.reached(name), self.whole(name) as target:
            self.system.put_file(str(path), target)
        return name.removeprefix("files/")

    def get(self, sha256: str, path: Path) -> None:
        """Download the file of a digest to ``path``, atomically, unless it is there already.

        Raises:
            InputError: the file is missing or damaged in the storage.
            UnavailableError: the storage could not be reached.
        """
        if path.is_file() and digest(path) == sha256:
            return
        name = f"files/{sha256}"
        with atomic(path) as temporary:
            with self.reached(name):
                self.system.get_file(f"{self.root}/{name}", str(temporary))
            if digest(temporary) != sha256:
                raise InputError(f"{self.url}/{name} is damaged (its digest differs).", "storage")

    def open(self, sha256: str) -> "RemoteFile":
        """Open the file of a digest, to be read in parts. Its digest is not verified.

        Raises:
            InputError: the file is missing in the storage.
            UnavailableError: the storage could not be reached.
        """
        return RemoteFile(self, f"files/{sha256}")

    def compute(
        self,
        inputs: Mapping[str, str],
        path: str,
        origin: Callable[[Path], dict[str, Any]],
        compute: Callable[[Path], bool],
    ) -> tuple[bool, str]:
        """Make a file in a temporary folder of this thread and upload it, unless it is here.

        Args:
            inputs: files that the folder must hold: their digests, by their paths in the folder.
            path: path of the file in the folder.
            origin: takes the folder, and returns what the file is to be made from.
            compute: takes the folder, makes the file unless it is there and complete, and returns
                whether it did.

        Returns:
            Whether the file was made, and its digest.

        Raises:
            InputError: an input is missing or damaged in the storage.
            UnavailableError: the storage could not be reached.
        """
        folder = own_folder()
        remove_others(folder, {folder / name for name in inputs})
        for name, sha256 in inputs.items():
            self.get(sha256, folder / name)
        made_from = origin(folder)
        found = self.result(made_from)
        if found:
            try:
                self.get(found, folder / path)
            except UnavailableError:
                raise
            except InputError:  # deleted or damaged, so it is made again
                pass
        if not compute(folder) and found:
            return False, found
        sha256 = self.put(folder / path, replace=True)
        self.record(made_from, sha256)
        return True, sha256

    def result(self, origin: dict[str, Any]) -> str | None:
        """The digest of the result made from ``origin``; None if there is none."""
        name = result_name(origin)
        if self.size(name) is None:
            return None
        found = self.read(name).decode(errors="replace")
        return found if re.fullmatch("[0-9a-f]{64}", found) else None

    def record(self, origin: dict[str, Any], sha256: str) -> None:
        """Record which of the uploaded files is the result made from ``origin``."""
        self.write(result_name(origin), sha256.encode())

    def size(self, name: str) -> int | None:
        """The size of an object in bytes; None if it does not exist."""
        with self.reached(name):
            try:
                return int(self.system.info(f"{self.root}/{name}")["size"])
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes:
        with self.reached(name):
            return bytes(self.system.cat_file(f"{self.root}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        with self.reached(name), self.whole(name) as target:
            self.system.pipe_file(target, data)

    @contextmanager
    def whole(self, name: str) -> Iterator[str]:
        """Yield where to write an object, so that readers see it complete or not at all."""
        target = f"{self.root}/{name}"
        if not self.renames:
            yield target
            return
        self.system.makedirs(target.rpartition("/")[0], exist_ok=True)
        beside = f"{target}.{uuid.uuid4().hex}.part"
        try:
            yield beside
            self.system.mv(beside, target)
        except BaseException:
            if self.system.exists(beside):
                self.system.rm_file(beside)
            raise

    @contextmanager
    def reached(self, name: str) -> Iterator[None]:
        """Turn the errors of any library into sentences; passing ones are UnavailableErrors."""
        try:
            yield
        except FileNotFoundError as error:
            raise InputError(
                f"{self.url}/{name} is missing in the storage ({first_line(error)}): create the "
                "bucket or folder, or run again, which uploads deleted files."
            ) from error
        except PermissionError as error:
            raise InputError(
                f"Storage {self.url} denies access ({first_line(error)}): check the credentials in "
                "the environment and their permissions to read and write."
            ) from error
        except Exception as error:  # each library has its own exceptions
            if isinstance(error, OSError) and full_disk(error):
                raise
            raise UnavailableError(
                f"Storage {self.url} could not be reached ({first_line(error)}): check the URL, "
                "the credentials in the environment and the network, and run again."
            ) from error


class RemoteFile(AbstractBufferedFile):
    """A file in a storage, open for reading; only the ranges that are read are fetched.

    Args:
        storage: the storage that holds the file.
        name: name of the file, relative to the storage's URL.

    Raises:
        InputError: the file is missing.
        UnavailableError: the storage could not be reached; `read` raises it, too.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        with storage.reached(name):
            super().__init__(storage.system, f"{storage.root}/{name}", cache_type="none")

    def __str__(self) -> str:
        return f"{self.storage.url}/{self.name}"

    def _fetch_range(self, start: int, end: int) -> bytes:
        with self.storage.reached(self.name):
            return bytes(super()._fetch_range(start, end))


worker = threading.local()


def own_folder() -> Path:
    """A temporary folder that only this thread uses, and that lasts as long as the thread."""
    if not hasattr(worker, "folder"):
        worker.folder = tempfile.TemporaryDirectory(prefix="opnp-worker-")
    return Path(worker.folder.name)


def result_name(origin: dict[str, Any]) -> str:
    return f"results/{hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()}"
