"""Files of weights, read without running any code that they may hold.

A file is recognized by its content: safetensors, or what `torch.save` writes. The weights may lie
in a wrapper, as training scripts save them (``state_dict``, ``model``, …); ``FILE#KEY`` names
another one, such as ``checkpoint.pth#model_ema``, or those tensors whose names begin with ``KEY.``.
"""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from opnp.errors import InputError, first_line
from opnp.runtime import tensors

__all__ = ["file_of", "read_weights"]

SUFFIXES = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".th", ".tar"}
"""A name that ends in one of these means a file, even if the file does not exist."""

WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params",
    "weights",
)  # fmt: skip
"""Keys under which training scripts save the model's own weights, not an average of them."""

DEPTH = 3  # of wrappers within wrappers; a pickle may even contain itself


class Unread:
    """A stand-in for a class that only running code could provide, and for all objects of it.

    Whatever the reader of torch does with the class or an object (call it, make an instance, set
    its state) returns the same stand-in and runs nothing.
    """

    def __init__(self, name: str):
        self.name = name
        self.__dict__["__new__"] = self

    def __call__(self, *_: object, **__: object) -> "Unread":
        return self

    def __setstate__(self, _: object) -> None:
        """Discard the state."""


def file_of(weights: str | Path | None) -> Path | None:
    """The file of weights that is meant; None if it is the name of a library's weights."""
    if weights is None:
        return None
    path, _ = parted(weights)
    named = isinstance(weights, Path) or path.suffix in SUFFIXES or len(path.parts) > 1
    return path if named or path.is_file() else None


def parted(weights: str | Path) -> tuple[Path, str | None]:
    """The file, and the key after ``#`` if there is one; a file of the whole name comes first."""
    if "#" not in str(weights) or Path(weights).exists():
        return Path(weights), None
    path, _, key = str(weights).rpartition("#")
    return Path(path), key


