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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import timing
from opnp.backbones import shards
from opnp.backbones.backbone import Backbone, build, save_backbone
from opnp.data.imagesets import ImageSet, Manifest
from opnp.data.preprocessing import Preprocessing
from opnp.pipeline import parameters, stages
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.pipeline.results.data import data_parameters
from opnp.pipeline.results.features import expected
from opnp.runtime.files import write_json
from opnp.workspace import Workspace

__all__ = ["main", "stage", "write"]

ROOT = Path(__file__).parents[1]


def chosen(params: Path) -> Parameters:
    """The parameters, but that features are clipped at one percentile and at none."""
    found = parameters.load(params)
    search = found.search.model_copy(update={"clip": [None, 90.0], "temperature": [1.0]})
    return found.model_copy(update={"search": search})


def write(
    workspace: Workspace,
    settings: Parameters,
    samples: int,
    classes: int,
    width: int,
    shard_size: int,
) -> None:
    """A backbone and the features of ``samples`` training images."""
    torch.manual_seed(0)
    names = [str(label) for label in range(classes)]
    # Without a block, so that nearly all it holds is the head.
    spec: dict[str, Any] = {"name": "vit", "width": width // 4, "depth": 0}
    model = build(channels=1, classes=classes, size=8, **spec)
    preprocessing = Preprocessing(8, "L", (0.5,), (0.5,))
    save_backbone(workspace.backbone, Backbone(model, preprocessing, names, spec))
    train = ImageSet("train", "synthetic", samples, {}, "0" * 64)
    workspace.images("train").parent.mkdir()
    workspace.images("train").touch()  # only the features are read
    fetched = data_parameters(settings)
    write_json(workspace.manifest, Manifest(fetched, names, {"train": train}).as_json())
    origin, dtype = expected(Run(workspace, settings), "train"), settings.features.dtype
    block = torch.randn(shard_size, width).relu()
    labels = np.zeros(shard_size, np.int64)
    for shard in shards.divide("train", samples, shard_size):
        rows = shard.stop - shard.start
        path = shard.path(workspace.features)
        shards.write_shard(path, shard, shards.Encoded(block[:rows], labels[:rows]), origin, dtype)


def stage(settings: Parameters) -> None:
    """The stage, shard by shard, in this process; print what it took."""
    before, start = peak(), time.perf_counter()
    workspace = Workspace(Path.cwd())
    planned = stages.sensitivity.plan(workspace, settings)
    for name in planned:
        stages.sensitivity.compute(workspace, settings, name)
    merged = stages.sensitivity.finish(workspace, planned)
    found = {
        "samples": merged[0].count,
        "shards": len(planned),
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
        workspace, shape = Workspace(Path(folder)), (arguments.classes, arguments.width)
        write(workspace, settings, samples, *shape, arguments.shard_size)
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
