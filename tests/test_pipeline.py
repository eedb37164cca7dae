"""The whole pipeline on its real default data: files, records, what runs again after a change."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from flows import pipeline as whole
from flows import versions
from opnp import artifacts, parameters, stages, tracking
from opnp.datasets import read_manifest
from opnp.files import digest
from tests.conftest import run_program


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "artifacts").rglob("*"))
        if path.is_file() and path.name != ".gitignore"
    }


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def mlflow_runs() -> list[Any]:
    """Runs of the pipeline, without those of single detectors."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("opnp")
    assert experiment
    found = client.search_runs([experiment.experiment_id])
    return [run for run in found if tracking.PARENT not in run.data.tags]


def test_run_ends_with_the_comparison_and_where_to_look(finished: Path) -> None:
    output = (finished / "logs" / "output.txt").read_text()
    for words in ("opnp", "energy", "artifacts/report/index.html", "mask.safetensors", "mlflow.db"):
        assert words in output


def test_sensitivity_file_has_its_keys_shapes_and_types(finished: Path) -> None:
    tensors = load_file(finished / artifacts.SENSITIVITY)
    assert set(tensors) == {"weights", "neurons_mean", "neurons_gradient", "neurons_taylor"}
    assert tensors["weights"].shape == (7, 128)
    assert {t.dtype for t in tensors.values()} == {torch.float64}
    assert {tensors[f"neurons_{kind}"].shape for kind in ("mean", "gradient", "taylor")} == {(128,)}


def test_pruning_beats_energy_without_seeing_outliers(finished: Path) -> None:
    detectors = json.loads((finished / artifacts.METRICS).read_text())["detectors"]
    energy, opnp = (detectors[name]["mean"]["fpr95"] for name in ("energy", "opnp"))
    assert 15 < energy < 60
    assert opnp < energy


def test_metrics_hold_every_detector_set_and_metric(finished: Path) -> None:
    metrics = json.loads((finished / artifacts.METRICS).read_text())
    assert list(metrics["detectors"]) == [
        "msp", "maxlogit", "energy", "react", "dice", "opp", "onp", "opnp",
    ]  # fmt: skip
    for by_set in metrics["detectors"].values():
        assert set(by_set) == {"held-out-digits", "letters", "photo-patches", "noise", "mean"}
        for values in by_set.values():
            assert set(values) == {"fpr95", "fpr95_ood_positive", "auroc", "aupr_in", "aupr_out"}
            assert all(0 <= value <= 100 for value in values.values())
    assert set(metrics["id"]) == {"unpruned", "opp", "onp", "opnp"}
    drop = metrics["id"]["unpruned"]["accuracy"] - metrics["id"]["opnp"]["accuracy"]
    assert drop < 3


def test_scores_give_the_metrics_again(finished: Path) -> None:
    from sklearn.metrics import roc_auc_score

    scores = pq.read_table(finished / artifacts.SCORES).to_pandas()
    metrics = json.loads((finished / artifacts.METRICS).read_text())["detectors"]
    letters = scores[scores["set"].isin(["test", "letters"])]
    for name in ("energy", "dice", "opnp"):
        auroc = 100 * roc_auc_score(letters["set"] == "letters", letters[name])
        assert auroc == pytest.approx(metrics[name]["letters"]["auroc"], abs=1e-9)


def test_splits_are_disjoint(finished: Path) -> None:
    images = {
        split: {
            image["bytes"]
            for image in pq.read_table(finished / f"data/{split}.parquet")["image"].to_pylist()
        }
        for split in ("train", "validation", "test", "ood/held-out-digits")
    }
    for first in images:
        for second in images:
            assert first == second or not images[first] & images[second]


def test_fetch_reproduces_the_committed_hashes(finished: Path) -> None:
    """The pipeline has fetched without a complaint; this is what it compared."""
    recorded = yaml.safe_load((finished / "data.dvc").read_text())
    manifest = json.loads((finished / artifacts.MANIFEST).read_text())
    assert recorded["meta"]["files"] == {n: s["sha256"] for n, s in manifest["sets"].items()}
    committed = Path(__file__).parents[1] / "data.dvc"
    assert recorded == yaml.safe_load(committed.read_text())


