"""The whole pipeline on its real default data: files, records, what runs again after a change."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

import opnp
from flows import dvc_repo
from flows import pipeline as whole
from opnp.backbones import shards
from opnp.backbones.backbone import load_backbone
from opnp.data import imagesets
from opnp.data.imagesets import data_file, read_manifest
from opnp.detectors.names import detector_name, label
from opnp.errors import InputError
from opnp.metrics import ranking
from opnp.metrics.separation import ood_metrics
from opnp.pipeline import parameters, records, stages
from opnp.pipeline.detector import from_run
from opnp.pipeline.results import Run
from opnp.pipeline.results.data import data_parameters
from opnp.pruning.candidates import Candidate, setting_of
from opnp.pruning.energy import energy_score
from opnp.pruning.masks import PruningMask
from opnp.pruning.sensitivity import SensitivitySums
from opnp.runtime import tensors
from opnp.runtime.files import digest, remove_others
from opnp.tracking import mlflow_client
from opnp.workspace import Workspace
from tests.conftest import HERE, QUICK, ROOT, run_program, set_parameters
from tests.test_docs import opnp as run_opnp
from tests.test_docs import python

yaml = YAML(typ="safe", pure=True)

# A small search and a quick comparison, where another thing is asked about.
SMALL: dict[str, Any] = {
    "search.weights_low": [0],
    "search.weights_high": [0, 2],
    "search.neurons_low": [0, 10],
    "search.neurons_high": [0, 5],
    "search.neuron_sensitivity": ["mean"],
    "search.bootstrap": 20,
    "evaluate.detectors": ["energy", "opp", "onp", "opnp", "opnp+react", "opnp+knn", "knn"],
    "evaluate.budget": 2,
    "evaluate.bootstrap": 20,
}
# A run that makes a detector, and as little else as it can.
SMALLEST: dict[str, Any] = {
    **SMALL,
    "data.ood_count": 200,
    "search.proxies": ["blobs", "phase"],
    "search.clip": [None],
    "search.temperature": [1],
    "evaluate.detectors": ["energy", "opnp"],
    "retrain.bootstrap": 200,
}
METRICS = {"fpr95", "fpr95_ood_positive", "auroc", "aupr_in", "aupr_out"}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "artifacts").rglob("*"))
        if path.is_file() and path.name != ".gitignore"
    }


def but_report(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without the report, which shows how long detectors took."""
    return {name: data for name, data in found.items() if name != str(HERE.report)}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def mlflow_runs(parent: str | None = None) -> list[Any]:
    """Runs of the pipeline, latest first, or those of the single detectors of one of them."""
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_client.tracking_uri(HERE))
    experiment = client.get_experiment_by_name("opnp")
    assert experiment
    found = client.search_runs([experiment.experiment_id])
    return [run for run in found if run.data.tags.get(mlflow_client.PARENT) == parent]


def test_run_ends_with_the_comparison_and_where_to_look(finished: Path) -> None:
    output = (finished / "logs" / "output.txt").read_text()
    for words in ("opnp", "energy", "artifacts/report/index.html", "mask.safetensors", "mlflow.db"):
        assert words in output


def test_sensitivity_file_holds_the_sums_of_both_halves_at_every_setting(workspace: Path) -> None:
    chosen = parameters.load()
    found, metadata = tensors.load(HERE.sensitivity)
    h, _ = Run(HERE, chosen).features("train")
    clip = float(np.percentile(h.numpy(), 90))
    assert read(HERE.clips) == {"90.0": clip}
    assert metadata["settings"] == [
        {"clip": None, "threshold": None, "temperature": 1.0},
        {"clip": 90.0, "threshold": clip, "temperature": 1.0},
    ]
    assert set(found) == {
        f"{setting}/{half}/{name}"
        for setting in (0, 1)
        for half in (0, 1)
        for name in ("weights", "neurons_mean", "neurons_gradient", "neurons_taylor")
    }
    assert {t.dtype for t in found.values()} == {torch.float64}
    model = load_backbone(HERE.backbone).classifier
    # Halves are of every other row within each shard.
    size = chosen.features.shard_size
    rows = torch.arange(len(h)) % size % 2 == 0
    assert metadata["counts"] == 2 * [int(rows.sum()), int((~rows).sum())]
    for place, threshold in enumerate((None, clip)):
        for half, part in enumerate((h[rows], h[~rows])):
            sums = SensitivitySums.of(part, model.head.weight, model.head.bias, 1.0, threshold)
            for name in ("weights", "neurons_mean", "neurons_gradient", "neurons_taylor"):
                expected = getattr(sums, name)
                torch.testing.assert_close(found[f"{place}/{half}/{name}"], expected)
    merged = Run(HERE, chosen).sensitivities
    assert [each.count for each in merged] == [len(h), len(h)]
    assert [(each.clip, each.temperature) for each in merged] == [(None, 1.0), (clip, 1.0)]
    assert all(each.halves is not None for each in merged)


