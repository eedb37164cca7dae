"""The connection to MLflow: its address, and logging within its limits."""

import os
from typing import Any

from opnp.workspace import Workspace

__all__ = ["experiment_name", "tracking_uri"]


# The limits of MLflow: characters of a parameter's value, and what one request may hold.
LONGEST = 6000
PARAMETERS_AT_ONCE, METRICS_AT_ONCE = 100, 900

PARENT = "mlflow.parentRunId"


def tracking_uri(workspace: Workspace) -> str:
    """The value of MLFLOW_TRACKING_URI, by default an SQLite file in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.tracking.resolve()}"


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


def experiment_id(client: Any) -> str:
    """The id of the experiment, which is created if it does not exist."""
    name = experiment_name()
    known = client.get_experiment_by_name(name)
    return str(known.experiment_id if known else client.create_experiment(name))


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
