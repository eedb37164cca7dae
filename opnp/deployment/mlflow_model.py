"""Detectors as MLflow models: image bytes in, scores out, over HTTP or in Python.

An MLflow model is a folder with the detector's folder, the code of `opnp` and, where the model is
a factory of the user's, its code; nothing in it is pickled. MLflow imports this module from it and
calls `_load_pyfunc`.

A request has a row for each image, with the encoded image in the column ``image``: bytes, in JSON
as base64. What is too much is refused before anything is decoded.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

import opnp
from opnp.data.decoding import check_header, decode
from opnp.deployment.detector import SavedDetector
from opnp.deployment.detector import load as load_detector
from opnp.errors import InputError
from opnp.runtime.settings import Positive, Settings, validated

__all__ = ["Limits", "Served", "save"]

REQUIREMENTS = (
    "mlflow", "torch", "torchvision", "numpy", "pandas", "pyarrow", "pillow", "safetensors",
    "scikit-learn", "lazy-loader", "pydantic", "rich", "fsspec", "filelock", "fastapi",
    "uvicorn",
)  # fmt: skip


class Limits(Settings):
    """What one request may hold."""

    images: Positive = Field(default=64, description="Number of images.")
    bytes: Positive = Field(default=20_000_000, description="Size of one encoded image.")
    pixels: Positive = Field(
        default=50_000_000, description="Pixels of one image, as its header states them."
    )


class Served:
    """What MLflow calls: a detector that takes encoded images."""

    def __init__(self, detector: SavedDetector, limits: Limits):
        self.detector = detector
        self.limits = limits

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """Score encoded images.

        Args:
            model_input: a data frame with the column ``image``, of bytes or base64.
            params: none are known.

        Returns:
            A data frame with ``score`` (larger means OOD), ``is_ood`` and ``predicted``, a row for
            each image.

        Raises:
            mlflow.exceptions.MlflowException: the request is at fault; a server answers 400.
        """
        import pandas as pd
        from mlflow.exceptions import MlflowException

        try:
            found = self.detector.score(self.opened(list(model_input["image"])))
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame(
            {
                "score": found.score.astype("float64"),
                "is_ood": found.is_ood,
                "predicted": found.predicted,
            }
        )

    def opened(self, images: Sequence[Any]) -> Iterator[Image.Image]:
        """Decode images one after another, once all are known to be few, short and small enough."""
        limits = self.limits
        if not images:
            raise InputError("There are no images to score: give at least one.")
        if len(images) > limits.images:
            raise InputError(
                f"A request of {len(images)} images has more than the {limits.images} allowed."
            )
        whole = [as_bytes(image, f"image {row}") for row, image in enumerate(images)]
        for row, data in enumerate(whole):
            if len(data) > limits.bytes:
                raise InputError(
                    f"image {row} is of {len(data)} bytes, more than the {limits.bytes} it may be."
                )
            check_header(data, f"image {row}", limits.pixels)
        return (decode(data, f"image {row}") for row, data in enumerate(whole))


def as_bytes(image: Any, where: str) -> bytes:
    if isinstance(image, str):
        try:
            return base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise InputError(f"{where} is neither bytes nor base64.") from None
    if not isinstance(image, bytes | bytearray):
        raise InputError(f"{where} is neither bytes nor base64.")
    return bytes(image)


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> Served:
    """Read a detector for MLflow, which calls this by its name.

    Args:
        path: the detector's folder.
        model_config: `Limits`, and ``trust``: the user's factory that was trusted when the model
            was logged, whose code lies beside the detector.
    """
    config = dict(model_config or {})
    trust = config.pop("trust", None)
    limits = validated(Limits, config, "model_config")
    return Served(load_detector(path, trust=trust), limits)


def save(detector: Path, path: Path, trust: str | None = None, **kwargs: Any) -> SavedDetector:
    """Write a detector's folder as an MLflow model.

    Args:
        detector: its folder.
        path: the model's folder.
        trust: the ``package.module:factory`` that may run, if its model is one.
        kwargs: for `mlflow.pyfunc.save_model`.

    Raises:
        InputError: the detector's folder is damaged, or its model's code is not trusted.
    """
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    loaded = load_detector(detector, trust=trust)
    config: dict[str, Any] = Limits().model_dump() | ({"trust": trust} if trust else {})
    columns = {"score": DataType.double, "is_ood": DataType.boolean, "predicted": DataType.string}
    pyfunc.save_model(
        str(path),
        loader_module="opnp.deployment.mlflow_model",
        data_path=str(detector),
        code_paths=code(trust),
        model_config=config,
        signature=ModelSignature(
            Schema([ColSpec(DataType.binary, "image")]),
            Schema([ColSpec(of, name) for name, of in columns.items()]),
        ),
        input_example=example(loaded),
        pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
        **kwargs,
    )
    return loaded


def code(trust: str | None) -> list[str]:
    """The code that scoring needs: this package, and a factory's package or file."""
    paths = [str(Path(str(opnp.__file__)).parent)]
    if trust:
        found = find_spec(trust.partition(":")[0].partition(".")[0])
        if found is None or found.origin is None:
            raise InputError(f"The code of {trust} is in no file: install it where it is served.")
        file = Path(found.origin)
        if "site-packages" not in file.parts:  # what is installed is installed where it is served
            paths.append(str(file.parent if found.submodule_search_locations else file))
    return paths


def example(detector: SavedDetector) -> Any:
    """One grey image, as a data frame."""
    import pandas as pd

    preprocessing = detector.backbone.preprocessing
    grey, file = Image.new(preprocessing.mode, (preprocessing.size,) * 2, "grey"), BytesIO()
    grey.save(file, "png")
    return pd.DataFrame({"image": [file.getvalue()]})
