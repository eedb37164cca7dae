"""Named tensors with metadata on disk: safetensors, never pickle."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opnp.errors import InputError
from opnp.files import atomic

__all__ = ["load", "save"]

# safetensors writes its metadata in an order of its own, another in every process. One entry, which
# holds all of ours as JSON, has only one order, so that the same contents make the same file.
ENTRY = "opnp"


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON-compatible metadata atomically; same contents, same bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        save_file(contiguous, temporary, {ENTRY: json.dumps(metadata)})


def load(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata; metadata are empty in a file that `save` did not write.

    Args:
        path: the file.
        remedy: what to do if it is missing or damaged, for the error message.

    Raises:
        InputError: the file is missing, truncated or no safetensors file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is missing: {remedy}.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get(ENTRY, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}.") from None