def test_changed_data_are_refused_by_name(
    workspace: Path, prefect_api: str, call: Callable[..., str]
) -> None:
    from flows.fetch import fetch

    text = (workspace / "data.dvc").read_text()
    sha256 = read_manifest().sets["ood/letters"].sha256
    (workspace / "data.dvc").write_text(text.replace(sha256, "0" * 64))
    message = call(fetch)
    assert "data/ood/letters.parquet" in message
    assert message.count("\n") == 0


def test_second_run_has_nothing_to_do(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in workspace.glob("artifacts/**/*.*")}
    monkeypatch.setattr("flows.server.start", lambda: pytest.fail("a server was started"))
    whole.pipeline()
    assert "Nothing has changed" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in workspace.glob("artifacts/**/*.*")}


@pytest.mark.parametrize(
    ("old", "new", "concerned"),
    [
        ("bootstrap: 1000", "bootstrap: 100", ["evaluate", "report"]),
        ("max_accuracy_drop: 1.0", "max_accuracy_drop: 2.0", ["search", "report"]),
        ("temperature: 1.0", "temperature: 2.0", ["sensitivity", "search", "evaluate", "report"]),
        ("    - blobs\n", "", ["features", "search", "evaluate", "report"]),
        ("epochs: 15", "epochs: 2", ["train", "report"]),
        ("noise: noise\n", "\n", ["fetch", "report"]),
    ],
)
def test_a_parameter_concerns_only_its_stages(
    workspace: Path, old: str, new: str, concerned: list[str]
) -> None:
    """Stages further down follow once their inputs have changed."""
    replace(workspace / "params.yaml", old, new)
    chosen = parameters.load()
    assert [stage for stage in whole.STAGES if whole.outdated(stage, chosen)] == concerned


