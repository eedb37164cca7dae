"""The detectors of earlier runs, read from MLflow."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opnp.errors import InputError
from opnp.tracking.mlflow_client import (
    PARENT,
    experiment_name,
    first_line,
    quiet_mlflow,
    tracking_uri,
)

__all__ = ["DetectorRun", "detector_runs"]


@dataclass(frozen=True)
class DetectorRun:
    """What MLflow holds of one detector in one run of the pipeline.

    Attributes:
        run: id of the pipeline's run.
        time: when that was, in milliseconds since 1970.
        detector: its name.
        backbone: of the run, as `data` and `seed` are.
        metrics: in percent, by `COLUMN/METRIC`.
    """

    run: str
    time: int
    detector: str
    backbone: str
    data: str
    seed: int
    metrics: dict[str, float]


def detector_runs(experiment: str) -> list[DetectorRun]:
    """Every detector of every run of the experiment that is wholly logged, latest run first.

    Raises:
        InputError: there is none, or MLflow cannot be reached.
    """
    uri = tracking_uri()
    nothing = f"MLflow at {uri} holds no comparison of detectors."
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).is_file():  # which MLflow would make
        raise InputError(nothing, "run")
    mlflow = quiet_mlflow()
    try:
        client = mlflow.MlflowClient(uri)
        names = {known.name: known.experiment_id for known in client.search_experiments()}
        if experiment not in names and experiment != experiment_name():
            raise InputError(
                f"MLflow at {uri} has no experiment {experiment!r}, but {', '.join(names)}."
            )
        finished = "attributes.status = 'FINISHED'"
        known = all_runs(client, names[experiment], finished) if experiment in names else []
    except InputError:
        raise
    except Exception as error:  # whatever the server, the network or its database raise
        raise InputError(f"MLflow at {uri} could not be read ({first_line(error)}).") from None
    whole = {run.info.run_id for run in known if PARENT not in run.data.tags}
    found = [
        DetectorRun(
            run.data.tags[PARENT],
            run.info.start_time,
            run.data.params["detector"],
            run.data.params["backbone"],
            run.data.params["data"],
            int(run.data.params["seed"]),
            run.data.metrics,
        )
        for run in known
        if run.data.tags.get(PARENT) in whole and "detector" in run.data.tags
    ]
    if not found:
        raise InputError(nothing, "run")
    return found


def children(client: Any, experiment: str, parent: str) -> list[Any]:
    return all_runs(client, experiment, f"tags.`{PARENT}` = '{parent}'")


def all_runs(client: Any, experiment: str, filters: str) -> list[Any]:
    """The runs of an experiment that match, however many, latest first."""
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
