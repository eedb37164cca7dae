"""Files of weights, read without running any code that they may hold."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opnp.errors import InputError, first_line
from opnp.runtime import tensors

__all__ = ["load_weights"]


def file_of(weights: str | Path | None) -> Path | None:
    """The file that is meant, unless it is the name of a library's weights."""
    if weights is None:
        return None
    path = Path(weights)
    named = isinstance(weights, Path) or path.suffix in (".safetensors", ".pt", ".pth")
    return path if named or len(path.parts) > 1 or path.is_file() else None


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict, also one wrapped as ``state_dict`` or ``model`` or named ``module.…``.

    Returns:
        Tensors by name, and what `save` stated beside them: ``preprocessing``, ``classes`` and
        ``spec``; nothing for a file of another origin.

    Raises:
        InputError: the file is missing, damaged or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Checkpoint {path} is missing.", "weights")
    state: Any = {}
    metadata: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        state, metadata = tensors.load(path, "weights")
    elif path.suffix in (".pt", ".pth"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises almost anything on a damaged file
            reason = first_line(error)
            raise InputError(f"Checkpoint {path} cannot be read ({reason}): replace it.") from None
        for wrapper in ("state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                if any(isinstance(each, Tensor) for each in state.values()):
                    break
                state = state[wrapper]
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise InputError(f"Checkpoint {path} holds no state dict: save `model.state_dict()`.")
    else:
        raise InputError(f"Checkpoint {path} is neither .safetensors, .pt nor .pth: convert it.")
    if state and all(name.startswith("module.") for name in state):  # as DataParallel names them
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state, metadata


def load_weights(model: nn.Module, path: Path) -> dict[str, Any]:
    """Load a checkpoint (.safetensors; .pt or .pth, never unpickling code) into ``model``.

    Returns:
        What `save` stated beside the weights; nothing for a file of another origin.

    Raises:
        InputError: the file is missing, damaged, of another format or for another model.
    """
    state, metadata = read_weights(path)
    load_state(model, state, path)
    return metadata


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path | str) -> None:
    """Load weights by name, and refuse those whose names or shapes are not the model's."""
    # torchvision's oldest files of DenseNets are from when a module's name could have a dot.
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
    state = {old.sub(r"\1\2", name): tensor for name, tensor in state.items()}
    expected = model.state_dict()
    for name in [*expected, *(key for key in state if key not in expected)]:
        theirs, ours = (tuple(s[name].shape) if name in s else None for s in (state, expected))
        if theirs != ours:
            raise InputError(
                f"Checkpoint {path} is for another model: `{name}` is "
                f"{'absent' if theirs is None else theirs} there and "
                f"{'absent' if ours is None else ours} here; set train.backbone, "
                "width and depth, and the classes, to what it was trained with."
            )
    model.load_state_dict(state)
