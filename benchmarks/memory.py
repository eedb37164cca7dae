"""The memory that the stage of the sensitivity takes, as the training set grows.

Goal: the peak resident size grows by less than 10 % from 100,000 to 1,000,000 samples at L = 2048.
The stage's own functions run on synthetic shards, each number of samples in a process of its own;
shards of a million samples take 8 GB in FOLDER, and are removed. Linux only: the kernel tells the
peak of one program. (``ru_maxrss`` would count that of the program which started it as well.)

Run ``python -m benchmarks.memory [--folder FOLDER] [--samples N …] [--json]``.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import timing
from opnp import workspace
from opnp.backbones import shards
from opnp.backbones.backbone import Backbone, build, save_backbone
from opnp.data.imagesets import ImageSet, Manifest, data_file
from opnp.data.preprocessing import Preprocessing
from opnp.pipeline import parameters, stages
from opnp.pipeline.parameters import Parameters
from opnp.runtime.files import write_json

__all__ = ["main", "stage", "write"]

ROOT = Path(__file__).parents[1]


def chosen(params: Path) -> Parameters:
    """The parameters, but that features are clipped at one percentile and at none."""
    found = parameters.load(params)
    search = found.search.model_copy(update={"clip": [None, 90.0], "temperature": [1.0]})
    return found.model_copy(update={"search": search})


def write(settings: Parameters, samples: int, classes: int, width: int, shard_size: int) -> None:
    """A workspace with a backbone and the features of ``samples`` training images."""
    torch.manual_seed(0)
    names = [str(label) for label in range(classes)]
    # Without a block, so that nearly all it holds is the head.
    spec: dict[str, Any] = {"name": "vit", "width": width // 4, "depth": 0}
    model = build(channels=1, classes=classes, size=8, **spec)
    preprocessing = Preprocessing(8, "L", (0.5,), (0.5,))
    save_backbone(workspace.BACKBONE, Backbone(model, preprocessing, names, spec))
    train = ImageSet("train", "synthetic", samples, {}, "0" * 64)
    data_file("train").parent.mkdir()
    data_file("train").touch()  # only the features are read
    fetched = stages.fetch.data_parameters(settings)
    write_json(workspace.MANIFEST, Manifest(fetched, names, {"train": train}).as_json())
    origin = stages.features.expected_metadata(settings, "train")
    block = torch.randn(shard_size, width).relu()
    labels = np.zeros(shard_size, np.int64)
    for shard in shards.divide("train", samples, shard_size):
        rows = shard.stop - shard.start
        shards.write_shard(shard, block[:rows], labels[:rows], origin, settings.features.dtype)


def stage(settings: Parameters) -> None:
    """The stage, shard by shard, in this process; print what it took."""
    before, start = peak(), time.perf_counter()
    paths = stages.sensitivity.plan(settings)
    for path in paths:
        stages.sensitivity.compute(settings, path)
    merged = stages.sensitivity.merge(paths)
    found = {
        "samples": merged[0].count,
        "shards": len(paths),
        "seconds": time.perf_counter() - start,
        "imported_mib": before,
        "peak_mib": peak(),
    }
    print(json.dumps(found))


def peak() -> float:
    """The most memory that this program has had resident, in MiB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def measured(arguments: argparse.Namespace, samples: int) -> dict[str, Any]:
    """What the stage takes for a number of samples."""
    settings = chosen(arguments.params)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        with chdir(folder):
            write(settings, samples, arguments.classes, arguments.width, arguments.shard_size)
        words = ("-m", "benchmarks.memory", "--params", str(arguments.params.resolve()), "--stage")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            check=True,
        )
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--folder", type=Path, help="for the shards; default: the temporary one")
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--classes", type=int, default=100, help="K")
    parser.add_argument("--width", type=int, default=2048, help="L")
    parser.add_argument("--shard-size", type=int, default=8192)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--stage", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        stage(chosen(arguments.params))
        return
    rows = [measured(arguments, samples) for samples in arguments.samples]
    growth = 100 * (rows[-1]["peak_mib"] / rows[0]["peak_mib"] - 1)
    sentence = (
        f"peak resident size grows by less than 10 % from {rows[0]['samples']:,} to "
        f"{rows[-1]['samples']:,} samples"
    )
    result = {
        "K": arguments.classes,
        "L": arguments.width,
        "shard_size": arguments.shard_size,
        "runs": rows,
        "goals": [timing.goal(sentence, growth, growth < 10)],
    }
    timing.show(result, arguments.json, "memory of the sensitivity")


if __name__ == "__main__":
    main()
