"""OPNP and every other detector on CIFAR-10: near Tiny-ImageNet, far textures and MNIST.

DATA holds ``cifar10-train.parquet`` and ``cifar10-test.parquet``, whose schema metadata name the
classes, ``tiny-imagenet-val-minus-cifar10.parquet``, ``textures-96px.parquet``, and the MNIST test
set as IDX files. These CIFAR-10 images have been compressed as JPEG of quality 75; the OOD images
are brought to 32 × 32 and the same quality, or compression alone would tell them apart.

Run ``python -m benchmarks.cifar10 DATA FOLDER [--seeds N] [--json]``; a stage whose results are in
FOLDER is not run again. The goals are those of `benchmarks.backbones`.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.backbones import IMAGE_DETECTORS, measure, show, summary
from opnp.data.imagesets import IMAGE
from opnp.data.preprocessing import fit
from opnp.data.sources import open_ood
from opnp.pipeline import parameters
from opnp.pipeline.parameters import Parameters
from opnp.runtime.files import atomic

__all__ = ["OOD", "jpeg", "main", "mnist", "prepare"]

OOD = {
    "tiny-imagenet": "tiny-imagenet-val-minus-cifar10.parquet",
    "textures": "textures-96px.parquet",
    "mnist": "mnist",
}


def mnist(data: Path, folder: Path) -> Path:
    """A folder of the MNIST test set alone, which `opnp` reads as one source."""
    place = folder / "mnist"
    place.mkdir(parents=True, exist_ok=True)
    for file in data.glob("t10k-*"):
        shutil.copy2(file, place)
    return place


def jpeg(image: Image.Image) -> bytes:
    """An image as the CIFAR-10 images here are: 32 × 32, of quality 75."""
    encoded = BytesIO()
    fit(image, 32, "RGB").save(encoded, "JPEG", quality=75)
    return encoded.getvalue()


def prepare(data: Path, folder: Path) -> None:
    """Write the splits with their class names, and the OOD images compressed as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        table = pq.read_table(data / f"cifar10-{split}.parquet")
        names = table.schema.metadata[b"classes"].decode().splitlines()
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        with atomic(folder / f"{split}.parquet") as temporary:
            pq.write_table(table.replace_schema_metadata(metadata), temporary)
    for name, source in OOD.items():
        spec = str(mnist(data, folder) if source == "mnist" else data / source)
        found = open_ood(spec, size=32, seed=0)
        rows = [{"bytes": jpeg(image), "path": None} for image, _ in found]
        columns = {"image": pa.array(rows, IMAGE), "label": pa.array([-1] * len(rows), pa.int64())}
        with atomic(folder / f"{name}.parquet") as temporary:
            pq.write_table(pa.table(columns), temporary)


def configured(chosen: Parameters, prepared: Path, seed: int, without: Sequence[str]) -> Parameters:
    """The parameters of one workspace."""
    values: dict[str, Any] = chosen.model_dump()
    values["seed"] = values["data"]["seed"] = seed
    values["data"] |= {
        "id": str(prepared),
        "image_size": 32,
        "mode": "RGB",
        "validation": 6.0,
        "near": {"tiny-imagenet": str(prepared / "tiny-imagenet.parquet")},
        "far": {name: str(prepared / f"{name}.parquet") for name in ("textures", "mnist")},
    }
    values["evaluate"]["detectors"] = [
        name for name in chosen.evaluate.detectors if name not in without
    ]
    values["train"] |= {"epochs": 14, "precision": "bfloat16", "shift_pixels": 3, "threads": 1}
    return Parameters.model_validate(values)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.cifar10", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--params", type=Path, default=Path("presets/fashion-mnist.yaml"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--without", nargs="*", default=IMAGE_DETECTORS, metavar="DETECTOR", help="left out"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    chosen = parameters.load(arguments.params)
    prepared = (arguments.folder / "images").resolve()
    if not (prepared / "mnist.parquet").is_file():
        prepare(arguments.data, prepared)
    runs = [
        measure(
            configured(chosen, prepared, seed, arguments.without),
            arguments.folder / f"cifar10-resnet-{seed}",
        )
        for seed in range(arguments.seeds)
    ]
    show(summary({"resnet": runs}), arguments.json, f"CIFAR-10, {arguments.seeds} seed(s)")


if __name__ == "__main__":
    main()
