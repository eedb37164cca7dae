"""Files of named tensors with metadata and a checksum, as safetensors, never pickle."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opnp.errors import InputError
from opnp.runtime.files import atomic

__all__ = ["load", "metadata", "save"]

# safetensors writes metadata in an order that differs between processes. Ours are JSON in a single
# entry, so that the same contents make the same file.
ENTRY = "opnp"


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON-compatible metadata atomically; same contents, same bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, "checksum": checksum(contiguous, metadata)}
    with atomic(path) as temporary:
        save_file(contiguous, temporary, {ENTRY: json.dumps(metadata)})


def checksum(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def load(path: Path, about: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata; metadata are empty in a file that `save` did not write.

    Args:
        path: the file.
        about: what is at fault if it cannot be read, such as ``stage:train``; see `opnp.errors`.

    Raises:
        InputError: the file is missing, truncated, altered or not a safetensors file.
    """
    with opened(path, about) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = stated(file)
    expected = found.pop("checksum", None)
    if expected and expected != checksum(tensors, found):
        raise InputError(f"{path} is damaged (its checksum differs).", about)
    return tensors, found


def metadata(path: Path, about: str | None = None) -> dict[str, Any]:
    """Read the metadata without the tensors; the checksum is not verified.

    Raises:
        InputError: the file is missing, truncated or not a safetensors file.
    """
    with opened(path, about) as file:
        found = stated(file)
    found.pop("checksum", None)
    return found


@contextmanager
def opened(path: Path, about: str | None) -> Iterator[Any]:
    """Open a safetensors file, and turn errors in the block into sentences."""
    if not Path(path).is_file():
        raise InputError(f"{path} is missing.", about)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}).", about) from None


def stated(file: Any) -> dict[str, Any]:
    """The metadata of an open file."""
    return dict(json.loads((file.metadata() or {}).get(ENTRY, "{}")))
