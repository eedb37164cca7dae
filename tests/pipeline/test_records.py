"""What MLflow holds of a run: really logged, to SQLite."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from opnp.detectors.names import ours
from opnp.metrics import ranking
from opnp.metrics.separation import METRICS
from opnp.pipeline import parameters, records
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.pipeline.results.data import data_parameters
from opnp.pipeline.results.search import CANDIDATE, CHOICE, COUNTS, SETTING
from opnp.pruning.methods import METHODS
from opnp.runtime.files import write_csv, write_json
from opnp.tracking import history, mlflow_client, models
from opnp.workspace import Workspace
from tests.conftest import HERE
from tests.helpers.runs import write_backbone

DETECTORS = {"energy": 40.0, "opnp": 30.0, "opnp+gen": 20.0}
KINDS = {"near-a": "near", "far-b": "far"}
TRAINING = {
    "train_accuracy": 99, "validation_accuracy": 98, "parameters": 9, "features": 3, "classes": 2,
    "checkpoint": None,
}  # fmt: skip


def chosen(backbone: str = "resnet", data: str = "digits", seed: int = 0) -> Parameters:
    """The parameters of the repository but for these."""
    whole = parameters.load(Path(__file__).parents[2] / "params.yaml")
    return whole.model_copy(
        update={
            "train": whole.train.model_copy(update={"backbone": backbone}),
            "data": whole.data.model_copy(update={"id": data}),
            "seed": seed,
        }
    )


def write_run(
    fpr95: dict[str, float],
    of: Parameters | None = None,
    kinds: dict[str, str] = KINDS,
    pruned: float = 12.5,
    same: Mapping[str, str] | None = None,
) -> Run:
    """Write the files of a run in the current folder.

    Args:
        fpr95: the mean FPR95 of each detector.
        of: parameters of the run, but for its detectors.
        kinds: of the OOD sets.
        pruned: percent of the weights that detectors of ours prune.
        same: detectors that are another one, since they prune nothing.
    """
    same = same or {}
    of = of or chosen()
    compared = of.evaluate.model_copy(update={"detectors": [*fpr95, "odin"]})
    run = Run(HERE, of.model_copy(update={"evaluate": compared}))
    for path in records.files(HERE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    detectors = {
        name: ranking.with_means(
            {
                column: dict.fromkeys(METRICS, 100 - value)
                | {"fpr95": value - 1 if kind == "near" else value + 1}
                for column, kind in kinds.items()
            },
            kinds,
        )
        for name, value in fpr95.items()
    }
    quality = {"accuracy": 97.5, "ece": 1.0, "nll": 0.1}
    heads = dict.fromkeys(("unpruned", "opnp"), quality) | {"opnp+react": {"accuracy": 97.0}}
    write_json(HERE.metrics, {"detectors": detectors, "id": heads})
    entry = {"role": "train", "source": "digits", "count": 1, "classes": {}, "sha256": "d"}
    data = {"parameters": data_parameters(of), "classes": ["0", "1"], "sets": {"train": entry}}
    write_json(HERE.manifest, data)
    HERE.images("train").write_text("images")
    sha256 = write_backbone(HERE, ["0", "1"])
    write_json(HERE.training, {**TRAINING, "sha256": sha256})
    write_csv(HERE.history, ["epoch", "loss", "train_accuracy", "validation_accuracy"], [])
    choice: dict[str, Any] = dict.fromkeys((*CANDIDATE, *SETTING, *CHOICE, "interval"), 0)
    choice |= {"interval": {"low": 0, "high": 2}, "fpr95": 1, "auroc": 2, "accuracy": 3}
    choice |= {"pruned": 4}
    write_json(
        HERE.search,
        {
            **dict.fromkeys(("unpruned", *METHODS), choice),
            **dict.fromkeys(COUNTS, 10),
            "backbone": sha256,
            "parameters": of.search.model_dump(),
            "proxies": [],
            "families": {},
            "doubts": [],
            "outliers": [],
        },
    )
    tuned: dict[str, dict[str, Any]] = {name: {"gamma": 0.1} for name in detectors}
    if "opnp" in tuned:
        tuned["opnp"] |= dict.fromkeys(CANDIDATE, 0)
    write_json(
        HERE.evaluation,
        {
            "hyperparameters": tuned,
            "trials": dict.fromkeys(detectors, 4),
            "ranks": ranking.ranks(detectors, list(kinds)),
            "pruned": {name: pruned for name in detectors if ours(name)},
            "same": {name: of for name, of in same.items() if name in detectors},
            "unavailable": {"odin": "It needs gradients of the input."},
            "oracle": {},
            "sets": {name: {"kind": kind, "count": 5} for name, kind in kinds.items()},
            "id_test_samples": 5,
        },
    )
    return run


@pytest.fixture(scope="module")
def mlflow_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's file without a run: making it takes seconds."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    with chdir(folder):
        MlflowClient(mlflow_client.tracking_uri(HERE)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def here(tmp_path: Path, mlflow_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace without files as the current folder, with an MLflow of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    shutil.copy2(mlflow_file, tmp_path)
    return tmp_path


def logged() -> tuple[Any, dict[str, Any]]:
    """The one run of the pipeline in MLflow, and its children by name."""
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_client.tracking_uri(HERE))
    experiment = client.get_experiment_by_name("opnp")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if mlflow_client.PARENT not in run.data.tags]
    assert len(parents) == 1
    children = [run for run in runs if run.info.run_id != parents[0].info.run_id]
    assert {run.data.tags[mlflow_client.PARENT] for run in children} <= {parents[0].info.run_id}
    by_name = {run.info.run_name: run for run in children}
    assert len(by_name) == len(children)
    return parents[0], by_name


def test_a_run_and_each_of_its_detectors(here: Path) -> None:
    written = write_run(DETECTORS)
    write_json(HERE.times, {"opnp+gen": {"tune": 1.5, "fit": 0.5, "score": 2.5}})
    records.record_run(written, {"train": 9.0})
    assert not records.waiting(HERE)
    run, children = logged()
    assert run.info.status == "FINISHED"
    assert run.data.metrics["opnp/mean/fpr95"] == 30
    assert run.data.metrics["opnp-gen/near-a/auroc"] == 80  # MLflow allows no plus sign
    assert run.data.metrics["id/opnp-react/accuracy"] == 97
    assert run.data.metrics["seconds/train"] == 9
    assert set(children) == {*DETECTORS, "odin"}
    child = children["opnp+gen"]
    assert child.info.status == "FINISHED"
    assert child.data.params == {
        "gamma": "0.1", "detector": "opnp+gen", "backbone": "resnet", "data": "digits", "seed": "0",
    }  # fmt: skip
    columns = ("near-a", "far-b", "near", "far", "mean")
    others = [metric for metric in METRICS if metric not in ("fpr95", "auroc")]
    assert child.data.metrics == {
        **{f"{column}/{metric}": 80 for column in columns for metric in others},
        "near-a/fpr95": 19, "near-a/auroc": 80, "near-a/rank": 1,
        "far-b/fpr95": 21, "far-b/auroc": 80, "far-b/rank": 1,
        "near/fpr95": 19, "near/auroc": 80, "far/fpr95": 21, "far/auroc": 80,
        "mean/fpr95": 20, "mean/auroc": 80, "mean/rank": 1,
        "trials": 4, "pruned": 12.5, "seconds/tune": 1.5, "seconds/fit": 0.5,
        "milliseconds_per_1000/score": 2.5,
    }  # fmt: skip


def test_a_detector_joins_the_latest_run_that_trained_its_backbone(here: Path) -> None:
    from mlflow import MlflowClient

    written = write_run(DETECTORS)
    records.record_run(written, {"train": 9.0})
    first, _ = logged()
    sha256 = written.backbone_stated.sha256
    client = MlflowClient(mlflow_client.tracking_uri(HERE))
    experiment = mlflow_client.experiment_id(client, HERE)
    assert models.run_of(client, experiment, sha256) == first.info.run_id  # no child of it
    assert models.run_of(client, experiment, "c") is None
    assert models.run_of(client, experiment, None) is None
    records.record_run(written, {"search": 1.0})
    assert models.run_of(client, experiment, sha256) not in (first.info.run_id, None)


def test_files_and_times_are_kept_with_the_run(here: Path) -> None:
    from mlflow import MlflowClient

    written = write_run(DETECTORS)
    write_json(HERE.times, {})
    records.record_run(written, {})
    run, _ = logged()
    files = MlflowClient(mlflow_client.tracking_uri(HERE)).list_artifacts(run.info.run_id)
    assert {path.name for path in records.files(HERE)} == {f.path for f in files}


def test_a_detector_that_could_not_run_says_why(here: Path) -> None:
    written = write_run(DETECTORS)
    records.record_run(written, {})
    _, children = logged()
    child = children["odin"]
    assert child.info.status == "FINISHED"
    assert child.data.tags["unavailable"] == "It needs gradients of the input."
    assert child.data.params["backbone"] == "resnet"
    assert not child.data.metrics
    assert "unavailable" not in children["energy"].data.tags


@pytest.mark.parametrize(
    ("step", "number"),
    [("create_run", 1), ("create_run", 3), ("log_batch", 2), ("log_artifact", 3)]
    + [("set_terminated", number) for number in (2, len(DETECTORS) + 2)],
)
def test_interrupted_logging_is_completed_and_nothing_doubled(
    here: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    """The line is cut after the given call of a kind has come through."""
    from mlflow import MlflowClient

    written = write_run(DETECTORS)
    real, calls = getattr(MlflowClient, step), 0

    def cut(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = real(*args, **kwargs)
        if calls == number:
            raise ConnectionError("the line is cut")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, cut)
        records.record_run(written, {})
    assert calls == number
    assert len(records.waiting(HERE)) == 1
    records.log_or_wait(HERE)
    assert not records.waiting(HERE)
    run, children = logged()
    assert {run.info.status, *(child.info.status for child in children.values())} == {"FINISHED"}
    assert set(children) == {*DETECTORS, "odin"}
    assert children["opnp"].data.metrics["mean/fpr95"] == 30


def test_a_run_that_is_half_logged_is_not_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    written = write_run(DETECTORS)
    records.record_run(written, {})

    def cut(*_: Any) -> None:
        raise ConnectionError("the line is cut")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", cut)
        records.record_run(write_run(DETECTORS, chosen(seed=1)), {})
    assert {run.seed for run in history.detector_runs(HERE, "opnp")} == {0}


def test_long_values_are_cut_to_what_mlflow_takes(here: Path) -> None:
    written = write_run(DETECTORS)
    evaluation = json.loads(HERE.evaluation.read_text())
    evaluation["hyperparameters"]["opnp"]["many"] = list(range(5000))
    evaluation["unavailable"]["odin"] = "why " * 5000
    write_json(HERE.evaluation, evaluation)
    records.record_run(written, {})
    _, children = logged()
    assert children["opnp"].data.params["many"].startswith("[0, 1, 2")
    assert children["odin"].data.tags["unavailable"].startswith("why why")


def test_more_metrics_than_a_request_holds(here: Path) -> None:
    kinds = {f"set-{i}": "near" if i < 3 else "far" for i in range(9)}
    detectors = {f"opnp+{i}": 20.0 + i for i in range(40)}
    written = write_run(detectors, kinds=kinds)
    records.record_run(written, {})
    run, children = logged()
    assert len(run.data.metrics) > 40 * 12 * 2 > mlflow_client.METRICS_AT_ONCE
    assert set(children) == {*detectors, "odin"}


@pytest.mark.parametrize("moment", ["copy2", "write_json", "rmtree"])
def test_a_run_that_dies_while_it_is_recorded_is_logged_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Before and after its record is whole, and after it was logged."""
    written = write_run(DETECTORS)
    records.begin(HERE)
    module: Any = records if moment == "write_json" else shutil

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, die)
        with pytest.raises(KeyboardInterrupt):
            records.record_run(written, {})
    assert records.begun(HERE) == (moment != "rmtree")
    if records.begun(HERE):
        records.stash(written, {})
    records.log_or_wait(HERE)
    assert not records.waiting(HERE)
    assert not records.begun(HERE)
    logged()


