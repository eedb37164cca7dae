"""OPNP against Energy over several seeds: each draws the split, the training and the proxies anew.

The goal is a lower mean FPR95 than Energy's, averaged over the seeds, with the mask chosen without
OOD data. Run ``python -m benchmarks.seeds [--params FILE] [--seeds N] [--json]``.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from opnp.pipeline import parameters, stages
from opnp.pipeline.parameters import Parameters
from opnp.workspace import Workspace

__all__ = ["main", "measure"]


def measure(chosen: Parameters) -> dict[str, Any]:
    """All stages but the report, in a folder of their own; what `evaluate` found."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        for stage in (stages.fetch, stages.train, stages.features, stages.sensitivity):
            stage.run(workspace, chosen)
        stages.search.run(workspace, chosen)
        return stages.evaluate.run(workspace, chosen)


def seeded(chosen: Parameters, seed: int) -> Parameters:
    """The parameters with another seed, of the data as well."""
    data = chosen.data.model_copy(update={"seed": seed})
    return chosen.model_copy(update={"seed": seed, "data": data})


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.seeds", description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    chosen = parameters.load(arguments.params)
    start = time.monotonic()
    found = [measure(seeded(chosen, seed)) for seed in range(arguments.seeds)]
    fpr95 = {
        name: [run["detectors"][name]["mean"]["fpr95"] for run in found]
        for name in chosen.evaluate.detectors
    }
    accuracy = {name: [run["id"][name]["accuracy"] for run in found] for name in found[0]["id"]}
    result = {
        "params": str(arguments.params),
        "mean_fpr95": {name: {"seeds": v, "mean": mean(v)} for name, v in fpr95.items()},
        "id_accuracy": {name: {"seeds": v, "mean": mean(v)} for name, v in accuracy.items()},
        "goal": "mean over seeds: opnp < energy",
        "met": mean(fpr95["opnp"]) < mean(fpr95["energy"]),
        "seconds": round(time.monotonic() - start, 1),
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    table = Table(title=f"mean FPR95 in %, {arguments.params}")
    for column in ("detector", *(f"seed {seed}" for seed in range(arguments.seeds)), "mean"):
        table.add_column(column, justify="left" if column == "detector" else "right")
    for name, values in fpr95.items():
        table.add_row(name, *(f"{value:.1f}" for value in (*values, mean(values))))
    Console().print(table)
    print(f"goal: {result['goal']}; met: {result['met']}")


if __name__ == "__main__":
    main()
