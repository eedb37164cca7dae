"""What the tools around the computation cost: `make run` against its plain function calls.

In a new clone of this repository ``python -m flows.pipeline`` runs from nothing (Prefect and its
server, DVC, MLflow, imports); in another one a single process calls ``run`` of every stage. What is
committed here is measured, with this interpreter's packages. Goal: the pipeline takes at most 2 ×
the sum of the calls.

Run ``python -m benchmarks.orchestration [--params FILE] [--repeats N] [--json]``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import timing

__all__ = ["calls", "main"]

ROOT = Path(__file__).parents[1]
STAGES = ("fetch", "train", "features", "sensitivity", "search", "evaluate", "report")


def calls() -> None:
    """Call every stage in this process and print the seconds of each, and of the imports."""
    start = time.perf_counter()
    from opnp.pipeline import parameters, stages

    seconds = {"imports": time.perf_counter() - start}
    chosen = parameters.load()
    for stage in STAGES:
        start = time.perf_counter()
        getattr(stages, stage).run(chosen)
        seconds[stage] = time.perf_counter() - start
    print(json.dumps(seconds))


def ran(words: tuple[str, ...], params: Path) -> tuple[float, str]:
    """Run a module of a new clone in it; the wall time in seconds, and what it printed.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        shutil.copy(params, Path(folder, "params.yaml"))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # A server or a store that somebody else keeps is none that the pipeline starts from.
        named = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PYTHONPATH")
        env = {name: value for name, value in os.environ.items() if name not in named}
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=folder,
            env={**env, "PATH": path},
            capture_output=True,
            text=True,
        )
        took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return took, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.orchestration", description=__doc__)
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--calls", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.calls:
        calls()
        return
    seconds: dict[str, list[float]] = {"pipeline": [], "process": [], "calls": [], "imports": []}
    by_stage: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for _ in range(arguments.repeats):
        seconds["pipeline"].append(ran(("flows.pipeline",), arguments.params)[0])
        process, printed = ran(("benchmarks.orchestration", "--calls"), arguments.params)
        told = json.loads(printed.splitlines()[-1])
        seconds["process"].append(process)
        seconds["imports"].append(told["imports"])
        seconds["calls"].append(sum(told[stage] for stage in STAGES))
        for stage in STAGES:
            by_stage[stage].append(told[stage])
    times = timing.ratio(seconds, "pipeline", "calls")
    result: dict[str, Any] = {
        "repeats": arguments.repeats,
        "medians_of": f"{arguments.repeats} alternating runs"
        + (", fewer than 5" if arguments.repeats < 5 else ""),
        "times": [
            {"what": what, "seconds": median(seconds[name])}
            for what, name in (
                ("the pipeline", "pipeline"),
                ("one process with the calls, imports included", "process"),
                ("its imports", "imports"),
                ("its calls", "calls"),
            )
        ],
        "calls": [{"stage": name, "seconds": median(of)} for name, of in by_stage.items()],
        "ratio_to_the_process": timing.ratio(seconds, "pipeline", "process"),
        "goals": [timing.goal("the pipeline at most 2 × the sum of its calls", times, times <= 2)],
    }
    timing.show(result, arguments.json, "orchestration")


if __name__ == "__main__":
    main()