@contextmanager
def served(folder: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """An MLflow server that keeps runs and files in a folder."""
    words = [
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", f"{folder}/files",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Kill a server and its workers, as the loss of its machine does."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_run_whose_server_dies_while_it_is_logged_is_logged_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A real server, killed once in the midst of the run's detectors, and there again later."""
    from mlflow import MlflowClient

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    written = write_run(DETECTORS)
    real, calls = MlflowClient.log_batch, 0
    with served(here, port) as server:

        def killing(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                stop(server)
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_batch", killing)
            records.record_run(written, {})
        [told] = [each.getMessage() for each in caplog.records if each.name[:5] == "opnp."]
        assert "could not be reached" in told
        assert len(records.waiting(HERE)) == 1
        records.record_run(write_run(DETECTORS, chosen(seed=1)), {})  # while it is down
        assert len(records.waiting(HERE)) == 2
    with served(here, port):
        for _ in range(2):
            records.log_or_wait(HERE)
            assert not records.waiting(HERE)
            runs = history.detector_runs(HERE, "opnp")
            assert sorted((run.seed, run.detector) for run in runs) == [
                (seed, name) for seed in (0, 1) for name in sorted([*DETECTORS, "odin"])
            ]
            assert len({run.run for run in runs}) == 2


def artifacts(workspace: Path) -> set[Path]:
    return {path for path in (workspace / "mlruns").rglob("*") if path.is_file()}


def test_a_run_in_dvcs_copy_is_recorded_by_the_workspace_around_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `dvc exp run --queue` and `--temp` make them, before they remove the copy."""
    records.record_run(write_run(DETECTORS), {})
    around = Workspace(Path.cwd())
    for place in ("standard/tmpa1", "tmpb2"):
        copy = here / ".dvc" / "tmp" / "exps" / place
        copy.mkdir(parents=True)
        monkeypatch.chdir(copy)
        records.record_run(write_run(DETECTORS, chosen(seed=len(place))), {})
        assert not list(copy.glob("ml*"))
    monkeypatch.chdir(here)
    shutil.rmtree(here / ".dvc")
    found = history.detector_runs(around, "opnp")
    assert {run.seed for run in found} == {0, 5, 14}
    assert len({path.parent.parent for path in artifacts(here)}) == 3


def test_a_run_in_dvcs_copy_waits_in_the_workspace_around_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = here / ".dvc" / "tmp" / "exps" / "standard" / "tmpa1"
    copy.mkdir(parents=True)
    (here / "mlflow.db").unlink()
    (here / "mlflow.db").mkdir()  # a database that cannot be opened
    monkeypatch.chdir(copy)
    records.record_run(write_run(DETECTORS), {})
    assert not records.waiting(HERE)
    assert len(records.waiting(Workspace(here))) == 1


def test_a_copied_workspace_writes_into_itself(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    records.record_run(write_run(DETECTORS), {})
    copy = tmp_path_factory.mktemp("copies") / "copy"
    shutil.copytree(here, copy)
    before = artifacts(here)
    monkeypatch.chdir(copy)
    records.record_run(write_run(DETECTORS), {})
    assert artifacts(here) == before
    assert len(artifacts(copy)) == 2 * len(before)
    shutil.rmtree(here / "mlruns")
    client = MlflowClient(mlflow_client.tracking_uri(HERE))
    for run in client.search_runs([mlflow_client.experiment_id(client, HERE)]):
        if "record" in run.data.tags and mlflow_client.PARENT not in run.data.tags:
            assert client.list_artifacts(run.info.run_id)
