"""Runs in MLflow.

A run is first written to `logs/unlogged/`, whole, and only then logged; what has been logged is
removed. So a tracking server that is down loses nothing: the next run logs what waits there.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from opnp import artifacts
from opnp.datasets import data_file, read_manifest
from opnp.files import digest, read_json, write_json
from opnp.parameters import Parameters

__all__ = ["log_or_wait", "log_waiting", "record_run", "stash", "tracking_uri", "waiting"]

UNLOGGED = Path("logs/unlogged")

FILES = (
    artifacts.PARAMETERS,
    artifacts.TRAINING,
    artifacts.HISTORY,
    artifacts.SENSITIVITY,
    artifacts.TRIALS,
    artifacts.MASK,
    artifacts.SEARCH,
    artifacts.METRICS,
    artifacts.INTERVALS,
    artifacts.EVALUATION,
    artifacts.REPORT,
)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def waiting() -> list[Path]:
    """Runs on disk that are not in MLflow yet, oldest first."""
    return sorted(path.parent for path in UNLOGGED.glob("*/run.json"))


def record_run(parameters: Parameters, seconds: dict[str, float]) -> None:
    """Record the run whose artifacts lie in the workspace, in MLflow or until it can be reached."""
    stash(parameters, seconds)
    log_or_wait()


def log_or_wait() -> None:
    """Log what waits for MLflow; what cannot be logged is said to, and waits on."""
    if not waiting():
        return
    for folder, error in log_waiting().items():
        if error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(
                f"MLflow at {tracking_uri()} could not be reached, or refused the run ({reason}): "
                f"it waits in {folder} and is logged with the next.",
                file=sys.stderr,
            )


def stash(parameters: Parameters, seconds: dict[str, float]) -> Path:
    """Write down the run whose artifacts lie in the workspace, with copies of its files.

    Args:
        parameters: of the run.
        seconds: wall time of each stage that ran.

    Returns:
        The folder of the record.
    """
    folder = UNLOGGED / f"{time.time_ns()}-{uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    for path in FILES:
        shutil.copy2(path, folder / path.name)
    # The record comes last: a folder without one is no run.
    write_json(folder / "run.json", record(parameters, seconds))
    return folder


def record(parameters: Parameters, seconds: dict[str, float]) -> dict[str, Any]:
    metrics = read_json(artifacts.METRICS, "python -m flows.evaluate")
    training = read_json(artifacts.TRAINING, "python -m flows.train")
    search = read_json(artifacts.SEARCH, "python -m flows.search")
    manifest = read_manifest()
    return {
        "time": int(time.time() * 1000),
        "name": f"{Path(parameters.data.id).name}-{parameters.train.backbone}-{parameters.seed}",
        "parameters": flattened(parameters.model_dump()),
        "metrics": flattened(metrics["detectors"])
        | flattened(metrics["id"], "id/")
        | {f"{split}_accuracy": training[f"{split}_accuracy"] for split in ("train", "validation")}
        | {f"search/{key}": search["opnp"][key] for key in ("fpr95", "auroc", "accuracy", "pruned")}
        | {f"seconds/{stage}": value for stage, value in seconds.items()},
        "tags": {
            "backbone": parameters.train.backbone,
            "backbone.sha256": training["sha256"],
            "data": parameters.data.id,
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
    }


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by slashes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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
    import logging

    for name in ("alembic", "mlflow.store.db.utils"):  # migrations are no news to the user
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    outcomes: dict[Path, Exception | None] = {}
    for folder in waiting():
        try:
            client = MlflowClient(tracking_uri())
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "opnp"
            known = client.get_experiment_by_name(name)
            log(client, known.experiment_id if known else client.create_experiment(name), folder)
            shutil.rmtree(folder)
            outcomes[folder] = None
        except Exception as error:  # whatever the server, the network, its database or a disk raise
            outcomes[folder] = error
    return outcomes


def log(client: Any, experiment: str, folder: Path) -> str:
    """Log one record; a run that an earlier attempt left half logged is completed, not doubled."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    values = json.loads((folder / "run.json").read_text())
    begun = client.search_runs([experiment], f"tags.record = '{folder.name}'")
    run = (
        begun[0]
        if begun
        else client.create_run(
            experiment, values["time"], {**values["tags"], "record": folder.name}, values["name"]
        )
    ).info.run_id
    metrics = [Metric(key, value, values["time"], 0) for key, value in values["metrics"].items()]
    parameters = [Param(key, str(value)) for key, value in values["parameters"].items()]
    for start in range(0, max(len(metrics), len(parameters)), 100):  # MLflow takes no more at once
        chunk = slice(start, start + 100)
        client.log_batch(run, metrics[chunk], parameters[chunk])
    client.log_inputs(
        run,
        [
            DatasetInput(
                Dataset(
                    entry["name"],
                    entry["digest"],
                    "dvc",
                    json.dumps({"path": entry["path"], "source": entry["source"]}),
                ),
                [InputTag("mlflow.data.context", entry["context"])],
            )
            for entry in values["datasets"]
        ],
    )
    for path in sorted(folder.iterdir()):
        if path.name != "run.json":
            client.log_artifact(run, str(path))
    client.set_terminated(run)
    return str(run)