def test_what_the_search_chose_is_among_its_trials_and_in_its_masks(workspace: Path) -> None:
    chosen, found = parameters.load(), read(HERE.search)
    trials = pq.read_table(HERE.trials).to_pylist()
    assert found["candidates"] == len(trials)
    assert found["backbone"] == digest(HERE.backbone)
    assert (found["proxies"], found["outliers"]) == (list(chosen.search.proxies), [])
    unpruned = {key: trials[0][key] for key in found["unpruned"]}
    assert found["unpruned"] == unpruned
    assert (unpruned["clip"], unpruned["temperature"], unpruned["pruned"]) == (None, 1.0, 0)
    for trial in trials:
        figures = [trial[f"fpr95/{family}"] for family in chosen.search.proxies]
        assert trial["fpr95"] == pytest.approx(np.mean(figures))
    restrictions: dict[str, Callable[[Any], bool]] = {
        "clip": lambda t: not t["pruned"],
        "opp": lambda t: t["clip"] is None and not t["neurons_low"] + t["neurons_high"],
        "onp": lambda t: t["clip"] is None and not t["weights_low"] + t["weights_high"],
        "opnp": lambda t: t["clip"] is None,
        "opnp+react": lambda t: True,
    }
    for method, allowed in restrictions.items():
        record = found[method]
        best = {key: record[key] for key in unpruned}
        assert best in [{key: trial[key] for key in unpruned} for trial in trials]
        assert allowed(record)
        possible = [trial["fpr95"] for trial in trials if allowed(trial)]
        assert record["lowest"] == pytest.approx(min(possible))
        assert 1 <= record["within_noise"] <= len(possible)
        assert record["interval"]["low"] <= record["fpr95"] <= record["interval"]["high"]
        assert record["instability"] >= 0
    measured = Run(HERE, chosen).sensitivities
    for method, path in (("opnp", HERE.mask), ("opnp+react", HERE.mask_react)):
        candidate = Candidate.stated(found[method])
        mask, expected = PruningMask.load(path), candidate.mask(setting_of(measured, candidate))
        assert torch.equal(mask.weights, expected.weights)
        assert torch.equal(mask.neurons, expected.neurons)


def test_pruning_beats_energy_without_seeing_outliers(finished: Path) -> None:
    detectors = read(finished / HERE.metrics)["detectors"]
    fpr95 = {name: of["mean"]["fpr95"] for name, of in detectors.items()}
    assert 15 < fpr95["energy"] < 60
    assert fpr95["opnp+react"] < fpr95["energy"]
    for method in ("onp", "opnp"):  # the mask that prunes least within noise
        assert fpr95[method] < fpr95["energy"] + 3


def test_metrics_and_intervals_hold_every_detector_set_and_metric(finished: Path) -> None:
    metrics = read(finished / HERE.metrics)
    intervals = read(finished / HERE.intervals)
    assert list(metrics["detectors"]) == QUICK["evaluate.detectors"]
    sets = {"near": ["held-out-digits"], "far": ["letters", "photo-patches", "noise"]}
    sets["mean"] = sets["near"] + sets["far"]
    for name, by_set in metrics["detectors"].items():
        assert set(by_set) == {*sets["mean"], *sets}
        assert set(intervals["detectors"][name]) == set(by_set)
        for column, values in by_set.items():
            assert set(values) == METRICS
            assert all(0 <= value <= 100 for value in values.values())
            for metric, ends in intervals["detectors"][name][column].items():
                assert ends["low"] - 5 <= values[metric] <= ends["high"] + 5
                assert ends["low"] <= ends["high"]
        for column, parts in sets.items():
            for metric in METRICS:
                mean = np.mean([by_set[part][metric] for part in parts])
                assert by_set[column][metric] == pytest.approx(mean)
    assert set(metrics["id"]) == {"unpruned", "clip", "opp", "onp", "opnp", "opnp+react"}
    assert metrics["trials"] == read(finished / HERE.evaluation)["trials"]
    drop = metrics["id"]["unpruned"]["accuracy"] - metrics["id"]["opnp"]["accuracy"]
    assert drop < 3


