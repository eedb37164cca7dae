"""Detectors logged as MLflow models."""

import time
from pathlib import Path
from typing import Any

from opnp.tracking.mlflow_client import experiment_id
from opnp.workspace import Workspace

__all__ = ["log_model"]


def log_model(
    client: Any,
    workspace: Workspace,
    folder: Path,
    run: str | None = None,
    trust: str | None = None,
    metrics: dict[str, float] | None = None,
) -> Any:
    """Log a detector's folder as a model of the experiment, with the metrics of its search.

    Args:
        client: an `MlflowClient`.
        workspace: whose MLflow it is.
        folder: the detector's folder.
        run: id of the run that made the detector; by default the pipeline run that trained its
            backbone, or a new run if there is none.
        trust: the ``package.module:factory`` that may run, if the detector's model is one.
        metrics: further metrics to log with the model.

    Returns:
        The `mlflow.entities.LoggedModel`.

    Raises:
        InputError: the folder does not hold a valid detector.
    """
    from tempfile import TemporaryDirectory

    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model

    from opnp.deployment import mlflow_model
    from opnp.deployment.detector import load

    about = load(folder, trust=trust).describe()
    backbone = str(about["model"]["name"])
    found, now = about["made"]["search"], int(time.time() * 1000)
    experiment = experiment_id(client, workspace)
    tags = {"backbone": backbone, "detector.digest": about["digest"]}
    run = run or run_of(client, experiment, about["made"].get("backbone"))
    own = run is None
    if run is None:
        run = str(client.create_run(experiment, now, tags, f"detector-{backbone}").info.run_id)
    clip = about["score"]["clip"]
    stated = {"backbone": backbone, "clip": clip, "temperature": about["score"]["temperature"]}
    model = client.create_logged_model(
        experiment, "detector", run, tags, {key: str(value) for key, value in stated.items()}
    )
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "model"
        card = Model(artifact_path=model.artifact_location, run_id=run, model_id=model.model_id)
        mlflow_model.save(folder, path, trust, mlflow_model=card)
        client.log_model_artifacts(model.model_id, str(path))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run, [LoggedModelOutput(model.model_id, 0)])
    figures = {f"detector/{key}": found[key] for key in ("fpr95", "auroc", "accuracy", "pruned")}
    figures |= {"detector/threshold": about["threshold"]["value"], **(metrics or {})}
    shown = [
        Metric(key, float(value), now, 0, model_id=model.model_id, run_id=run)
        for key, value in figures.items()
    ]
    client.log_batch(run, shown)
    if own:
        client.set_terminated(run)
    return model


def run_of(client: Any, experiment: str, backbone: str | None) -> str | None:
    """The id of the latest pipeline run whose backbone has this SHA-256; None if there is none."""
    if backbone is None:
        return None
    wanted = f"tags.record != '' and tags.`backbone.sha256` = '{backbone}'"
    found = client.search_runs([experiment], wanted, order_by=["start_time DESC"], max_results=1)
    return str(found[0].info.run_id) if found else None
