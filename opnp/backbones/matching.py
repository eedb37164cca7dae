"""Weights put into a model: their names are matched with the model's, and what differs is told."""

import copy
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opnp.errors import InputError

__all__ = ["align", "check_tensors", "load_state"]

WRAPPING = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DataParallel, torch.compile and FSDP put into the names of what they wrap."""

COUNTER = ".num_batches_tracked"
"""A counter of batch normalization, which inference does not use; torch 0.4.0 had none."""

AVERAGED = "n_averaged"
"""A counter beside the weights of `torch.optim.swa_utils.AveragedModel`."""

TOLD = 3
"""Differences told in one sentence."""

# torchvision's oldest files of DenseNets are from when the name of a module could contain a dot.
DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def align(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors under those names of which the most are the model's.

    Tried are the names as they are, and without what wrappers put into them (``module.``,
    ``_orig_mod.``), each also without the leading parts that all names share, such as ``model.`` in
    a file of Lightning.
    """
    old = {DENSENET.sub(r"\1\2", name): tensor for name, tensor in state.items()}
    expected = {name: name for name in model.state_dict()}
    if AVERAGED not in expected:
        old.pop(AVERAGED, None)
    plain = [name.split(".") for name in old]
    bare = {".".join(unwrapped(name.split("."))): name for name in expected}
    best, most = list(old), hits(list(old), expected)
    for names, known in ((plain, expected), ([unwrapped(parts) for parts in plain], bare)):
        for depth in range(shared(names) + 1):
            found = [".".join(parts[depth:]) for parts in names]
            if len(set(found)) == len(found) and hits(found, known) > most:
                best, most = [known.get(name, name) for name in found], hits(found, known)
    return dict(zip(best, old.values(), strict=True))


def unwrapped(parts: Sequence[str]) -> list[str]:
    return [part for part in parts if part not in WRAPPING]


def shared(names: Sequence[Sequence[str]]) -> int:
    """How many leading parts all names share; the last part of a name is its own."""
    count = 0
    for parts in zip(*(name[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count


def hits(names: Sequence[str], expected: Collection[str]) -> int:
    return sum(name in expected for name in names)


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Give a model the weights of a state dict, converted to the model's own precision.

    Args:
        model: gets the weights.
        state: all its tensors by name, see `align`; counters of batch normalization may be missing.
        what: names the weights in errors, such as "The weights in FILE".

    Raises:
        InputError: names, shapes or kinds of numbers differ; at most three are named.
    """
    aligned, expected = align(state, model), model.state_dict()
    told = differences(aligned, expected)
    versions = getattr(expected, "_metadata", {})
    if told:
        # Some modules of torchvision rename the tensors of files older than a version of theirs.
        versions = {}
        whole = any(kind(name, aligned, expected) for name in aligned if name in expected)
        if whole or not fits(copy.deepcopy(model), aligned):
            part = part_that_fits(state, model)
            if part is not None:
                told = [f"those under `{part}.` do, but not all: end the file's name in #{part}"]
            elif not hits(list(aligned), expected.keys()):
                one, other = next(iter(aligned)), next(iter(expected), "none")
                told = [f"they are named like `{one}`, the model's like `{other}`"]
            more = f", and {len(told) - TOLD} more" if len(told) > TOLD else ""
            words = "; ".join(told[:TOLD]) + more
            if outputs := other_outputs(aligned, expected):
                theirs, ours = outputs
                raise InputError(
                    f"{what} have {theirs} outputs, but the model has {ours} ({words}).", "classes"
                )
            raise InputError(f"{what} do not fit the model ({words}).", "weights")
    load(model, aligned, versions)


def part_that_fits(state: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """The first part of names under which the tensors fit the model, although others do not."""
    expected = model.state_dict()
    for part in dict.fromkeys(name.partition(".")[0] for name in state):
        start = f"{part}."
        under = {n.removeprefix(start): each for n, each in state.items() if n.startswith(start)}
        if under and not differences(align(under, model), expected):
            return part
    return None


def load(model: nn.Module, state: Mapping[str, Tensor], versions: Mapping[str, Any]) -> list[str]:
    """Load tensors as those of modules of some versions; the names that were not as expected."""
    given = OrderedDict(state)
    given._metadata = versions  # type: ignore[attr-defined]
    missing, unexpected = model.load_state_dict(given, strict=False)
    return [*unexpected, *(name for name in missing if not name.endswith(COUNTER))]


def fits(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether tensors of no version fit a model, which is a copy and may get some of them."""
    try:
        return not load(model, state, {})
    except (RuntimeError, ValueError):  # of other shapes, or a version is needed
        return False


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What differs, each in words: shapes and kinds of numbers, then names."""
    both = [name for name in found if name in expected]
    return [
        *(
            f"`{name}` is {tuple(found[name].shape)} in the weights and "
            f"{tuple(expected[name].shape)} in the model"
            for name in both
            if found[name].shape != expected[name].shape
        ),
        *(
            f"`{name}` is {str(found[name].dtype).removeprefix('torch.')}, not floating point"
            for name in both
            if kind(name, found, expected)
        ),
        *(
            f"`{name}` is missing"
            for name in expected
            if name not in found and not name.endswith(COUNTER)
        ),
        *(f"the model has no `{name}`" for name in found if name not in expected),
    ]


def other_outputs(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[int, int] | None:
    """The sizes of the weights' last layer and of the model's, if they differ in nothing else."""
    told = differences(found, expected)
    other = [n for n in found if n in expected and found[n].shape != expected[n].shape]
    if len(other) < len(told) or any(
        found[n].shape[1:] != expected[n].shape[1:] or not found[n].ndim for n in other
    ):
        return None
    sizes = {(len(found[n]), len(expected[n])) for n in other}
    return sizes.pop() if len(sizes) == 1 and len(other) <= 2 else None


def kind(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether whole or complex numbers are given for floating-point ones."""
    return expected[name].is_floating_point() and not found[name].is_floating_point()


def check_tensors(model: nn.Module, what: str) -> None:
    """Refuse a model that cannot be saved, or that computes nothing of use.

    Args:
        model: whose parameters must be finite, and so must the statistics of batch normalization;
            other buffers, such as a mask of attention, may be infinite.
        what: names the weights in errors, such as "The weights in FILE".

    Raises:
        InputError: a tensor has no data, is sparse, or holds NaN or infinite values.
    """
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or tensor.layout != torch.strided:
            fault = "without data (meta tensors)" if tensor.is_meta else "that are sparse"
            raise InputError(f"{what} hold values {fault}: `{name}`.", "weights")
        infinite = name in parameters or ".running_" in f".{name}"
        if tensor.is_floating_point():
            fine = tensor.isfinite() if infinite else ~tensor.isnan()
            if not fine.all():
                raise InputError(f"{what} hold NaN or infinite values: `{name}`.", "weights")
