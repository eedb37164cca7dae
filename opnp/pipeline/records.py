"""Runs in MLflow.

A run is first written to `logs/unlogged/`, whole, and only then logged; what has been logged is
removed. So a tracking server that is down loses nothing: the next run logs what waits there.

A run of the pipeline is a run in MLflow, and each of its detectors a child of that run, which
`opnp compare` puts side by side over backbones, data and seeds.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from opnp import workspace
from opnp.errors import first_line
from opnp.runtime.files import atomic, digest, read_json, write_json
from opnp.tracking.mlflow_client import (
    LONGEST,
    experiment_id,
    flattened,
    quiet_mlflow,
    tracking_uri,
)
from opnp.tracking.runs import log

if TYPE_CHECKING:
    from opnp.pipeline.parameters import Parameters

__all__ = ["begin", "begun", "log_or_wait", "log_waiting", "record_run", "stash", "waiting"]


UNLOGGED = Path("logs/unlogged")
UNRECORDED = Path("logs/unrecorded")  # names the record that the run at work will have

FILES = (
    workspace.PARAMETERS,
    workspace.TRAINING,
    workspace.HISTORY,
    workspace.SENSITIVITY,
    workspace.TRIALS,
    workspace.MASK,
    workspace.MASK_REACT,
    workspace.SEARCH,
    workspace.METRICS,
    workspace.INTERVALS,
    workspace.EVALUATION,
    workspace.COMPARISON,
    workspace.COMPARISON_TEXT,
    workspace.REPORT,
)


def waiting() -> list[Path]:
    """Runs on disk that are not in MLflow yet, oldest first."""
    return sorted(path.parent for path in UNLOGGED.glob("*/run.json"))


def begin() -> None:
    """Name the record that a run will have, which has done a stage: one that is killed now, and
    goes on later or has nothing left to do, is recorded once."""
    if not begun():
        with atomic(UNRECORDED) as temporary:
            temporary.write_text(f"{time.time_ns()}-{uuid4().hex[:8]}")


def begun() -> bool:
    """Whether a run has begun whose record is still to be made."""
    return UNRECORDED.exists()


def record_run(parameters: "Parameters", seconds: dict[str, float]) -> None:
    """Record the run whose artifacts lie in the workspace, in MLflow or until it can be reached."""
    stash(parameters, seconds)
    log_or_wait()


def log_or_wait() -> None:
    """Log what waits for MLflow; what cannot be logged is said to, and waits on."""
    if not waiting():
        return
    for folder, error in log_waiting().items():
        if error:
            print(
                f"MLflow at {tracking_uri()} could not be reached, or refused the run "
                f"({first_line(error)}): it waits in {folder} and is logged with the next.",
                file=sys.stderr,
            )


def stash(parameters: "Parameters", seconds: dict[str, float]) -> Path:
    """Write down the run whose artifacts lie in the workspace, with copies of its files.

    Args:
        parameters: of the run.
        seconds: wall time of each stage that ran.

    Returns:
        The folder of the record.
    """
    begin()
    folder = UNLOGGED / UNRECORDED.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*FILES, *([workspace.TIMES] if workspace.TIMES.is_file() else [])):
        shutil.copy2(path, folder / path.name)
    # The record comes last: a folder without one is no run.
    write_json(folder / "run.json", record(parameters, seconds))
    UNRECORDED.unlink()
    return folder


def record(parameters: "Parameters", seconds: dict[str, float]) -> dict[str, Any]:
    from opnp.data.imagesets import data_file, read_manifest

    metrics = read_json(workspace.METRICS, "stage:evaluate")
    training = read_json(workspace.TRAINING, "stage:train")
    search = read_json(workspace.SEARCH, "stage:search")
    manifest = read_manifest()
    return {
        "time": int(time.time() * 1000),
        "name": f"{Path(parameters.data.id).name}-{parameters.train.backbone}-{parameters.seed}",
        "parameters": flattened(parameters.model_dump()),
        "metrics": flattened({key_of(name): of for name, of in metrics["detectors"].items()})
        | flattened({key_of(name): of for name, of in metrics["id"].items()}, "id/")
        | {f"{split}_accuracy": training[f"{split}_accuracy"] for split in ("train", "validation")}
        | {f"search/{key}": search["opnp"][key] for key in ("fpr95", "auroc", "accuracy", "pruned")}
        | {f"seconds/{stage}": value for stage, value in seconds.items()}
        | {"unreadable_images": sum(len(entry.unreadable) for entry in manifest.sets.values())},
        "tags": {
            "backbone": parameters.train.backbone,
            "backbone.sha256": training["sha256"],
            "data": parameters.data.id,
            **({"missing": ", ".join(manifest.missing)} if manifest.missing else {}),
            **git_tags(),
        },
        "datasets": [
            {
                "name": name,
                "digest": digest(data_file(name), "md5"),
                "source": entry.source,
                "path": str(data_file(name)),
                "context": entry.role,
            }
            for name, entry in manifest.sets.items()
        ],
        "detectors": detector_records(parameters, metrics["detectors"]),
    }


def detector_records(parameters: "Parameters", detectors: dict[str, Any]) -> dict[str, Any]:
    """What the child run of each detector holds; of one that could not run, only why."""
    again = "stage:evaluate"
    evaluation = read_json(workspace.EVALUATION, again)
    times = read_json(workspace.TIMES, again) if workspace.TIMES.is_file() else {}
    units = {"tune": "seconds/tune", "fit": "seconds/fit", "score": "milliseconds_per_1000/score"}
    about = {
        "backbone": parameters.train.backbone,
        "data": parameters.data.id,
        "seed": parameters.seed,
    }
    records: dict[str, Any] = {}
    for name, by_column in detectors.items():
        ranks = {f"{column}/rank": rank for column, rank in evaluation["ranks"][name].items()}
        took = {units[what]: value for what, value in times.get(name, {}).items()}
        pruned = {"pruned": evaluation["pruned"][name]} if name in evaluation["pruned"] else {}
        records[name] = {
            "parameters": flattened(evaluation["hyperparameters"][name])
            | {"detector": name, **about},
            "metrics": flattened(by_column)
            | ranks
            | {"trials": evaluation["trials"][name]}
            | pruned
            | took,
            "tags": {},
        }
    for name, reason in evaluation["unavailable"].items():
        records[name] = {
            "parameters": {"detector": name, **about},
            "metrics": {},
            "tags": {"unavailable": reason[:LONGEST]},
        }
    return records


def key_of(detector: str) -> str:
    """A detector's name in the names of metrics, where MLflow allows no plus sign."""
    return detector.replace("+", "-")


def git_tags() -> dict[str, str]:
    """The commit of the workspace, and whether it has been changed since; nothing outside git."""

    def git(*words: str) -> str:
        result = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"mlflow.source.git.commit": commit, "git.changed": str(bool(changes)).lower()}


def log_waiting() -> dict[Path, Exception | None]:
    """Log every waiting run to MLflow, each on its own, and remove the records of those logged.

    Returns:
        Each record's folder, and what kept it from being logged, if anything did.
    """
    mlflow = quiet_mlflow()
    outcomes: dict[Path, Exception | None] = {}
    for folder in waiting():
        try:
            client = mlflow.MlflowClient(tracking_uri())
            log(client, experiment_id(client), folder)
            shutil.rmtree(folder)
            outcomes[folder] = None
        except Exception as error:  # whatever the server, the network, its database or a disk raise
            outcomes[folder] = error
    return outcomes
