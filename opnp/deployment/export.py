"""Detectors for other runtimes: one program from images to logits and scores, without Python.

The program takes images in [0, 1], float32 (N, C, H, W) with any N, not normalized. It returns
logits (N, K) and outlier scores (N,); larger means OOD. The file also holds the preprocessing, the
threshold and the classes, as JSON named `detector.json`.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opnp.deployment.detector import SavedDetector
from opnp.errors import InputError, UnavailableError, first_line
from opnp.runtime.files import atomic

__all__ = ["FORMATS", "TOLERANCE", "export"]

NAME = "detector.json"
TOLERANCE = 1e-4  # of the program's scores, absolute and relative to the detector's


def export(detector: SavedDetector, path: Path, format: str) -> None:
    """Write the program, if its scores equal the detector's.

    Args:
        detector: the detector to export.
        path: the file to write.
        format: ``torch``, a `torch.export` program (.pt2), or ``onnx``, which needs `opnp[onnx]`.

    Raises:
        InputError: the format is unknown, the model cannot be exported, or the scores differ.
        UnavailableError: the libraries for ONNX are not installed.
    """
    if format not in FORMATS:
        raise InputError(f"There is no format {format!r}: choose {' or '.join(FORMATS)}.")
    if missing := [name for name in NEEDS.get(format, ()) if find_spec(name) is None]:
        raise UnavailableError(f"ONNX needs {', '.join(missing)}: install opnp[onnx].")
    preprocessing = detector.backbone.preprocessing
    drawn = torch.Generator().manual_seed(0)
    shape = (preprocessing.channels, preprocessing.size, preprocessing.size)
    two, three = (torch.rand(n, *shape, generator=drawn) for n in (2, 3))
    # Traced with two images, since torch would take a batch of one as a constant.
    scorer = deepcopy(detector.scorer).cpu()
    batch = {"images": {0: torch.export.Dim("batch")}}
    try:
        program = torch.export.export(scorer, (two,), dynamic_shapes=batch)
    except Exception as error:  # torch.export raises errors of all kinds for what it cannot trace
        reason = first_line(error)
        raise InputError(f"{detector.backbone.spec} cannot be exported: {reason}") from error
    about = json.dumps(detector.describe())
    with atomic(path) as temporary, torch.no_grad():
        FORMATS[format](program, temporary, about)
        for images in (three, three[:1]):
            expected, found = scorer(images)[1], RUN[format](temporary, images)
            if not torch.allclose(expected, found, rtol=TOLERANCE, atol=TOLERANCE):
                gap = float((expected - found).abs().max())
                raise InputError(
                    f"The program's scores differ by {gap:.2g} from the detector's: "
                    f"{detector.backbone.spec} cannot be exported as {format}."
                )


def write_torch(program: torch.export.ExportedProgram, path: Path, about: str) -> None:
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={NAME: about})


def run_torch(path: Path, images: Tensor) -> Tensor:
    with open(path, "rb") as file:
        scores: Tensor = torch.export.load(file).module()(images)[1]
    return scores


def write_onnx(program: torch.export.ExportedProgram, path: Path, about: str) -> None:
    import onnx

    exported = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=["logits", "score"],
        dynamo=True,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = NAME, about
    onnx.save(model, path)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["score"], {"images": images.numpy()})[0])


FORMATS: dict[str, Callable[[torch.export.ExportedProgram, Path, str], Any]] = {
    "torch": write_torch,
    "onnx": write_onnx,
}
"""The function that writes each format."""

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}

RUN: dict[str, Callable[[Path, Tensor], Tensor]] = {"torch": run_torch, "onnx": run_onnx}
