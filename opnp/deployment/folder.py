"""The folder that holds a detector: its files, its description, and checks that it is undamaged.

The folder holds all that scoring needs and nothing that could run code: tensors as safetensors,
everything else as JSON, with the SHA-256 of each file.

    detector.json             what the detector is and how it was made
    model.safetensors         the weights of the whole classifier, unpruned
    head.safetensors          the pruned head, which scores; its weights include the mask
    mask.safetensors          which weights and neurons stay
    sensitivity.safetensors   the sensitivities that the mask was chosen by
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from opnp.deployment.threshold import Threshold
from opnp.errors import InputError
from opnp.pruning.candidates import Candidate
from opnp.pruning.settings import NeuronSensitivity
from opnp.runtime.files import digest, read_json, write_json
from opnp.runtime.settings import validated

__all__ = [
    "ABOUT",
    "HEAD",
    "MASK",
    "MODEL",
    "SENSITIVITY",
    "UNPRUNED",
    "ClassesBy",
    "Description",
    "check_place",
    "read_description",
    "write_description",
]

ABOUT = "detector.json"
MODEL, HEAD, MASK = "model.safetensors", "head.safetensors", "mask.safetensors"
SENSITIVITY = "sensitivity.safetensors"
FILES = (MODEL, HEAD, MASK, SENSITIVITY)
FORMAT = 2

ClassesBy = Literal["unpruned head", "pruned head"]
UNPRUNED: ClassesBy = "unpruned head"


class Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Model(Part):
    name: str


class Score(Part):
    temperature: float
    clip: float | None


class Mask(Part):
    weights_low: float
    weights_high: float
    neurons_low: float
    neurons_high: float
    neuron_sensitivity: NeuronSensitivity


class Description(Part):
    """The parts of `detector.json` that are needed to load the detector."""

    digest: str
    files: dict[str, str]
    model: Model
    score: Score
    mask: Mask
    threshold: Threshold
    made: dict[str, Any]
    classes_by: ClassesBy = "pruned head"  # as folders of version 0.1, which do not say

    def candidate(self) -> Candidate:
        score = {"threshold": self.score.clip, "temperature": self.score.temperature}
        return Candidate.stated({**self.mask.model_dump(), **score})


def check_place(folder: Path, overwrite: bool) -> None:
    """Refuse to write a detector over anything else.

    Args:
        folder: where a detector is to be written.
        overwrite: whether it may replace another detector.

    Raises:
        InputError: the folder holds something else, or a detector that must stay.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / ABOUT).is_file()):
        raise InputError(f"{folder} exists and is not a detector: name another folder.")
    if any(folder.iterdir()) and not overwrite:
        raise InputError(f"{folder} already holds a detector: overwrite it, or name another.")


def write_description(folder: Path, about: dict[str, Any]) -> str:
    """Describe a detector whose other files are written, and return the description's digest."""
    files = {name: digest(folder / name) for name in FILES}
    about = {"opnp_detector": FORMAT, **about, "files": files}
    write_json(folder / ABOUT, {"digest": digest_of(about), **about})
    return digest_of(about)


def read_description(folder: Path) -> tuple[dict[str, Any], Description]:
    """Read a detector's description, and compare the folder with the digests in it.

    Returns:
        The whole of `detector.json`, and the validated parts.

    Raises:
        InputError: the folder is not a detector of this format, or is damaged.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise InputError(f"{folder} is not a detector ({ABOUT} is missing).", "fit")
    about = read_json(path, "detector")
    if not isinstance(about, dict) or about.get("opnp_detector") != FORMAT:
        raise InputError(f"{path} does not describe a detector of format {FORMAT}.", "fit")
    signed = {name: value for name, value in about.items() if name != "digest"}
    if about.get("digest") != digest_of(signed):
        raise InputError(f"{path} has been changed since it was written.", "detector")
    description = validated(Description, about, str(path), "detector")
    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing.", "detector")
        if digest(folder / name) != description.files.get(name):
            raise InputError(
                f"{folder / name} is damaged or of another detector: its SHA-256 is not the one in "
                f"{ABOUT}.",
                "detector",
            )
    return about, description


def digest_of(about: dict[str, Any]) -> str:
    """SHA-256 of a description, which ignores its layout and the time it was made."""
    made = about.get("made")
    if isinstance(made, dict):
        about = about | {"made": {key: value for key, value in made.items() if key != "at"}}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
