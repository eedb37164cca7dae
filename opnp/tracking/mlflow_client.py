"""The connection to MLflow: its address, and logging within its limits."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

from opnp.workspace import Workspace

__all__ = ["experiment_name", "tracking_uri"]


# The limits of MLflow: characters of a parameter's value, and what one request may hold.
LONGEST = 6000
PARAMETERS_AT_ONCE, METRICS_AT_ONCE = 100, 900

PARENT = "mlflow.parentRunId"


def tracking_uri(workspace: Workspace) -> str:
    """The value of MLFLOW_TRACKING_URI, by default an SQLite file in the workspace.

    In a copy that DVC has made for an experiment, this is the file of the workspace around it.
    """
    own = workspace.owner.tracking.resolve()
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{own}"


def experiment_name() -> str:
    """The value of MLFLOW_EXPERIMENT_NAME, by default ``opnp``."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "opnp"


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one flat dictionary, with keys joined by slashes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def quiet_mlflow() -> Any:
    """Import MLflow, which takes seconds, and silence its migration log and progress bars."""
    import logging

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow

    return mlflow


def experiment_id(client: Any, workspace: Workspace) -> str:
    """The id of the experiment, which is created if it does not exist."""
    name, folder = experiment_name(), own_files(client, workspace)
    keep_files_here(client, workspace)
    known = client.get_experiment_by_name(name)
    if known is None:
        return str(client.create_experiment(name, str(folder / uuid4().hex) if folder else None))
    return str(known.experiment_id)


def own_files(client: Any, workspace: Workspace) -> Path | None:
    """The folder for the files of all runs, if MLflow is the SQLite file of the workspace.

    MLflow would take one below the current folder.
    """
    file = workspace.owner.tracking.resolve()
    return file.parent / "mlruns" if client.tracking_uri == f"sqlite:///{file}" else None


def keep_files_here(client: Any, workspace: Workspace) -> None:
    """Correct the folders that the workspace's MLflow names, if it has been copied or moved.

    They are absolute paths, so that a copy would write its models into the original's folder.
    """
    folder, file = own_files(client, workspace), workspace.owner.tracking
    if folder is None or not file.is_file():
        return
    known = client.get_experiment_by_name(experiment_name())
    before = Path(local(known.artifact_location)).parent if known else folder
    if before.name == folder.name and before != folder:
        move_artifacts(file, before, folder)


def local(location: str) -> str:
    """The path of a location, which MLflow may write as a URI."""
    return location.removeprefix("file://")


LOCATIONS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
"""Where MLflow's database names folders."""


def move_artifacts(database: Path, before: Path, now: Path) -> None:
    """Correct the folders that MLflow's database names, which MLflow itself cannot.

    Args:
        database: the SQLite file.
        before: the folder that held the files of all experiments.
        now: the folder that holds them.
    """
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, column in LOCATIONS.items():
            for form in ("", "file://"):
                old, new = f"{form}{before}/", f"{form}{now}/"
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old), old),
                )


def log_values(client: Any, run: str, time: int, values: dict[str, Any]) -> None:
    """Log parameters and metrics, in requests no larger than MLflow accepts.

    Logging the same values again, as after an interrupted attempt, changes nothing.
    """
    from mlflow.entities import Metric, Param

    metrics = [Metric(key, value, time, 0) for key, value in values["metrics"].items()]
    parameters = [Param(key, str(value)[:LONGEST]) for key, value in values["parameters"].items()]
    while metrics or parameters:
        client.log_batch(run, metrics[:METRICS_AT_ONCE], parameters[:PARAMETERS_AT_ONCE])
        metrics, parameters = metrics[METRICS_AT_ONCE:], parameters[PARAMETERS_AT_ONCE:]
