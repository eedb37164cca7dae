"""Runs in MLflow.

A run is first written whole to `logs/unlogged/`, and only then logged; what has been logged is
removed. So nothing is lost while a tracking server is down: the next run logs what waits there.

A run of the pipeline is a run in MLflow, and each of its detectors a child of that run, which
`opnp compare` puts side by side over backbones, data and seeds.
"""

import logging
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from opnp.errors import first_line
from opnp.pipeline.results import Run
from opnp.pipeline.results.times import read_times
from opnp.runtime.files import atomic, digest, write_json
from opnp.tracking.mlflow_client import (
    LONGEST,
    experiment_id,
    flattened,
    quiet_mlflow,
    tracking_uri,
)
from opnp.tracking.runs import log
from opnp.workspace import Workspace

__all__ = ["begin", "begun", "log_or_wait", "log_waiting", "record_run", "stash", "waiting"]

logger = logging.getLogger(__name__)


def files(workspace: Workspace) -> list[Path]:
    """The files that a record keeps copies of."""
    return [
        workspace.parameters,
        workspace.training,
        workspace.history,
        workspace.sensitivity,
        workspace.trials,
        workspace.mask,
        workspace.mask_react,
        workspace.search,
        workspace.metrics,
        workspace.intervals,
        workspace.evaluation,
        workspace.comparison,
        workspace.comparison_text,
        workspace.report,
        *([workspace.times] if workspace.times.is_file() else []),
    ]


def waiting(workspace: Workspace) -> list[Path]:
    """Runs on disk that are not in MLflow yet, oldest first."""
    return sorted(path.parent for path in workspace.unlogged.glob("*/run.json"))


def begin(workspace: Workspace) -> None:
    """Name the record of a run that has done a stage.

    So a run that is killed now is recorded once, whether it goes on later or has nothing left to
    do.
    """
    if not begun(workspace):
        with atomic(workspace.unrecorded) as temporary:
            temporary.write_text(f"{time.time_ns()}-{uuid4().hex[:8]}")


def begun(workspace: Workspace) -> bool:
    """Whether a run has begun whose record is still to be made."""
    return workspace.unrecorded.exists()


def record_run(run: Run, seconds: dict[str, float]) -> None:
    """Record a finished run in MLflow; on disk, until MLflow can be reached."""
    stash(run, seconds)
    log_or_wait(run.workspace)


def log_or_wait(workspace: Workspace) -> None:
    """Log the runs that wait for MLflow; say which cannot be logged, and let them wait on."""
    if not waiting(workspace):
        return
    for folder, error in log_waiting(workspace).items():
        if error:
            if workspace.owner != workspace:  # DVC is about to remove this copy
                workspace.owner.unlogged.mkdir(parents=True, exist_ok=True)
                folder = Path(shutil.move(folder, workspace.owner.unlogged))
            logger.warning(
                "MLflow at %s could not be reached, or refused the run (%s): it waits in %s and is "
                "logged with the next.",
                tracking_uri(workspace),
                first_line(error),
                folder,
            )


def stash(run: Run, seconds: dict[str, float]) -> Path:
    """Write down a finished run, with copies of its files.

    Args:
        run: the run.
        seconds: wall time of each stage that ran.

    Returns:
        The folder of the record.
    """
    workspace = run.workspace
    begin(workspace)
    folder = workspace.unlogged / workspace.unrecorded.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    for path in files(workspace):
        shutil.copy2(path, folder / path.name)
    # The record comes last: a folder without one holds no run.
    write_json(folder / "run.json", record(run, seconds))
    workspace.unrecorded.unlink()
    return folder


def record(run: Run, seconds: dict[str, float]) -> dict[str, Any]:
    """What MLflow holds of a run."""
    parameters, manifest, workspace = run.parameters, run.manifest, run.workspace
    metrics, training, chosen = run.metrics, run.training.record, run.search["opnp"]
    return {
        "time": int(time.time() * 1000),
        "name": f"{Path(parameters.data.id).name}-{parameters.train.backbone}-{parameters.seed}",
        "parameters": flattened(parameters.model_dump()),
        "metrics": flattened({key_of(name): of for name, of in metrics["detectors"].items()})
        | flattened({key_of(name): of for name, of in metrics["id"].items()}, "id/")
        | {f"{split}_accuracy": training[f"{split}_accuracy"] for split in ("train", "validation")}
        | {f"search/{key}": chosen[key] for key in ("fpr95", "auroc", "accuracy", "pruned")}
        | {f"seconds/{stage}": value for stage, value in seconds.items()}
        | {"unreadable_images": sum(len(entry.unreadable) for entry in manifest.sets.values())},
        "tags": {
            "backbone": parameters.train.backbone,
            "backbone.sha256": training["sha256"],
            "data": parameters.data.id,
            **({"missing": ", ".join(manifest.missing)} if manifest.missing else {}),
            **git_tags(workspace.root),
        },
        "datasets": [
            {
                "name": name,
                "digest": digest(workspace.images(name), "md5"),
                "source": entry.source,
                "path": workspace.relative(workspace.images(name)),
                "context": entry.role,
            }
            for name, entry in manifest.sets.items()
        ],
        "detectors": detector_records(run),
    }


def detector_records(run: Run) -> dict[str, Any]:
    """What the child run of each detector holds; of one that could not run, only why."""
    parameters, evaluation, times = run.parameters, run.evaluation, read_times(run.workspace)
    units = {"tune": "seconds/tune", "fit": "seconds/fit", "score": "milliseconds_per_1000/score"}
    about = {
        "backbone": parameters.train.backbone,
        "data": parameters.data.id,
        "seed": parameters.seed,
    }
    records: dict[str, Any] = {}
    for name, by_column in run.metrics["detectors"].items():
        ranks = {f"{column}/rank": rank for column, rank in evaluation["ranks"][name].items()}
        took = {units[what]: value for what, value in times.get(name, {}).items() if what in units}
        pruned = {"pruned": evaluation["pruned"][name]} if name in evaluation["pruned"] else {}
        same = {"same": evaluation["same"][name]} if name in evaluation["same"] else {}
        records[name] = {
            "parameters": flattened(evaluation["hyperparameters"][name])
            | {"detector": name, **about, **same},
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
    """A detector's name within the names of metrics, where MLflow allows neither + nor &."""
    return detector.replace("+", "-").replace("&", "_and_")


def git_tags(folder: Path) -> dict[str, str]:
    """The commit that a folder is at, and whether it has changed since; nothing outside git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"mlflow.source.git.commit": commit, "git.changed": str(bool(changes)).lower()}


def log_waiting(workspace: Workspace) -> dict[Path, Exception | None]:
    """Log every waiting run to MLflow, each on its own, and remove the records of those logged.

    Returns:
        The folder of each record, and the error that kept it from being logged, if any.
    """
    mlflow = quiet_mlflow()
    outcomes: dict[Path, Exception | None] = {}
    for folder in waiting(workspace):
        try:
            client = mlflow.MlflowClient(tracking_uri(workspace))
            log(client, experiment_id(client, workspace), folder)
            shutil.rmtree(folder)
            outcomes[folder] = None
        except Exception as error:  # whatever the server, the network, its database or a disk raise
            outcomes[folder] = error
    return outcomes
