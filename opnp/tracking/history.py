"""Detectors of earlier runs, read from MLflow."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opnp.errors import InputError, did_you_mean, first_line
from opnp.tracking.mlflow_client import PARENT, experiment_name, quiet_mlflow, tracking_uri
from opnp.workspace import Workspace

__all__ = ["DetectorRun", "detector_runs"]


@dataclass(frozen=True)
class DetectorRun:
    """One detector of one pipeline run, as logged in MLflow.

    Attributes:
        run: id of the pipeline run.
        time: start of the run, in milliseconds since 1970.
        detector: name of the detector.
        backbone: spec of the run's backbone.
        data: source of the run's ID data.
        seed: seed of the run.
        metrics: in percent, keyed ``COLUMN/METRIC``.
        same: the detector that it is, since it might have pruned but did not.
    """

    run: str
    time: int
    detector: str
    backbone: str
    data: str
    seed: int
    metrics: dict[str, float]
    same: str | None = None


def detector_runs(workspace: Workspace, experiment: str) -> list[DetectorRun]:
    """Read every detector of every completely logged run of an experiment, latest run first.

    Args:
        workspace: whose MLflow is read.
        experiment: name of the experiment in MLflow.

    Raises:
        InputError: the experiment or its runs do not exist, or MLflow cannot be read.
    """
    uri = tracking_uri(workspace)
    nothing = f"MLflow at {uri} holds no comparison of detectors."
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).is_file():  # MLflow would create it
        raise InputError(nothing, "run")
    mlflow = quiet_mlflow()
    try:
        client = mlflow.MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None and experiment != experiment_name():
            names = [each.name for each in client.search_experiments()]
            hint = f"; {did_you_mean(experiment, names)}" if names else "."
            raise InputError(f"MLflow at {uri} has no experiment {experiment!r}{hint}")
        finished = "attributes.status = 'FINISHED'"
        known = all_runs(client, found.experiment_id, finished) if found else []
    except InputError:
        raise
    except Exception as error:  # the server, the network and the database raise errors of all kinds
        raise InputError(f"MLflow at {uri} could not be read ({first_line(error)}).") from None
    whole = {run.info.run_id for run in known if PARENT not in run.data.tags}
    detectors = [
        DetectorRun(
            run.data.tags[PARENT],
            run.info.start_time,
            run.data.params["detector"],
            run.data.params["backbone"],
            run.data.params["data"],
            int(run.data.params["seed"]),
            run.data.metrics,
            run.data.params.get("same"),
        )
        for run in known
        if run.data.tags.get(PARENT) in whole and "detector" in run.data.tags
    ]
    if not detectors:
        raise InputError(nothing, "run")
    return detectors


def children(client: Any, experiment: str, parent: str) -> list[Any]:
    """All child runs of a run."""
    return all_runs(client, experiment, f"tags.`{PARENT}` = '{parent}'")


def all_runs(client: Any, experiment: str, filters: str) -> list[Any]:
    """All runs of an experiment that match a filter, latest first.

    `mlflow.search_runs` follows pages, too, but takes its server from a global setting, and setting
    it changes the environment of this process and of those it starts.
    """
    runs: list[Any] = []
    page = None
    while page is None or page.token:
        page = client.search_runs(
            [experiment],
            filters,
            order_by=["attributes.start_time DESC"],
            page_token=page.token if page else None,
        )
        runs += page
    return runs
