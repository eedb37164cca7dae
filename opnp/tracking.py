"""Runs in MLflow.

A run is first written to `logs/unlogged/`, whole, and only then logged; what has been logged is
removed. So a tracking server that is down loses nothing: the next run logs what waits there.

A run of the pipeline is a run in MLflow, and each of its detectors a child of that run, which
`opnp compare` puts side by side over backbones, data and seeds.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from opnp import artifacts
from opnp.errors import InputError
from opnp.files import atomic, digest, read_json, write_json

if TYPE_CHECKING:
    from opnp.parameters import Parameters

__all__ = [
    "DetectorRun",
    "begin",
    "begun",
    "detector_runs",
    "experiment_name",
    "log_model",
    "log_or_wait",
    "log_waiting",
    "record_run",
    "stash",
    "tracking_uri",
    "waiting",
]

UNLOGGED = Path("logs/unlogged")
UNRECORDED = Path("logs/unrecorded")  # names the record that the run at work will have

FILES = (
    artifacts.PARAMETERS,
    artifacts.TRAINING,
    artifacts.HISTORY,
    artifacts.SENSITIVITY,
    artifacts.TRIALS,
    artifacts.MASK,
    artifacts.MASK_REACT,
    artifacts.SEARCH,
    artifacts.METRICS,
    artifacts.INTERVALS,
    artifacts.EVALUATION,
    artifacts.COMPARISON,
    artifacts.COMPARISON_TEXT,
    artifacts.REPORT,
)

# What MLflow takes at most: values of parameters, in characters, and what one request may hold.
LONGEST = 6000
PARAMETERS_AT_ONCE, METRICS_AT_ONCE = 100, 900

PARENT = "mlflow.parentRunId"


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def experiment_name() -> str:
    """MLFLOW_EXPERIMENT_NAME, else opnp."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "opnp"


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


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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
    for path in (*FILES, *([artifacts.TIMES] if artifacts.TIMES.is_file() else [])):
        shutil.copy2(path, folder / path.name)
    # The record comes last: a folder without one is no run.
    write_json(folder / "run.json", record(parameters, seconds))
    UNRECORDED.unlink()
    return folder


def record(parameters: "Parameters", seconds: dict[str, float]) -> dict[str, Any]:
    from opnp.datasets import data_file, read_manifest

    metrics = read_json(artifacts.METRICS, "python -m flows.evaluate")
    training = read_json(artifacts.TRAINING, "python -m flows.train")
    search = read_json(artifacts.SEARCH, "python -m flows.search")
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
    again = "python -m flows.evaluate"
    evaluation = read_json(artifacts.EVALUATION, again)
    times = read_json(artifacts.TIMES, again) if artifacts.TIMES.is_file() else {}
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
        records[name] = {
            "parameters": flattened(evaluation["hyperparameters"][name])
            | {"detector": name, **about},
            "metrics": flattened(by_column) | ranks | {"trials": evaluation["trials"][name]} | took,
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


def quiet_mlflow() -> Any:
    """MLflow, which takes seconds to import, without its news of migrations and its progress."""
    import logging

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow

    return mlflow


def log(client: Any, experiment: str, folder: Path) -> str:
    """Log one record; a run that an earlier attempt left half logged is completed, not doubled.

    The run itself ends last: one that has ended has all its children.
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
    """Log each detector as a child of the run, but those that an earlier attempt has finished."""
    known = {run.data.tags["detector"]: run for run in children(client, experiment, parent)}
    for name, record in values.get("detectors", {}).items():  # earlier records have none
        run = known.get(name) or client.create_run(
            experiment,
            values["time"],
            {**values["tags"], **record["tags"], PARENT: parent, "detector": name},
            name,
        )
        if run.info.status != "FINISHED":
            log_values(client, run.info.run_id, values["time"], record)
            client.set_terminated(run.info.run_id)


def log_model(
    client: Any,
    folder: Path,
    run: str | None = None,
    trust: str | None = None,
    metrics: dict[str, float] | None = None,
) -> Any:
    """Log a detector's folder as a model of the experiment, with the figures of its search.

    Args:
        client: of MLflow.
        folder: the detector.
        run: id of the run that made it; without one, that of the pipeline's run that trained its
            backbone, or a run of its own.
        trust: the ``package.module:factory`` that may run, if its model is one.
        metrics: to show beside the model, with those of its search.

    Returns:
        MLflow's `LoggedModel`.

    Raises:
        InputError: the folder is no detector.
    """
    from tempfile import TemporaryDirectory

    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model

    from opnp import serving
    from opnp.saved import load

    about = load(folder, trust=trust).describe()
    backbone = str(about["model"]["name"])
    found, now = about["made"]["search"], int(time.time() * 1000)
    experiment = experiment_id(client)
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
        serving.save(folder, path, trust, mlflow_model=card)
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
    """The id of the pipeline's latest run with a backbone, known by its SHA-256."""
    if backbone is None:
        return None
    wanted = f"tags.record != '' and tags.`backbone.sha256` = '{backbone}'"
    found = client.search_runs([experiment], wanted, order_by=["start_time DESC"], max_results=1)
    return str(found[0].info.run_id) if found else None


def experiment_id(client: Any) -> str:
    """Of the experiment, which is made if there is none yet."""
    name = experiment_name()
    known = client.get_experiment_by_name(name)
    return str(known.experiment_id if known else client.create_experiment(name))


def log_values(client: Any, run: str, time: int, values: dict[str, Any]) -> None:
    """Log parameters and metrics, which may be there already, in requests that MLflow takes."""
    from mlflow.entities import Metric, Param

    metrics = [Metric(key, value, time, 0) for key, value in values["metrics"].items()]
    parameters = [Param(key, str(value)[:LONGEST]) for key, value in values["parameters"].items()]
    while metrics or parameters:
        client.log_batch(run, metrics[:METRICS_AT_ONCE], parameters[:PARAMETERS_AT_ONCE])
        metrics, parameters = metrics[METRICS_AT_ONCE:], parameters[PARAMETERS_AT_ONCE:]


# what is read -----------------------------------------------------------------------------------


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
    nothing = f"MLflow at {uri} holds no comparison of detectors: run `python -m flows.pipeline`."
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).is_file():  # which MLflow would make
        raise InputError(nothing)
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
        raise InputError(nothing)
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
