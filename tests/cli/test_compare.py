"""`opnp compare` on runs that are really in MLflow."""

import json
import sys
from collections.abc import Callable
from contextlib import chdir
from functools import partialmethod
from pathlib import Path

import pytest

from opnp.cli import app
from opnp.pipeline import records
from tests.conftest import HERE, run_program
from tests.pipeline.test_records import chosen, write_run

Compare = Callable[..., str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two backbones; two seeds of one, of which one ran twice and only one had all detectors."""
    folder = tmp_path_factory.mktemp("runs")
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
        for run, fpr95 in (
            (chosen(seed=0), {"energy": 90.0, "opnp": 90.0}),  # superseded by the next
            (chosen(seed=0), {"energy": 40.0, "opnp": 30.0}),
            (chosen(seed=1), {"energy": 50.0, "opnp": 20.0, "opnp+gen": 28.0}),
            (chosen("vit", "torchvision:FashionMNIST"), {"energy": 10.0, "opnp": 15.0}),
        ):
            records.record_run(write_run(fpr95, run), {})
        assert not records.waiting(HERE)
    return folder


@pytest.fixture
def compare(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Compare:
    """What `opnp compare` prints; of a failure, the sentence."""
    monkeypatch.chdir(runs)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)

    def call(*words: str, width: int = 120) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "argv", ["opnp", "compare", *words])
        with pytest.raises(SystemExit) as stop:
            app.main()
        if stop.value.code:
            return str(stop.value.code)
        return capsys.readouterr().out

    return call


def test_rows_are_backbones_and_seeds_are_averaged(compare: Compare) -> None:
    assert compare("--markdown").splitlines() == [
        "fpr95 in % on mean, lower is better.",
        "",
        "| backbone | data | seeds | opnp | energy | opnp+gen |",
        "| --- | --- | --: | --: | --: | --: |",
        "| resnet | digits | 2 | **25.0** | 45.0 | 28.0 (1 of 2) |",
        "| vit | FashionMNIST | 1 | 15.0 | **10.0** | – |",
        "| mean |  |  | **20.0** | 27.5 | – |",
        "| trials |  |  | 4 | 4 | 4 |",
    ]


def test_what_might_prune_but_did_not_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compare: Compare
) -> None:
    assert "nothing pruned" not in compare("--markdown") + compare()
    monkeypatch.chdir(tmp_path)
    combined, alone = {"energy": 40.0, "opnp+gen": 30.0}, {"energy": 40.0, "opnp": 30.0}
    for fpr95, of, pruned in (
        (combined, chosen(seed=0), 0.0),
        (combined, chosen(seed=1), 0.0),
        (alone, chosen("vit", seed=0), 1.0),
        (alone, chosen("vit", seed=1), 0.0),
    ):
        records.record_run(write_run(fpr95, of, pruned=pruned), {})
    assert not records.waiting(HERE)
    lines = compare("--markdown").splitlines()
    assert lines[4:6] == [
        "| resnet | digits | 2 | 40.0 | – | **30.0=** |",
        "| vit | digits | 2 | 40.0 | **30.0** | – |",  # which prunes for one of its seeds
    ]
    assert lines[-1] == "= nothing pruned: the detector scores the unpruned model."
    assert "= nothing pruned: the detector" in compare()


def test_what_is_another_detector_is_named_instead_of_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compare: Compare
) -> None:
    monkeypatch.chdir(tmp_path)
    fpr95, same = {"gen": 30.0, "opnp+gen": 30.0, "opnp": 30.0}, {"opnp+gen": "gen"}
    for seed in (0, 1):
        records.record_run(write_run(fpr95, chosen(seed=seed), pruned=0.0, same=same), {})
    lines = compare("--markdown", "--detectors", "gen,opnp+gen").splitlines()
    assert lines[4:6] == [
        "| resnet | digits | 2 | **30.0** | = gen |",
        "| mean |  |  | **30.0** | = gen |",
    ]
    other = chosen("vit", seed=0)
    records.record_run(write_run(fpr95, other, pruned=0.0, same=same), {})
    records.record_run(write_run(fpr95, chosen("vit", seed=1), pruned=2.5), {})
    lines = compare("--markdown", "--detectors", "gen,opnp+gen,opnp").splitlines()
    assert lines[4:6] == [
        "| resnet | digits | 2 | **30.0** | = gen | **30.0=** |",
        "| vit | digits | 2 | **30.0** | **30.0** | **30.0** |",  # which prunes for one seed
    ]
    assert lines[6] == "| mean |  |  | **30.0** | **30.0** | **30.0** |"
    assert lines[-1] == "= nothing pruned: the detector scores the unpruned model."
    rows = json.loads(compare("--json"))["rows"]
    assert [row["same"] for row in rows] == [{"opnp+gen": "gen"}, {}]


def test_runs_beyond_mlflows_page_are_read(
    compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    expected = compare("--markdown")
    two_at_once = partialmethod(MlflowClient.search_runs, max_results=2)
    monkeypatch.setattr(MlflowClient, "search_runs", two_at_once)
    assert compare("--markdown") == expected


def test_another_metric_on_a_set_of_some_detectors(compare: Compare) -> None:
    values = json.loads(
        compare("--metric", "auroc", "--on", "near-a", "--detectors", "energy,opnp", "--json")
    )
    assert values == {
        "metric": "auroc",
        "on": "near-a",
        "rows": [
            {
                "backbone": "resnet",
                "data": "digits",
                "seeds": [0, 1],
                "values": {"energy": 55.0, "opnp": 75.0},
                "same": {},
            },
            {
                "backbone": "vit",
                "data": "torchvision:FashionMNIST",
                "seeds": [0],
                "values": {"energy": 90.0, "opnp": 85.0},
                "same": {},
            },
        ],
        "mean": {"energy": 72.5, "opnp": 80.0},
        "trials": {"energy": "4", "opnp": "4"},
    }


@pytest.mark.parametrize("data", ["FashionMNIST", "torchvision:FashionMNIST"])
def test_data_by_name_or_source(compare: Compare, data: str) -> None:
    lines = compare("--data", data, "--metric", "rank", "--markdown").splitlines()
    assert lines[0] == "rank on mean, lower is better."
    assert lines[4:] == [
        "| vit | FashionMNIST | 1 | **1.0** | 2.0 |",
        "| mean |  |  | **1.0** | 2.0 |",
        "| trials |  |  | 4 | 4 |",
    ]


def test_the_table_keeps_to_the_width_of_the_terminal(compare: Compare) -> None:
    wide = compare(width=120)
    assert wide.count("backbone") == 1
    narrow = compare(width=60)
    assert narrow.count("backbone") > 1
    for text, width in ((wide, 120), (narrow, 60)):
        assert max(map(len, text.splitlines())) <= width
        for words in ("resnet", "opnp+gen", "45.0", "28.0 (1 of 2)", "mean"):
            assert words in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--metric", "fpr59"), "No run has the metric 'fpr59'; did you mean fpr95"),
        (("--on", "near-b"), "No run has the OOD set 'near-b'; did you mean near-a"),
        (
            ("--on", "near", "--metric", "rank"),
            "No run has the OOD set 'near'; did you mean near-a",
        ),
        (("--detectors", "opnp,enrgy"), "No run has the detector 'enrgy'; did you mean energy?"),
        (("--data", "digit"), "No run has the ID data 'digit'; did you mean digits?"),
        (("--experiment", "other"), "has no experiment 'other'; did you mean opnp?"),
        (("--detectors", "odin"), "No run has fpr95 on mean of these detectors"),
        (("--json", "--markdown"), "--markdown and --json exclude each other"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    compare: Compare, words: tuple[str, ...], said: str
) -> None:
    message = compare(*words)
    assert message.startswith("error: ")
    assert said in message
    assert "\n" not in message


def test_without_runs_it_says_how_to_make_one(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "run `opnp run`" in compare()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_database(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_text("no database" * 500)
    message = compare()
    assert "could not be read" in message
    assert "\n" not in message


def test_the_program_starts_as_a_module(runs: Path) -> None:
    done = run_program("python", "-m", "opnp", "compare", "--markdown", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert "**25.0**" in done.stdout
    assert "migration" not in done.stderr
