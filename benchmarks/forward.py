"""A forward pass on the CPU with freed memory kept, as `opnp.runtime.malloc` does, and without.

Goal: not slower. Processes take turns, each with one setting; a thread of theirs, as the workers of
the pipeline are, runs the model over batches of images. Run ``python -m benchmarks.forward
[--models resnet18 efficientnet_b0] [--threads N] [--json]``.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from statistics import median
from typing import Any

from benchmarks import timing
from opnp.runtime import malloc

__all__ = ["main"]

SETTINGS = ("given back", "kept")


def child(model: str, threads: int, batch: int, batches: int) -> dict[str, float]:
    """One forward pass over all batches, in a thread, after one to warm up."""
    import torch
    import torchvision

    found: dict[str, float] = {}

    def work() -> None:
        torch.set_num_threads(threads)
        network = torchvision.models.get_model(model, weights=None).eval()
        images = torch.zeros(batch, 3, 224, 224)
        with torch.inference_mode():
            network(images)
            system, start = resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()
            for _ in range(batches):
                network(images)
        found["seconds"] = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_SELF)
        found["of_the_system"] = usage.ru_stime - system
        found["peak_MiB"] = usage.ru_maxrss / 1024

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    images = arguments.batch_size * arguments.batches
    rows, goals = [], []
    for model in arguments.models:
        runs: dict[str, list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
        for _ in range(arguments.repeats):
            for setting in SETTINGS:
                words = [f"--child={setting}", f"--models={model}"]
                for name in ("threads", "batch_size", "batches"):
                    words.append(f"--{name.replace('_', '-')}={getattr(arguments, name)}")
                env = {key: value for key, value in os.environ.items() if "MALLOC_" not in key}
                command = [sys.executable, "-m", "benchmarks.forward", *words]
                done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
                runs[setting].append(json.loads(done.stdout))
        for setting, of in runs.items():
            middle = {key: median(each[key] for each in of) for key in of[0]}
            about = {"model": model, "freed_memory": setting}
            rows.append(about | middle | {"images_per_second": images / middle["seconds"]})
        seconds = {setting: [each["seconds"] for each in of] for setting, of in runs.items()}
        times = timing.ratio(seconds, *SETTINGS)
        goals.append(timing.goal(f"{model}: times as fast, at least 1", times, times >= 1))
    about = {"threads": arguments.threads, "batch": arguments.batch_size, "images": images}
    return about | {"repeats": arguments.repeats, "passes": rows, "goals": goals}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.forward", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "efficientnet_b0"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.child:
        if arguments.child == "kept":
            malloc.keep()
        (model,) = arguments.models
        found = child(model, arguments.threads, arguments.batch_size, arguments.batches)
        print(json.dumps(found))
        return
    timing.show(measure(arguments), arguments.json, "forward")


if __name__ == "__main__":
    main()