def test_evaluation_says_what_was_tried_and_what_hindsight_would_give(finished: Path) -> None:
    evaluation = read(finished / HERE.evaluation)
    detectors = read(finished / HERE.metrics)["detectors"]
    found = read(finished / HERE.search)
    for key in ("hyperparameters", "trials", "ranks"):
        assert list(evaluation[key]) == list(detectors)
    assert evaluation["unavailable"] == {}
    for name, trials in evaluation["trials"].items():
        if name == "opnp+react":
            assert trials == found["candidates"]
        elif name in ("opp", "onp", "opnp"):
            assert 4 < trials < found["candidates"]
        elif name == "opnp&knn":
            assert trials == evaluation["trials"]["opnp"] + evaluation["trials"]["knn"]
        else:
            assert 1 <= trials <= (8 if name.startswith("opnp+") else 4)
    assert {s: (entry["kind"], entry["count"]) for s, entry in evaluation["sets"].items()} == {
        "held-out-digits": ("near", 400),
        "letters": ("far", 400),
        "photo-patches": ("far", 400),
        "noise": ("far", 400),
    }
    apart = [name for name in detectors if name not in evaluation["same"]]
    count = len(apart)
    for column in [*evaluation["sets"], "mean"]:
        ranks = [evaluation["ranks"][name][column] for name in apart]
        assert sum(ranks) == pytest.approx(count * (count + 1) / 2)  # ties share their places
    oracle = evaluation["oracle"]
    assert set(oracle) == {"opnp", "opnp+react"}
    assert oracle["opnp+react"]["fpr95"] <= oracle["opnp"]["fpr95"]
    unpruned = fpr95_of_the_whole_head(finished)
    for method, best in oracle.items():
        assert best["fpr95"] <= detectors[method]["mean"]["fpr95"] + 1e-9
        kept = unpruned - detectors[method]["mean"]["fpr95"]
        assert best["kept"] == pytest.approx(100 * kept / (unpruned - best["fpr95"]))


def fpr95_of_the_whole_head(finished: Path) -> float:
    """The mean FPR95 of the energy at T = 1, which the row Energy may have at another T."""
    run = Run(Workspace(finished), parameters.load(finished / HERE.parameters))
    head = run.backbone.classifier.head
    scores = {
        split: -energy_score(head(run.features(split)[0]))
        for split in ("test", *(f"ood/{name}" for name in run.manifest.ood))
    }
    inside = scores.pop("test")
    return float(np.mean([ood_metrics(inside, each)["fpr95"] for each in scores.values()]))


def test_scores_give_the_metrics_again(finished: Path) -> None:
    from sklearn.metrics import roc_auc_score

    scores = pq.read_table(finished / HERE.scores).to_pandas()
    metrics = read(finished / HERE.metrics)["detectors"]
    letters = scores[scores["set"].isin(["test", "letters"])]
    for name in metrics:
        auroc = 100 * roc_auc_score(letters["set"] == "letters", letters[name])
        assert auroc == pytest.approx(metrics[name]["letters"]["auroc"], abs=1e-9)


def test_comparison_holds_every_detector_and_column(finished: Path) -> None:
    metrics = read(finished / HERE.metrics)["detectors"]
    evaluation = read(finished / HERE.evaluation)
    rows = pq.read_table(finished / HERE.comparison).to_pylist()
    assert len(rows) == len(metrics) * 7
    order = list(dict.fromkeys(row["detector"] for row in rows))
    assert order == ranking.ranked(metrics, evaluation["ranks"])
    for row in rows:
        assert row["fpr95"] == metrics[row["detector"]][row["column"]]["fpr95"]
        assert row["rank"] == evaluation["ranks"][row["detector"]].get(row["column"])
        hyperparameters = json.loads(row["hyperparameters"])
        assert hyperparameters == evaluation["hyperparameters"][row["detector"]]
    text = (finished / HERE.comparison_text).read_text()
    listed = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()[4:]]
    apart = [name for name in order if name not in evaluation["same"]]
    assert listed[: len(apart)] == [label(name, evaluation["pruned"].get(name)) for name in apart]
    for name, other in evaluation["same"].items():
        assert label(name, 0.0, other) in text
        for column in metrics[name]:
            assert metrics[name][column] == metrics[other][column]


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
    recorded = yaml.load((finished / "data.dvc").read_text())
    manifest = json.loads((finished / HERE.manifest).read_text())
    assert recorded["meta"]["files"] == {n: s["sha256"] for n, s in manifest["sets"].items()}
    committed = Path(__file__).parents[2] / "data.dvc"
    assert recorded == yaml.load(committed.read_text())