def read_weights(weights: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a model.

    Args:
        weights: FILE or FILE#KEY; see the module.

    Returns:
        At least one tensor by its name, dense and on the CPU; and what `save_backbone` states of
        them, ``preprocessing``, ``classes`` and ``spec``, empty for any other file.

    Raises:
        InputError: the file is missing or damaged, or it holds no weights or those of several
            models.
    """
    path, key = parted(weights)
    if not path.exists():
        raise InputError(f"The file of weights {path} does not exist.", "weights")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise InputError(f"{path} is {kind}, not a file of weights.", "weights")
    try:
        with path.open("rb") as file:
            head = file.read(1000)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).", "weights") from None
    content: Any
    stated: dict[str, Any] = {}
    if head[8:9] == b"{":
        content, stated = tensors.load(path, "weights")
    elif head[:4] == b"PK\3\4" or head[:1] == b"\x80":
        content = unpickled(path)
    else:
        raise InputError(f"{path} is not a file of weights: {kind_of(head)}.", "weights")
    state = state_in(content if key is None else under(content, key, path), path)
    return {name: plain(name, tensor, path) for name, tensor in state.items()}, stated


def kind_of(head: bytes) -> str:
    """What kind of file begins with these bytes, which are not those of a file of weights."""
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, and `git lfs pull` fetches the file itself"
    if head.lstrip()[:1] == b"<":
        return "it is a web page, such as an error in place of a download"
    return "it is neither safetensors nor written by torch.save"


def unpickled(path: Path) -> Any:
    """What `torch.save` wrote, with `Unread` in place of objects that only code could provide."""
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")  # of TorchScript, which is told below
        try:
            names = sorted(get_unsafe_globals_in_checkpoint(file))
        except Exception:  # TorchScript, damaged, or from before torch 1.6
            names = []
        while True:
            file.seek(0)
            known = [(Unread(name), name) for name in names] + [(Unread, "opnp.Unread")]
            try:
                with safe_globals(known):  # type: ignore[arg-type]  # its type lacks pairs
                    return torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # torch.load raises almost anything for a damaged file
                found = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
                name = found[1] if found else ""
                name = name if "." in name else f"builtins.{name}"
                if found and name not in names:
                    names.append(name)
                    continue
                raise unreadable(path, error, names) from None


def unreadable(path: Path, error: Exception, names: Sequence[str]) -> InputError:
    """Why `torch.load` cannot read a file, without its advice to run the code in the file."""
    if "TorchScript" in str(error):
        return InputError(
            f"{path} holds a TorchScript program, not weights: save its `state_dict()`."
        )
    if "Only persistent_load of storage" in str(error) and names:  # a module, before torch 1.6
        return pickled(path, names[0])
    told = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    reason = told[1].split(". ")[0].rstrip(".") if told else first_line(error)
    return InputError(f"{path} cannot be read without running code, or is damaged ({reason}).")


def state_in(content: Any, path: Path, depth: int = 0) -> Mapping[str, Tensor]:
    """The weights in what a file holds.

    Raises:
        InputError: there are none, or it is unclear which are meant.
    """
    if isinstance(content, Unread):
        raise pickled(path, content.name)
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise InputError(f"{path} holds a {kind}, not a state dict: save `model.state_dict()`.")
    inside = [str(name) for name, each in content.items() if holds_weights(each)]
    wrappers = [name for name in inside if name in WRAPPERS]
    if len(wrappers) == 1 and depth < DEPTH:
        return state_in(content[wrappers[0]], path, depth + 1)
    if found := wrappers or inside:
        raise InputError(
            f"{path} holds weights under {listed(found)}: name those you want, such as "
            f"{path}#{found[0]}."
        )
    state = {name: each for name, each in content.items() if isinstance(each, Tensor)}
    if state and all(isinstance(name, str) for name in state):
        return state
    for name, each in content.items():
        if isinstance(each, Unread):
            raise pickled(path, each.name, f" under `{name}`")
    empty = next((name for name in WRAPPERS if content.get(name) == {}), None)
    what = f"its `{empty}` is empty" if empty else f"but {listed(content)}" if content else ""
    raise InputError(f"{path} holds no weights{what and ', '}{what}.", "weights")


def under(content: Any, key: str, path: Path) -> Any:
    """What lies under a key, or the tensors whose names begin with it and a dot."""
    if not isinstance(content, Mapping):
        return content
    wrapped = [content[name] for name in WRAPPERS if holds_weights(content.get(name))]
    for state in (content, *wrapped):
        if holds_weights(state.get(key)):
            return state[key]
        start = f"{key}."
        parts = {n: each for n, each in state.items() if isinstance(n, str) and n.startswith(start)}
        if parts:
            return {name.removeprefix(start): each for name, each in parts.items()}
    raise InputError(f"{path} holds no weights under `{key}`, but {listed(content)}.", "weights")


def holds_weights(content: object, depth: int = 0) -> bool:
    """Whether it is a state dict that holds a tensor, or a wrapper of one."""
    return (
        isinstance(content, Mapping)
        and depth <= DEPTH
        and any(
            isinstance(name, str) and (isinstance(each, Tensor) or holds_weights(each, depth + 1))
            for name, each in content.items()
        )
    )


def listed(names: Collection[Any]) -> str:
    """At most three names, and how many more there are."""
    first = [f"`{name}`" for name, _ in zip(names, range(3), strict=False)]
    more = [f"{len(names) - 3} more"] if len(names) > 3 else []
    *others, last = first + more
    return f"{', '.join(others)} and {last}" if others else last


def pickled(path: Path, name: str, where: str = "") -> InputError:
    if name.startswith("numpy."):
        return InputError(
            f"{path} holds NumPy's numbers{where}, not tensors: save `model.state_dict()`."
        )
    return InputError(
        f"{path} holds a pickled {name}{where}, which cannot be read without running code: load "
        "it where you made it, and save its `state_dict()`."
    )


def plain(name: str, tensor: Tensor, path: Path) -> Tensor:
    """A dense tensor with data.

    Raises:
        InputError: it has no data, or is quantized.
    """
    if tensor.is_meta or tensor.is_quantized:
        kind = "has no data (a meta tensor)" if tensor.is_meta else "is quantized"
        raise InputError(f"`{name}` in {path} {kind}: save the weights themselves.", "weights")
    return tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
