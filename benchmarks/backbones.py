"""OPNP and every other detector on backbones of different kinds, several seeds of each.

Every backbone and seed is a workspace of its own in FOLDER, in which the pipeline's stages run;
a stage whose results are there is not run again, so that the benchmark can be interrupted. Goals:
OPNP at most 0.65 × Energy's mean FPR95, averaged over the backbones; at least 90 % of the oracle's
gain kept without OOD data; the best mean rank for a combination with OPNP.

Run ``python -m benchmarks.backbones FOLDER [--params FILE] [--backbones …] [--seeds N] [--far
NAME=SOURCE …] [--near NAME=SOURCE …] [--json]``.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from opnp.metrics import ranking
from opnp.pipeline import parameters, stages
from opnp.pipeline.parameters import Parameters
from opnp.runtime.files import read_json, write_json
from opnp.workspace import Workspace

__all__ = ["RECIPES", "main", "measure", "show", "summary"]

# Transformers and ConvNeXts want AdamW; otherwise all are trained alike.
ADAMW = {"optimizer": "adamw", "learning_rate": 0.002, "weight_decay": 0.05}
RECIPES: dict[str, dict[str, Any]] = {
    "resnet": {"width": 32, "epochs": 6, "precision": "bfloat16"},
    "convnext": {"width": 32, "epochs": 8, "precision": "bfloat16", **ADAMW},
    "vit": {"width": 16, "epochs": 10, "precision": "float32", **ADAMW},
}

IMAGE_DETECTORS = ("odin", "opnp+odin", "rankfeat", "nac")
"""These cost minutes each on a CPU, and are left out unless asked for."""


def configured(
    chosen: Parameters,
    backbone: str,
    seed: int,
    near: dict[str, str],
    far: dict[str, str],
    without: Sequence[str],
) -> Parameters:
    """The parameters of one workspace."""
    values = chosen.model_dump()
    values["seed"] = values["data"]["seed"] = seed
    values["data"]["near"] |= near
    values["data"]["far"] |= far
    values["train"] |= {"backbone": backbone, "threads": 1, **RECIPES[backbone]}
    values["evaluate"]["detectors"] = [
        name for name in chosen.evaluate.detectors if name not in without
    ]
    return Parameters.model_validate(values)


def measure(chosen: Parameters, folder: Path) -> dict[str, Any]:
    """Run the stages that have not run with these parameters; what they found."""
    folder.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(folder)
    outputs = {
        "fetch": workspace.manifest,
        "train": workspace.training,
        "features": folder / "features.done",
        "sensitivity": workspace.sensitivity,
        "search": workspace.search,
        "evaluate": workspace.metrics,
    }
    for stage, output in outputs.items():
        relevant = {key: getattr(chosen, key) for key in SECTIONS[stage]}
        made_with = {
            key: value.model_dump() if hasattr(value, "model_dump") else value
            for key, value in relevant.items()
        }
        record = folder / f"{stage}.parameters.json"
        if output.exists() and record.exists() and json.loads(record.read_text()) == made_with:
            continue
        for later in list(outputs)[list(outputs).index(stage) :]:
            (folder / f"{later}.parameters.json").unlink(missing_ok=True)
        getattr(stages, stage).run(workspace, chosen)
        if stage == "features":
            output.touch()
        write_json(record, made_with)
    return {
        "metrics": read_json(workspace.metrics),
        "evaluation": read_json(workspace.evaluation),
        "search": read_json(workspace.search),
        "training": read_json(workspace.training),
        "times": read_json(workspace.times),
    }


SECTIONS = {
    "fetch": ("data",),
    "train": ("seed", "data", "train"),
    "features": ("seed", "data", "train", "features"),
    "sensitivity": ("seed", "data", "train", "features"),
    "search": ("seed", "data", "train", "features", "search"),
    "evaluate": ("seed", "data", "train", "features", "search", "evaluate", "energy"),
}


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures over the seeds of each backbone, and the goals."""
    backbones: dict[str, Any] = {}
    for backbone, runs in found.items():
        common = [
            name
            for name in runs[0]["metrics"]["detectors"]
            if all(name in run["metrics"]["detectors"] for run in runs)
        ]
        backbones[backbone] = {
            "id_accuracy": [run["metrics"]["id"]["unpruned"]["accuracy"] for run in runs],
            "mean_fpr95": {
                name: [run["metrics"]["detectors"][name]["mean"]["fpr95"] for run in runs]
                for name in common
            },
            "kept": {
                method: [run["evaluation"]["oracle"][method]["kept"] for run in runs]
                for method in ("opnp", "opnp+react")
            },
            "oracle": {
                method: [run["evaluation"]["oracle"][method]["fpr95"] for run in runs]
                for method in ("opnp", "opnp+react")
            },
        }
    ratios = {
        name: mean(of["mean_fpr95"]["opnp"]) / mean(of["mean_fpr95"]["energy"])
        for name, of in backbones.items()
    }
    # Ranks among the detectors that every run has, whatever else some of them compared.
    runs = [run for of in found.values() for run in of]
    everywhere = set.intersection(*(set(run["metrics"]["detectors"]) for run in runs))
    ranks: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        shared = {name: run["metrics"]["detectors"][name] for name in sorted(everywhere)}
        for name, of in ranking.ranks(shared, list(run["evaluation"]["sets"])).items():
            ranks[name].append(of["mean"])
    mean_ranks = dict(
        sorted(((name, mean(of)) for name, of in ranks.items()), key=lambda item: item[1])
    )
    kept = {name: mean(of["kept"]["opnp"]) for name, of in backbones.items()}
    lowest = min(mean_ranks.values())
    best = [name for name, rank in mean_ranks.items() if rank < lowest + 1e-9]  # shared, perhaps
    return {
        "backbones": backbones,
        "mean_rank": mean_ranks,
        "goals": [
            {
                "goal": "OPNP / Energy, mean FPR95, averaged over backbones, at most 0.65",
                "measured": mean(ratios.values()),
                "by_backbone": ratios,
                "met": mean(ratios.values()) <= 0.65,
            },
            {
                "goal": "share in percent of the oracle's gain that OPNP keeps, at least 90",
                "measured": mean(kept.values()),
                "by_backbone": kept,
                "met": mean(kept.values()) >= 90,
            },
            {
                "goal": "the best mean rank is that of a combination with OPNP",
                "measured": best,
                "met": any(name.startswith("opnp") for name in best),
            },
        ],
    }


