"""Storage: a folder at any fsspec URL, through which workers without a shared disk exchange files.

`URL/files/SHA256` holds a file under the digest of its contents; `URL/results/SHA256` says, under
the digest of what a result is made from, which of the files is that result. So nothing here is ever
changed or mixed up, whoever writes it, and everything may be deleted: it is made again.
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

from opnp.errors import InputError, UnavailableError
from opnp.runtime.files import atomic, digest, full_disk, remove_others

__all__ = ["RemoteFile", "Storage"]

# Where an object is there whole or not at all; elsewhere it is written beside and then renamed.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "r2"}

NOTE = "Workers of OPNP exchange files here. All of it may be deleted: it is made again.\n"


class Storage:
    """The storage at a URL.

    Args:
        url: of a folder: ``s3://BUCKET/FOLDER``, ``file:///FOLDER`` or any other that fsspec knows;
            credentials are taken from the environment, as its library does.

    Raises:
        InputError: nothing installed here knows such a URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            # What others write must be seen at once.
            self.system, self.root = url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"engine.storage: {self.url} cannot be opened ({said(error)}): correct it, or "
                "install its library (for S3: `pip install 'opnp[s3]'`)."
            ) from None
        protocols = self.system.protocol
        names = {protocols} if isinstance(protocols, str) else set(protocols)
        self.renames = not names & OBJECT_STORES

    def check(self) -> None:
        """Write and read a note there.

        Raises:
            InputError: the bucket is missing, or credentials or rights do not suffice.
            UnavailableError: the storage could not be reached.
        """
        self.write("README.txt", NOTE.encode())
        self.read("README.txt")

    def put(self, path: Path, sha256: str | None = None, replace: bool = False) -> str:
        """Bring a file here, unless it is here already.

        Args:
            path: the file.
            sha256: its digest, where that is known: it is then read only if it must be brought.
            replace: bring it in any case.

        Returns:
            The digest, under which `get` and `open` find it.

        Raises:
            InputError: the file is missing, or its digest is another.
            UnavailableError: the storage could not be reached.
        """
        if not path.is_file():
            raise InputError(f"{path} is missing: run the stage that makes it again.")
        name = f"files/{sha256 or digest(path)}"
        if not replace and self.size(name) == path.stat().st_size:
            return name.removeprefix("files/")
        if sha256 and digest(path) != sha256:
            raise InputError(
                f"{path} has another SHA-256 than was recorded: run the stage that makes it again."
            )
        with self.reached(name), self.whole(name) as target:
            self.system.put_file(str(path), target)
        return name.removeprefix("files/")

    def get(self, sha256: str, path: Path) -> None:
        """Bring the file of a digest to ``path``, atomically, unless it lies there already.

        Raises:
            InputError: it is missing or damaged in the storage.
            UnavailableError: the storage could not be reached.
        """
        if path.is_file() and digest(path) == sha256:
            return
        name = f"files/{sha256}"
        with atomic(path) as temporary:
            with self.reached(name):
                self.system.get_file(f"{self.root}/{name}", str(temporary))
            if digest(temporary) != sha256:
                raise InputError(
                    f"{self.url}/{name} is damaged (its digest differs): delete it and run again."
                )

    def open(self, sha256: str) -> "RemoteFile":
        """Open the file of a digest, to be read in parts. Its digest is not verified.

        Raises:
            InputError: it is missing in the storage.
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
        """Make a file in a folder of this thread's own and bring it here, unless it is here.

        Args:
            inputs: what the folder must hold: the digests under which the files are here, by their
                paths in the folder.
            path: of the file in the folder.
            origin: says what the file is to be made from; takes the folder.
            compute: makes the file unless it is there, whole, and says whether it did; takes the
                folder.

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
            except InputError:  # it was deleted or damaged: it is made again
                pass
        if not compute(folder) and found:
            return False, found
        sha256 = self.put(folder / path, replace=True)
        self.record(made_from, sha256)
        return True, sha256

    def result(self, origin: dict[str, Any]) -> str | None:
        """The digest of the result that is made from ``origin``; None if there is none."""
        name = result_name(origin)
        if self.size(name) is None:
            return None
        found = self.read(name).decode(errors="replace")
        return found if re.fullmatch("[0-9a-f]{64}", found) else None

    def record(self, origin: dict[str, Any], sha256: str) -> None:
        """Say which file, brought here before, is the result that is made from ``origin``."""
        self.write(result_name(origin), sha256.encode())

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if it is not there."""
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
        """Yield where to write an object, so that no reader ever sees a part of it."""
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
        """Tell what fails in one sentence; what may pass as an UnavailableError."""
        try:
            yield
        except FileNotFoundError as error:
            raise InputError(
                f"engine.storage: {self.url}/{name} is missing ({said(error)}): create the bucket "
                "or folder, or run again, which brings what was deleted."
            ) from error
        except PermissionError as error:
            raise InputError(
                f"engine.storage: {self.url} refuses access ({said(error)}): check the credentials "
                "in the environment and their rights to read and write."
            ) from error
        except Exception as error:  # every library has exceptions of its own
            if isinstance(error, OSError) and full_disk(error):
                raise
            raise UnavailableError(
                f"engine.storage: {self.url} could not be reached ({said(error)}): check the URL, "
                "the credentials in the environment and the network, and run again."
            ) from error


class RemoteFile(AbstractBufferedFile):
    """A file in a storage, open for reading; only the ranges that are read are fetched.

    Args:
        storage: holds the file.
        name: of the file, relative to the storage's URL.

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
    """A temporary folder of this thread's own, which lasts as long as the thread."""
    if not hasattr(worker, "folder"):
        worker.folder = tempfile.TemporaryDirectory(prefix="opnp-worker-")
    return Path(worker.folder.name)


def result_name(origin: dict[str, Any]) -> str:
    return f"results/{hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()}"


def said(error: Exception) -> str:
    """What an exception says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