def test_plain_functions_and_any_number_of_workers_give_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline has run shards in parallel and in other processes; here they run one by one."""
    shutil.copytree(finished / "data", tmp_path / "data")
    shutil.copy2(finished / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    chosen = parameters.load()
    for stage in whole.STAGES[1:]:
        getattr(stages, stage)(chosen)
    assert contents(tmp_path) == contents(finished)


def test_an_experiment_runs_only_its_stages_against_one_server(workspace: Path) -> None:
    """`dvc exp run` starts a process for each stage; all share one Prefect server, which ends."""
    before = contents(workspace)
    data_file = (workspace / "data.dvc").read_text()
    metrics = run_program("dvc", "metrics", "show", "--json", cwd=workspace)
    assert json.loads(metrics.stdout)[""]["data"]["artifacts/evaluation/metrics.json"]
    done = run_program(
        "dvc", "exp", "run", "-S", "search.max_accuracy_drop=0.5", "-S", "evaluate.bootstrap=50",
        cwd=workspace,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line for line in done.stdout.splitlines() if line.startswith("Running stage")]
    assert ran == [f"Running stage '{stage}':" for stage in ("search", "evaluate", "report")]
    servers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "flows.server" in (process.info["cmdline"] or ())
        and Path(process.cwd()).resolve() == workspace.resolve()
    ]
    psutil.wait_procs(servers, timeout=60)  # it notices within seconds that DVC has ended
    assert not list((workspace / "logs").glob("*.address"))
    assert (workspace / "logs/prefect-server.log").read_text().count("serving http") == 1
    after = contents(workspace)
    assert len(mlflow_runs()) == 2
    kept = "artifacts/sensitivity/sensitivity.safetensors"
    assert before[kept] == after[kept]
    assert (
        before["artifacts/evaluation/intervals.json"]
        != after["artifacts/evaluation/intervals.json"]
    )
    assert (workspace / "data.dvc").read_text() == data_file
    status = run_program("dvc", "status", "--json", cwd=workspace)
    assert json.loads(status.stdout) == {}
    plots = run_program("dvc", "plots", "show", cwd=workspace)
    assert plots.returncode == 0, plots.stderr
    assert (workspace / "dvc_plots" / "index.html").is_file()
    diff = run_program("dvc", "metrics", "diff", "--json", cwd=workspace)
    assert diff.returncode == 0, diff.stderr


def test_mlflow_holds_the_run(workspace: Path) -> None:
    (run,) = mlflow_runs()
    assert run.info.status == "FINISHED"
    metrics = json.loads((workspace / artifacts.METRICS).read_text())
    logged = run.data.metrics
    assert logged["opnp/mean/fpr95"] == metrics["detectors"]["opnp"]["mean"]["fpr95"]
    assert logged["id/opnp/accuracy"] == metrics["id"]["opnp"]["accuracy"]
    assert logged["seconds/train"] > 0
    assert run.data.params["search/max_accuracy_drop"] == "1.0"
    assert run.data.tags["backbone"] == "resnet"
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    from mlflow import MlflowClient

    client = MlflowClient(tracking.tracking_uri())
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"mask.safetensors", "index.html", "params.yaml", "trials.parquet"} <= names
    assert run.inputs is not None
    inputs = {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs}
    assert inputs["train"] == digest(Path("data/train.parquet"), "md5")
    assert set(inputs) == set(read_manifest().sets)


def test_a_tracking_server_that_is_down_loses_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking.stash(parameters.load(), {"train": 1.5})
    tracking.log_or_wait()
    assert "could not be reached" in capsys.readouterr().err
    assert len(tracking.waiting()) == 1

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tracking.UNLOGGED / "0-broken").mkdir()
    (tracking.UNLOGGED / "0-broken" / "run.json").write_text("{")
    tracking.log_or_wait()
    assert "0-broken" in capsys.readouterr().err
    assert [folder.name for folder in tracking.waiting()] == ["0-broken"]
    assert 1.5 in [run.data.metrics["seconds/train"] for run in mlflow_runs()]


def test_features_resume_without_computing_a_whole_shard_twice(
    workspace: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.features import features

    before = contents(workspace)
    lost, cut, stray = (
        workspace / "artifacts/features" / name
        for name in ("train/00001.arrow", "proxies/phase/00000.arrow", "ood/gone/00000.arrow")
    )
    lost.unlink()
    os.truncate(cut, cut.stat().st_size // 2)
    stray.parent.mkdir()
    shutil.copy2(workspace / "artifacts/features/test/00000.arrow", stray)
    times = {p: p.stat().st_mtime_ns for p in workspace.glob("artifacts/features/**/*.arrow")}
    features(parameters.load())
    assert contents(workspace) == before
    again = {p: p.stat().st_mtime_ns for p in workspace.glob("artifacts/features/**/*.arrow")}
    assert {path for path in again if again[path] != times.get(path)} == {lost, cut}


def test_features_of_other_code_are_made_again(
    workspace: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.features import features
    from flows.sensitivity import sensitivity

    times = {p: p.stat().st_mtime_ns for p in workspace.glob("artifacts/*/**/*.*")}
    monkeypatch.setattr(stages, "code_digest", lambda *modules: "other")
    features(parameters.load())
    sensitivity(parameters.load())
    for path in workspace.glob("artifacts/[fs]e[an][ts]*/**/*.[as]*"):
        assert path.stat().st_mtime_ns != times[path], path


def test_a_checkpoint_that_was_replaced_is_noticed(workspace: Path) -> None:
    shutil.copy2(workspace / artifacts.BACKBONE, "mine.safetensors")
    replace(workspace / "params.yaml", "checkpoint: null", "checkpoint: mine.safetensors")
    chosen = parameters.load()
    stages.train(chosen)
    versions.record("train")
    assert not whole.outdated("train", chosen)
    with Path("mine.safetensors").open("ab") as file:
        file.write(b" ")
    assert whole.outdated("train", chosen)


def test_sensitivity_resumes_to_the_same_bits(workspace: Path, prefect_api: str) -> None:
    from flows.sensitivity import sensitivity

    before = contents(workspace)
    folder = workspace / "artifacts/sensitivity"
    (folder / "sensitivity.safetensors").unlink()
    os.truncate(folder / "shards/00000.safetensors", 100)
    kept = (folder / "shards/00001.safetensors").stat().st_mtime_ns
    sensitivity(parameters.load())
    assert contents(workspace) == before
    assert (folder / "shards/00001.safetensors").stat().st_mtime_ns == kept
