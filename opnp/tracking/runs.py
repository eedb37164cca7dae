"""Pipeline runs, logged to MLflow from the records they leave on disk."""

import json
from pathlib import Path
from typing import Any

from opnp.tracking.history import children
from opnp.tracking.mlflow_client import PARENT, log_values

__all__ = ["log"]


def log(client: Any, experiment: str, folder: Path) -> str:
    """Log one record and return the run's id; a half-logged run is completed, not duplicated.

    The run is ended after its children, so a run that has ended has all of them.

    Args:
        client: an `MlflowClient`.
        experiment: id of the experiment.
        folder: the record: ``run.json`` and the files to attach.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    values = json.loads((folder / "run.json").read_text())
    begun = client.search_runs([experiment], f"tags.record = '{folder.name}'")
    run = (
        begun[0]
        if begun
        else client.create_run(
            experiment, values["time"], {**values["tags"], "record": folder.name}, values["name"]
        )
    ).info.run_id
    log_values(client, run, values["time"], values)
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
    log_detectors(client, experiment, run, values)
    client.set_terminated(run)
    return str(run)


def log_detectors(client: Any, experiment: str, parent: str, values: dict[str, Any]) -> None:
    """Log each detector as a child run, except those that an earlier attempt finished."""
    known = {run.data.tags["detector"]: run for run in children(client, experiment, parent)}
    for name, record in values.get("detectors", {}).items():  # absent in older records
        run = known.get(name) or client.create_run(
            experiment,
            values["time"],
            {**values["tags"], **record["tags"], PARENT: parent, "detector": name},
            name,
        )
        if run.info.status != "FINISHED":
            log_values(client, run.info.run_id, values["time"], record)
            client.set_terminated(run.info.run_id)