def test_changed_data_are_refused_by_name(
    workspace: Path, prefect_api: str, call: Callable[..., str]
) -> None:
    from flows.fetch import fetch

    text = (workspace / "data.dvc").read_text()
    sha256 = read_manifest(HERE.data).sets["ood/letters"].sha256
    (workspace / "data.dvc").write_text(text.replace(sha256, "0" * 64))
    message = call(fetch)
    assert "data/ood/letters.parquet" in message
    assert message.count("\n") == 0


def test_second_run_has_nothing_to_do(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in workspace.glob("artifacts/**/*.*")}
    monkeypatch.setattr("flows.prefect_server.start", lambda: pytest.fail("a server was started"))
    whole.pipeline(HERE)
    assert "Nothing has changed" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in workspace.glob("artifacts/**/*.*")}


@pytest.mark.slow
def test_a_run_that_dies_before_it_is_recorded_is_recorded_by_the_next(
    workspace: Path,
    prefect_api: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    HERE.report.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(records, "stash", die)
        with pytest.raises(KeyboardInterrupt):
            whole.pipeline(HERE)
    assert len(mlflow_runs()) == 1
    for _ in range(2):
        whole.pipeline(HERE)
        assert "Nothing has changed" in capsys.readouterr().out
        assert len(mlflow_runs()) == 2
    assert mlflow_runs()[0].data.metrics["seconds/train"] > 0


@pytest.mark.parametrize(
    ("name", "value", "concerned"),
    [
        ("evaluate.bootstrap", 50, ["evaluate", "report"]),
        ("evaluate.detectors", ["energy", "opnp"], ["evaluate", "report"]),
        ("energy.temperature", 2.0, ["evaluate", "report"]),
        ("search.max_accuracy_drop", 2.0, ["search", "evaluate", "report"]),
        ("search.clip", [None, 80], ["sensitivity", "search", "evaluate", "report"]),
        ("search.temperature", [1.0, 2.0], ["sensitivity", "search", "evaluate", "report"]),
        ("search.proxies", ["blobs"], ["features", "search", "evaluate", "report"]),
        (
            "search.outliers",
            {"drawn": "drawn.parquet"},
            ["fetch", "features", "search", "evaluate", "report"],
        ),
        ("train.epochs", 2, ["train", "report"]),
        ("train.spcp", 90, ["train", "report"]),
        ("data.far", {"letters": "letters"}, ["fetch", "report"]),
        ("engine.runner", "processes", []),
    ],
)
def test_a_parameter_concerns_only_its_stages(
    workspace: Path, name: str, value: Any, concerned: list[str]
) -> None:
    """Stages further down follow once their inputs have changed."""
    set_parameters(workspace, {name: value})
    chosen = parameters.load()
    assert [stage for stage in whole.STAGES if whole.outdated(HERE, stage, chosen)] == concerned


def test_a_file_that_leaves_out_what_has_a_default_is_completed(workspace: Path) -> None:
    """As a preset does: what is written in is what the run was made with, and DVC agrees."""
    path = workspace / "params.yaml"
    chosen = parameters.load(path)
    stated = yaml.load(path.read_text())
    for name, values in stated.items():
        if isinstance(values, dict):
            section = getattr(chosen, name)
            fields = type(section).model_fields
            stated[name] = {
                key: value
                for key, value in values.items()
                if getattr(section, key) != fields[key].get_default()
            }
    writer = YAML()
    writer.dump({name: value for name, value in stated.items() if value}, path)
    partial = path.read_text()
    assert "energy:" not in partial
    done = run_program("python", "-m", "flows.pipeline", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert "there is nothing to do" in done.stdout
    assert parameters.load(path) == chosen
    assert parameters.complete(path) == []
    path.write_text(partial)
    done = run_program("python", "-m", "flows.train", cwd=workspace)
    assert done.returncode == 0, done.stderr
    done = run_program("dvc", "status", cwd=workspace)
    assert "up to date" in done.stdout, done.stdout


def test_plain_functions_and_any_number_of_workers_give_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline has run shards in parallel, in its own folder; here they run one by one, from a
    folder that holds nothing."""
    workspace, elsewhere = Workspace(tmp_path / "workspace"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    shutil.copytree(finished / "data", workspace.data)
    shutil.copy2(finished / "params.yaml", workspace.parameters)
    chosen = parameters.load(workspace.parameters)
    for stage in whole.STAGES[1:-1]:
        getattr(stages, stage).run(workspace, chosen)
    assert but_report(contents(workspace.root)) == but_report(contents(finished))
    shutil.copy2(finished / HERE.times, workspace.times)
    stages.report.run(workspace, chosen)
    assert contents(workspace.root) == contents(finished)
    assert not any(elsewhere.iterdir())


@pytest.mark.slow
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
    late = time.monotonic() + 300
    while list((workspace / "logs").glob("*.address")):  # the server sees that DVC has ended
        assert time.monotonic() < late
        time.sleep(0.1)
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
    metrics = read(HERE.metrics)
    logged = run.data.metrics
    assert logged["opnp/mean/fpr95"] == metrics["detectors"]["opnp"]["mean"]["fpr95"]
    assert logged["opnp-react/near/auroc"] == metrics["detectors"]["opnp+react"]["near"]["auroc"]
    assert logged["id/opnp/accuracy"] == metrics["id"]["opnp"]["accuracy"]
    assert logged["seconds/train"] > 0
    assert run.data.params["search/max_accuracy_drop"] == "None"
    assert run.data.tags["backbone"] == "resnet"
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_client.tracking_uri(HERE))
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names == {path.name for path in records.files(HERE)}
    assert run.inputs is not None
    inputs = {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs}
    assert inputs["train"] == digest(Path("data/train.parquet"), "md5")
    assert set(inputs) == set(read_manifest(HERE.data).sets)


def test_mlflow_holds_each_detector_as_a_child_of_the_run(workspace: Path) -> None:
    (run,) = mlflow_runs()
    evaluation, metrics = read(HERE.evaluation), read(HERE.metrics)["detectors"]
    by_name = {child.data.tags["detector"]: child for child in mlflow_runs(run.info.run_id)}
    assert set(by_name) == set(QUICK["evaluate.detectors"])
    for name, child in by_name.items():
        assert child.info.status == "FINISHED"
        logged = child.data.metrics
        assert logged["near/fpr95"] == metrics[name]["near"]["fpr95"]
        assert logged["mean/rank"] == evaluation["ranks"][name]["mean"]
        assert logged["trials"] == evaluation["trials"][name]
        assert child.data.params["backbone"] == "resnet"
        assert child.data.params["seed"] == "0"
    assert by_name["knn"].data.params["k"] == str(evaluation["hyperparameters"]["knn"]["k"])


def test_a_tracking_server_that_is_down_loses_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    records.stash(Run(HERE, parameters.load()), {"train": 1.5})
    records.log_or_wait(HERE)
    assert "could not be reached" in caplog.text
    assert len(records.waiting(HERE)) == 1

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (HERE.unlogged / "0-broken").mkdir()
    (HERE.unlogged / "0-broken" / "run.json").write_text("{")
    records.log_or_wait(HERE)
    assert "0-broken" in caplog.text
    assert [folder.name for folder in records.waiting(HERE)] == ["0-broken"]
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
    features(HERE, parameters.load())
    assert contents(workspace) == before
    again = {p: p.stat().st_mtime_ns for p in workspace.glob("artifacts/features/**/*.arrow")}
    assert {path for path in again if again[path] != times.get(path)} == {lost, cut}


def test_features_of_other_code_are_made_again(
    workspace: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.features import features
    from flows.sensitivity import sensitivity

    times = {p: p.stat().st_mtime_ns for p in workspace.glob("artifacts/*/**/*.*")}
    monkeypatch.setattr(stages.features, "code_digest", lambda *modules: "other")
    features(HERE, parameters.load())
    sensitivity(HERE, parameters.load())
    for path in workspace.glob("artifacts/[fs]e[an][ts]*/**/*.[as]*"):
        assert path.stat().st_mtime_ns != times[path], path


def test_a_checkpoint_that_was_replaced_is_noticed(workspace: Path) -> None:
    shutil.copy2(workspace / HERE.backbone, "mine.safetensors")
    set_parameters(workspace, {"train.checkpoint": "mine.safetensors"})
    chosen = parameters.load()
    stages.train.run(HERE, chosen)
    dvc_repo.record(HERE, "train")
    assert not whole.outdated(HERE, "train", chosen)
    with Path("mine.safetensors").open("ab") as file:
        file.write(b" ")
    assert whole.outdated(HERE, "train", chosen)


def test_sensitivity_resumes_to_the_same_bits(workspace: Path, prefect_api: str) -> None:
    from flows.sensitivity import sensitivity

    before = contents(workspace)
    folder = workspace / "artifacts/sensitivity"
    (folder / "sensitivity.safetensors").unlink()
    (folder / "clips.json").write_text('{"50.0": 0.1}')
    os.truncate(folder / "shards/00000.safetensors", 100)
    kept = (folder / "shards/00001.safetensors").stat().st_mtime_ns
    sensitivity(HERE, parameters.load())
    assert contents(workspace) == before
    assert (folder / "shards/00001.safetensors").stat().st_mtime_ns == kept


def test_sums_of_a_shard_are_used_again_until_a_setting_changes(workspace: Path) -> None:
    def sums() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in Path().glob("artifacts/s*/shards/*")}

    before, times = contents(workspace), sums()
    stages.sensitivity.run(HERE, parameters.load())
    assert (contents(workspace), sums()) == (before, times)
    for change in ({"search.clip": [None, 80]}, {"search.temperature": [1.0, 3.0]}):
        set_parameters(workspace, change)
        times = sums()
        stages.sensitivity.run(HERE, parameters.load())
        assert all(times[path] != time for path, time in sums().items())
    assert [
        (each["clip"], each["temperature"]) for each in Run(HERE, parameters.load()).settings
    ] == [(None, 1.0), (None, 3.0), (80.0, 1.0), (80.0, 3.0)]


def test_training_samples_divide_into_shards_of_any_size(workspace: Path) -> None:
    """A last shard of a single row leaves one of its halves empty."""
    (count,) = {len(pq.read_table("data/train.parquet"))}
    before, _ = tensors.load(HERE.sensitivity)
    size = next(size for size in range(100, count) if count % size == 1)
    set_parameters(workspace, {"features.shard_size": size})
    chosen = parameters.load()
    planned = shards.divide("train", count, size)
    for shard in planned:
        stages.features.compute(HERE, chosen, shard)
    remove_others(HERE.shards("train"), {shard.path(HERE.features) for shard in planned})
    found = stages.sensitivity.run(HERE, chosen)
    assert [each.count for each in found] == [count, count]
    total = (before["0/0/weights"] + before["0/1/weights"]) / count
    torch.testing.assert_close(found[0].weights, total, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_real_outliers_are_searched_and_tuned_on(workspace: Path, prefect_api: str) -> None:
    """They come beside the proxies, then alone, and go again."""
    set_parameters(
        workspace,
        {
            **SMALL,
            "data.far": {"letters": "letters", "noise": "noise"},
            "search.outliers": {"patches": "photo-patches"},
            "search.proxies": ["blobs"],
            "search.reported": [],
        },
    )
    chosen = parameters.load()
    assert dvc_repo.data_changed(HERE, data_parameters(chosen))
    seconds = whole.run_stages(HERE, chosen)
    assert set(seconds) == {"fetch", "features", "search", "evaluate", "report"}
    recorded = yaml.load((workspace / "data.dvc").read_text())["meta"]
    assert recorded["parameters"]["outliers"] == {"patches": "photo-patches"}
    manifest = read_manifest(HERE.data)
    assert recorded["files"]["outliers/patches"] == digest(Path("data/outliers/patches.parquet"))
    assert manifest.sets["outliers/patches"].role == "outliers"
    assert manifest.sets["outliers/patches"].count == 400
    assert set(manifest.ood) == {"held-out-digits", "letters", "noise"}
    h, labels = Run(HERE, chosen).features("outliers/patches")
    assert h.shape == (400, 128)
    assert set(labels.tolist()) == {-1}

    found = read(HERE.search)
    assert (found["proxies"], found["outliers"]) == (["blobs"], ["patches"])
    both = ["fpr95/blobs", "fpr95/patches"]
    trials = pq.read_table(HERE.trials)
    assert [name for name in trials.column_names if name.startswith("fpr95/")] == both
    for trial in trials.to_pylist():
        assert trial["fpr95"] == pytest.approx((trial[both[0]] + trial[both[1]]) / 2)
    evaluation = read(HERE.evaluation)
    assert set(evaluation["sets"]) == set(manifest.ood)
    assert set(pq.read_table(HERE.scores)["set"].to_pylist()) == {"test", *manifest.ood}
    assert "patches" in (workspace / HERE.report).read_text()
    records.record_run(Run(HERE, chosen), seconds)
    run = mlflow_runs()[0]
    contexts = {
        entry.dataset.name: tag.value for entry in run.inputs.dataset_inputs for tag in entry.tags
    }
    assert contexts["outliers/patches"] == "outliers"
    assert run.data.params["search/outliers/patches"] == "photo-patches"

    set_parameters(workspace, {"search.proxies": []})
    alone = parameters.load()
    assert set(whole.run_stages(HERE, alone)) == {"features", "search", "evaluate", "report"}
    assert not any((HERE.features / "proxies").iterdir())
    found = read(HERE.search)
    assert (found["proxies"], found["outliers"]) == ([], ["patches"])
    trials = pq.read_table(HERE.trials)
    assert trials["fpr95"].to_pylist() == trials["fpr95/patches"].to_pylist()
    assert "fpr95/blobs" not in trials.column_names
    assert not [stage for stage in whole.STAGES if whole.outdated(HERE, stage, alone)]

    set_parameters(workspace, {"search.outliers": {}, "search.proxies": ["blobs"]})
    assert dvc_repo.data_changed(HERE, data_parameters(parameters.load()))
    with pytest.raises(InputError, match=r"data was made with other .* outlier sets"):
        stages.features.run(HERE, parameters.load())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "unavailable"), [("convnext", {}), ("vit", {"rankfeat": "feature maps"})]
)
def test_a_checkpoint_of_another_backbone_is_evaluated(
    workspace: Path, prefect_api: str, kind: str, unavailable: dict[str, str]
) -> None:
    """What cannot run on it is reported with its reason, and the run succeeds."""
    set_parameters(
        workspace,
        {
            **SMALL,
            "train.backbone": kind,
            "train.width": 8,
            "train.epochs": 8,
            "train.optimizer": "adamw",
            "train.learning_rate": 0.005,
            "search.proxies": ["blobs", "phase"],
            "evaluate.detectors": [*SMALL["evaluate.detectors"], "rankfeat", "nac", "opnp+vim"],
        },
    )
    trained = stages.train.run(HERE, parameters.load())
    assert trained["validation_accuracy"] > 30  # of seven classes
    shutil.copy2(HERE.backbone, "mine.safetensors")
    set_parameters(workspace, {"train.checkpoint": "mine.safetensors"})
    chosen = parameters.load()
    seconds = whole.run_stages(HERE, chosen)
    assert set(seconds) == set(whole.STAGES) - {"fetch"}
    weights, mine = load_file(HERE.backbone), load_file("mine.safetensors")
    assert all(torch.equal(weights[name], mine[name]) for name in mine)
    record = read(HERE.training)
    assert record["checkpoint"] == digest(Path("mine.safetensors"))
    assert record["features"] == 32
    assert record["validation_accuracy"] == trained["validation_accuracy"]

    evaluation = read(HERE.evaluation)
    compared = set(chosen.evaluate.detectors) - set(unavailable)
    assert set(read(HERE.metrics)["detectors"]) == compared
    assert set(evaluation["unavailable"]) == set(unavailable)
    text = HERE.comparison_text.read_text()
    assert ("Not compared" in text) == bool(unavailable)
    records.record_run(Run(HERE, chosen), seconds)
    latest = mlflow_runs()[0]
    assert latest.data.tags["backbone"] == kind
    children = {run.data.tags["detector"]: run for run in mlflow_runs(latest.info.run_id)}
    assert set(children) == compared | set(unavailable)
    for name, words in unavailable.items():
        reason = evaluation["unavailable"][name]
        assert words in reason
        assert f"- {detector_name(name)}: {reason}" in text
        assert children[name].data.tags["unavailable"] == reason
        assert "mean/fpr95" not in children[name].data.metrics
        assert reason in (workspace / HERE.report).read_text()


@pytest.mark.slow
def test_every_detector_of_the_parameters_is_compared(workspace: Path) -> None:
    """The whole list that ships, each detector tuned on few samples."""
    everything = list(parameters.load(ROOT / "params.yaml").evaluate.detectors)
    assert {name for name in everything if name.startswith("opnp+")} >= {"opnp+react", "opnp+odin"}
    set_parameters(
        workspace,
        {
            "evaluate.detectors": everything,
            "evaluate.budget": 2,
            "evaluate.tuning_samples": 40,
            "evaluate.training_images": 200,
            "evaluate.bootstrap": 10,
        },
    )
    chosen = parameters.load()
    metrics = stages.evaluate.run(HERE, chosen)
    stages.report.run(HERE, chosen)
    evaluation = read(HERE.evaluation)
    assert evaluation["unavailable"] == {}
    assert list(metrics["detectors"]) == everything
    assert read(HERE.metrics) == metrics
    searched = {"clip", "opp", "onp", "opnp", "opnp+react"}
    for name in everything:
        if not searched & {*name.split("&")}:
            assert evaluation["trials"][name] <= 4
        assert {"tune", "fit", "score"} == set(read(HERE.times)[name])
        if "&" not in name:
            masked = name.startswith("opnp+") or name in searched
            pruned = {"weights_low", "neurons_high", "neuron_sensitivity"}
            assert masked == (pruned <= set(evaluation["hyperparameters"][name]))
    rows = pq.read_table(HERE.comparison).to_pylist()
    assert {row["detector"] for row in rows} == set(everything)
    scores = pq.read_table(HERE.scores)
    assert scores.column_names[4:] == everything
    assert all(np.isfinite(scores[name].to_numpy()).all() for name in everything)
    text, page = HERE.comparison_text.read_text(), HERE.report.read_text()
    for name in everything:
        other = evaluation["same"].get(name)
        shown = label(name, evaluation["pruned"].get(name), other)
        assert (f"\n| {shown} |" if other is None else shown) in text
        assert shown.replace("&", "&amp;") in page
    records.record_run(Run(HERE, chosen), {})
    children = mlflow_runs(mlflow_runs()[0].info.run_id)
    assert {run.data.tags["detector"] for run in children} == set(everything)


@pytest.mark.parametrize("method", ["opp", "opnp+react"])
def test_a_detector_of_the_run_scores_as_evaluate_does(
    method: str, workspace: Path, tmp_path: Path
) -> None:
    made = from_run(Run(HERE, parameters.load()), method=method).save(tmp_path / "detector")
    loaded = opnp.load(tmp_path / "detector")
    assert loaded.digest == made.digest
    table = pq.read_table(HERE.scores, filters=[("set", "==", "test")])
    pixels, labels = imagesets.read(data_file("test", HERE.data), "L", 8)
    scores = loaded.predict(imagesets.unit(pixels))
    np.testing.assert_allclose(scores.score, table.column(method).to_numpy(), atol=1e-4)
    assert (scores.label == labels).mean() > 0.9
    found = read(workspace / HERE.search)[method]
    assert loaded.made["search"]["fpr95"] == found["fpr95"]
    pixels, _ = imagesets.read(data_file("validation", HERE.data), "L", 8)
    accepted = ~loaded.predict(imagesets.unit(pixels)).is_ood
    assert 0 <= accepted.mean() - 0.95 < 2 / len(pixels)


def test_the_page_about_detectors_on_runs(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(python("detector.md")[1], {})
    words = ["opnp", "fit", "--from-run", "--out", "other", "--json"]
    assert run_opnp(words, monkeypatch) == 0
    printed = json.loads(capsys.readouterr().out)
    by_python, by_program = opnp.load("detector"), opnp.load("other")
    assert printed == json.loads(json.dumps(by_program.describe()))
    assert by_python.threshold == by_program.threshold
    assert by_python.digest == by_program.digest  # whenever it was made
    assert torch.equal(by_python.mask.weights, by_program.mask.weights)
    set_parameters(workspace, {"search.max_accuracy_drop": 5.0})
    with pytest.raises(InputError, match="made with other parameters of the search"):
        from_run(Run(HERE, parameters.load()))