def show(result: dict[str, Any], as_json: bool, title: str) -> None:
    """Print a summary."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    table = Table(title=f"mean FPR95 in %, {title}")
    for column in ("detector", *result["backbones"], "mean rank"):
        table.add_column(column, justify="left" if column == "detector" else "right")
    for name, rank in result["mean_rank"].items():
        figures = [mean(of["mean_fpr95"][name]) for of in result["backbones"].values()]
        table.add_row(name, *(f"{figure:.1f}" for figure in figures), f"{rank:.1f}")
    Console().print(table)
    for goal in result["goals"]:
        print(f"goal: {goal['goal']}; measured: {goal['measured']}; met: {goal['met']}")


def pairs(values: list[str]) -> dict[str, str]:
    return dict(value.split("=", 1) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.backbones", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--params", type=Path, default=Path("presets/fashion-mnist.yaml"))
    parser.add_argument("--backbones", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--near", nargs="*", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--far", nargs="*", default=[], metavar="NAME=SOURCE")
    parser.add_argument(
        "--without", nargs="*", default=IMAGE_DETECTORS, metavar="DETECTOR", help="left out"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    chosen = parameters.load(arguments.params)
    near, far = pairs(arguments.near), pairs(arguments.far)
    found = {
        backbone: [
            measure(
                configured(chosen, backbone, seed, near, far, arguments.without),
                arguments.folder / f"{arguments.params.stem}-{backbone}-{seed}",
            )
            for seed in range(arguments.seeds)
        ]
        for backbone in arguments.backbones
    }
    title = f"{arguments.params.stem}, {arguments.seeds} seed(s)"
    show(summary(found), arguments.json, title)


if __name__ == "__main__":
    main()
