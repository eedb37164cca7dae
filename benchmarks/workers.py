"""The feature stage on one worker and on two, and what the machine itself gives.

The flow runs as it does in the pipeline, against a Prefect server, over the image sets of FILE (the
digits) with an untrained backbone wide enough that shards take about a second; beside it the same
shards are computed by plain threads or processes without Prefect. Every worker has one thread.
Features are removed before each run. Goal: two workers at least 1.8 × as fast as one.

Run ``python -m benchmarks.workers [--runner processes] [--width N] [--shard-size N] [--repeats N]
[--params FILE] [--json]``.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, chdir
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import timing
from flows import prefect_server
from flows import workers as engine
from opnp.backbones.backbone import Backbone, build, save_backbone
from opnp.data import imagesets
from opnp.data.preprocessing import Preprocessing
from opnp.pipeline import parameters, stages
from opnp.pipeline.parameters import Parameters
from opnp.workspace import Workspace

__all__ = ["main", "measured"]


def chosen(arguments: argparse.Namespace) -> Parameters:
    found = parameters.load(arguments.params)
    features = found.features.model_copy(update={"shard_size": arguments.shard_size})
    return found.model_copy(update={"features": features})


def with_workers(settings: Parameters, runner: str, workers: int) -> Parameters:
    on = settings.engine.model_copy(update={"runner": runner, "workers": workers})
    return settings.model_copy(update={"engine": on})


def prepare(workspace: Workspace, settings: Parameters, width: int) -> None:
    """Write the image sets, and a backbone with random weights."""
    manifest, data = stages.fetch.run(workspace, settings), settings.data
    spec: dict[str, Any] = {"name": "resnet", "width": width, "depth": 1}
    model = build(
        channels=len(data.mode), classes=len(manifest.classes), size=data.image_size, **spec
    )
    pixels, _ = imagesets.read(workspace.images("train"), data.mode, data.image_size)
    measured = Preprocessing.measured(pixels)
    backbone = Backbone(model, measured, manifest.classes, spec)
    save_backbone(workspace.backbone, backbone)


def remove_features(workspace: Workspace) -> None:
    shutil.rmtree(workspace.features, ignore_errors=True)


def plain(pool: Executor, workspace: Workspace, settings: Parameters) -> None:
    """The shards, computed by a pool."""
    planned = stages.features.plan(workspace, settings)
    for computed in pool.map(partial(stages.features.compute, workspace, settings), planned):
        assert computed
    stages.features.finish(workspace, planned)


def pool_of(runner: str, workers: int) -> Executor:
    if runner == "threads":
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, get_context("spawn"))


def measured(
    workspace: Workspace, settings: Parameters, runner: str, repeats: int
) -> dict[str, Any]:
    """Times of one worker and of two, with Prefect and without."""
    with ExitStack() as stack:
        stack.enter_context(prefect_server.running())
        from flows.stages import features

        works: dict[str, Callable[[], None]] = {}
        for workers in (1, 2):
            on = with_workers(settings, runner, workers)
            pool = stack.enter_context(pool_of(runner, workers))
            works[f"flow, {workers}"] = partial(engine.run, features, workspace, on)
            works[f"plain, {workers}"] = partial(plain, pool, workspace, on)
        for work in works.values():  # warms up: pools begin, modules are imported
            remove_features(workspace)
            work()
        seconds = timing.interleaved(works, repeats, before=partial(remove_features, workspace))
        planned = stages.features.plan(workspace, settings)
    times = timing.ratio(seconds, "flow, 1", "flow, 2")
    sentence = "two workers at least 1.8 × as fast as one on the feature stage"
    return {
        "runner": runner,
        "repeats": repeats,
        "shards": len(planned),
        "seconds_a_shard": median(seconds["plain, 1"]) / len(planned),
        "times": [{"work": name, "seconds": median(of)} for name, of in seconds.items()],
        "plain_ratio": timing.ratio(seconds, "plain, 1", "plain, 2"),
        "prefect_ratio_1": timing.ratio(seconds, "flow, 1", "plain, 1"),
        "prefect_ratio_2": timing.ratio(seconds, "flow, 2", "plain, 2"),
        "goals": [timing.goal(sentence, times, times >= 1.8)],
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.workers", description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--runner", choices=("threads", "processes"), default="threads")
    parser.add_argument("--width", type=int, default=256, help="of the ResNet")
    parser.add_argument("--shard-size", type=int, default=256, help="images")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    settings = chosen(arguments)
    # The server, and processes that are started anew, import this code from where it is.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.getenv("PYTHONPATH"))))
    os.environ["PYTHONPATH"] = path
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        workspace = Workspace(Path(folder))
        prepare(workspace, settings, arguments.width)
        result = measured(workspace, settings, arguments.runner, arguments.repeats)
    timing.show(result, arguments.json, f"workers, {arguments.runner}")


if __name__ == "__main__":
    main()
