"""Detectors as MLflow models: image bytes in, scores out, over HTTP or in Python.

An MLflow model is a folder that holds the detector's folder, the code of `opnp` and, if the user's
own function makes the classifier, the code of that function; nothing in it is pickled. MLflow
imports this module from there and calls `_load_pyfunc`.

A request has a row for each image. The column ``image`` holds the encoded image as bytes, in JSON
as base64. A request above the limits is refused before an image is decoded.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

import opnp
from opnp.data.decoding import check_header, decode
from opnp.deployment.bundle import check, needs, pin
from opnp.deployment.detector import SavedDetector
from opnp.deployment.detector import load as load_detector
from opnp.errors import InputError
from opnp.runtime.settings import Positive, Settings, validated

__all__ = ["Limits", "Served", "save"]

REQUIREMENTS = (
    "mlflow", "torch", "torchvision", "numpy", "scipy", "pandas", "pyarrow", "pillow",
    "safetensors", "lazy-loader", "packaging", "pydantic", "fsspec", "fastapi", "uvicorn",
)  # fmt: skip
"""What this module imports, with all modules of `opnp` that it needs."""


class Limits(Settings):
    """The most that one request may hold."""

    images: Positive = Field(default=64, description="Number of images.")
    bytes: Positive = Field(default=20_000_000, description="Bytes of one encoded image.")
    pixels: Positive = Field(
        default=50_000_000, description="Pixels of one image, as its header states them."
    )


class Served:
    """A detector that takes encoded images, as MLflow calls it."""

    def __init__(self, detector: SavedDetector, limits: Limits):
        self.detector = detector
        self.limits = limits

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """Score encoded images.

        Args:
            model_input: a data frame with a row for each image, and the column ``image`` of bytes
                or base64.
            params: ignored.

        Returns:
            A data frame with a row for each image: ``score`` (larger means OOD), ``is_ood`` and
            ``predicted``, the name of a class.

        Raises:
            mlflow.exceptions.MlflowException: the request is at fault; a server answers with
                status 400.
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
        """Decode images one by one, after checking all of them against the limits."""
        limits = self.limits
        if not images:
            raise InputError("There are no images to score: give at least one.")
        if len(images) > limits.images:
            raise InputError(
                f"The request holds {len(images)} images, more than the {limits.images} allowed."
            )
        whole = [as_bytes(image, f"image {row}") for row, image in enumerate(images)]
        for row, data in enumerate(whole):
            if len(data) > limits.bytes:
                raise InputError(
                    f"image {row} has {len(data)} bytes, more than the {limits.bytes} allowed."
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
    """Load a detector; MLflow calls this function by its name.

    Args:
        path: the detector's folder.
        model_config: the values of `Limits`, and ``trust``, the user's function that was trusted
            when the model was logged and whose code lies beside the detector.

    Raises:
        InputError: the detector is damaged, or a value is invalid.
    """
    config = dict(model_config or {})
    trust = config.pop("trust", None)
    limits = validated(Limits, config, "model_config")
    return Served(load_detector(path, trust=trust), limits)


def save(detector: Path, path: Path, trust: str | None = None, **kwargs: Any) -> SavedDetector:
    """Write a detector's folder as an MLflow model.

    Args:
        detector: the detector's folder.
        path: the folder to write.
        trust: the ``package.module:factory`` that may run, if the detector's model is one.
        kwargs: further arguments of `mlflow.pyfunc.save_model`.

    Returns:
        The detector.

    Raises:
        InputError: the detector's folder is damaged, its model's code is not trusted, or it cannot
            be loaded with what was saved of it.
    """
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    loaded = load_detector(detector, trust=trust)
    own, more = needs(trust.partition(":")[0]) if trust else ([], set())
    if loaded.backbone.spec["name"].startswith("timm:"):
        more.add("timm")
    libraries = [*REQUIREMENTS, *sorted(more - set(REQUIREMENTS))]
    code = [Path(str(opnp.__file__)).parent, *own]
    config: dict[str, Any] = Limits().model_dump() | ({"trust": trust} if trust else {})
    columns = {"score": DataType.double, "is_ood": DataType.boolean, "predicted": DataType.string}
    pyfunc.save_model(
        str(path),
        loader_module="opnp.deployment.mlflow_model",
        data_path=str(detector),
        code_paths=[*map(str, code)],
        model_config=config,
        signature=ModelSignature(
            Schema([ColSpec(DataType.binary, "image")]),
            Schema([ColSpec(of, name) for name, of in columns.items()]),
        ),
        input_example=example(loaded),
        pip_requirements=[pin(each) for each in libraries],
        **kwargs,
    )
    check(path, libraries, code)
    return loaded


def example(detector: SavedDetector) -> Any:
    """A request of one grey image."""
    import pandas as pd

    preprocessing = detector.backbone.preprocessing
    grey, file = Image.new(preprocessing.mode, (preprocessing.size,) * 2, "grey"), BytesIO()
    grey.save(file, "png")
    return pd.DataFrame({"image": [file.getvalue()]})
