"""The report: one page, complete, self-contained and the same bits every time."""

import csv
import re
import shutil
from contextlib import chdir
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from opnp.detectors.names import detector_name
from opnp.errors import InputError
from opnp.metrics import ranking, separation
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.report.findings import Evaluation, Pruning
from opnp.pipeline.report.page import render
from opnp.pipeline.report.plots import roc_styles as shown_in_roc
from opnp.pipeline.report.plots import tradeoff
from opnp.pipeline.report.tables import best, heat_maps
from opnp.pipeline.results import Run
from opnp.pipeline.results.data import data_parameters
from opnp.pipeline.results.search import CANDIDATE
from opnp.pruning.energy import energy_score, linear_head
from opnp.pruning.masks import PruningMask
from opnp.runtime import tensors
from opnp.runtime.files import digest, read_json, write_json
from tests.conftest import HERE
from tests.helpers.runs import write_backbone

DETECTORS = ["msp", "energy", "opp", "opnp"]
MORE = [*DETECTORS, "vim", "opnp+gen", "odin"]  # of which the last could not run
KINDS = {"near-a": "near", "far-b": "far"}
GRID: dict[str, list[Any]] = {
    "weights_low": [0, 10],
    "weights_high": [0, 5],
    "neurons_low": [0, 20],
    "neurons_high": [0, 10],
    "neuron_sensitivity": ["mean", "taylor"],
}


def parameters(detectors: list[str] = DETECTORS, drop: float = 100.0) -> Parameters:
    return Parameters.model_validate(
        {
            "data": {
                "id": "digits", "image_size": 8, "validation": 20.0, "test": 30.0,
                "near": {"near-a": "letters"}, "far": {"far-b": "noise"}, "ood_count": 50,
            },
            "train": {}, "features": {}, "energy": {},
            "search": {
                **GRID, "clip": [None], "temperature": [1.0], "max_accuracy_drop": drop,
                "proxies": ["uniform", "blobs"],
            },
            "evaluate": {"detectors": detectors, "bootstrap": 20},
        }
    )  # fmt: skip


def drawn(chosen: Parameters | None = None) -> str:
    """The page of the run in the current folder."""
    return render(run_of(chosen))


def run_of(chosen: Parameters | None = None) -> Run:
    """The run in the current folder, with parameters that differ in what it was made with."""
    return Run(HERE, chosen or parameters())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of a small run."""
    folder = tmp_path_factory.mktemp("run")
    rng = torch.Generator().manual_seed(0)
    head = linear_head(torch.randn(3, 10, generator=rng), torch.zeros(3))
    with chdir(folder):
        sha256 = write_backbone(HERE, ["0", "1", "2"])
        write_data_and_training(sha256)
        write_pruning(sha256, rng)
        write_evaluation(head, rng)
    return folder


@pytest.fixture(scope="module")
def page(built: Path) -> str:
    """What is drawn of it; drawing takes seconds, so that tests share it."""
    with chdir(built):
        return drawn(parameters(MORE))


@pytest.fixture
def run(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the run, in the current folder, to be changed."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def in_run(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run itself as the current folder, to be read only."""
    monkeypatch.chdir(built)


def features(n: int, scale: float, rng: torch.Generator) -> Tensor:
    h = scale * torch.rand(n, 10, generator=rng)
    h[:, :2] = 0  # two dead neurons: their sensitivity is exactly zero
    return h


def write_csv(path: Path, columns: list[str], rows: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_data_and_training(backbone: str) -> None:
    sets = {
        name: {"role": "test", "source": "x", "count": 50, "classes": {}, "sha256": "d" * 64}
        for name in ("train", "validation", "test", "ood/near-a", "ood/far-b")
    }
    fetched = data_parameters(parameters())
    write_json(HERE.manifest, {"parameters": fetched, "classes": ["0", "1", "2"], "sets": sets})
    for name in sets:
        HERE.images(name).parent.mkdir(exist_ok=True)
        HERE.images(name).touch()
    record = {
        "train_accuracy": 99.0, "validation_accuracy": 98.0, "parameters": 33, "features": 10,
        "classes": 3, "checkpoint": None, "sha256": backbone,
    }  # fmt: skip
    write_json(HERE.training, record)
    columns = ["epoch", "loss", "train_accuracy", "validation_accuracy"]
    rows = [dict(zip(columns, (epoch, 1 / epoch, 90.0, 80.0), strict=True)) for epoch in (1, 2)]
    write_csv(HERE.history, columns, rows)


def write_pruning(backbone: str, rng: torch.Generator) -> None:
    """Every candidate of the grid, without clipping and with, and what might be chosen of them."""
    alive = torch.arange(10) > 1
    measured = {"weights": alive * torch.rand(3, 10, generator=rng).double()}
    for kind in ("mean", "gradient", "taylor"):
        measured[f"neurons_{kind}"] = alive * torch.rand(10, generator=rng).double()
    owner = {"backbone": backbone}
    halves = {f"0/{half}/{name}": 30 * m for half in (0, 1) for name, m in measured.items()}
    settings = [{"clip": None, "threshold": None, "temperature": 1.0}]
    about = {**owner, "settings": settings, "counts": [30, 30]}
    tensors.save(HERE.sensitivity, halves, about)
    write_json(HERE.clips, {})
    mask = PruningMask.from_sensitivity(
        measured["weights"], measured["neurons_taylor"], (10, 5), (20, 10)
    )
    mask.save(HERE.mask, owner)
    trials: list[dict[str, Any]] = []
    for *values, clip in product(*(GRID[key] for key in CANDIDATE), (None, 90.0)):
        fpr95, cost = torch.rand(2, generator=rng).tolist()
        first = not trials
        trials.append(
            dict(zip(CANDIDATE, values, strict=True))
            | {"clip": clip, "threshold": None if clip is None else 2.5, "temperature": 1.0}
            | {"fpr95": 60 - 40 * fpr95, "auroc": 80.0, "pruned": 5.0}
            | {"accuracy": 98.0 if first else 98 - 2 * cost}
        )
    write_parquet(HERE.trials, pa.Table.from_pylist(trials))
    noise = {"interval": {"low": 31.25, "high": 44.75}, "within_noise": 17, "instability": 0.625}
    chosen = {
        "clip": (0, 0, 0, 0, "mean", 90.0),
        "opp": (10, 0, 0, 0, "mean", None),
        "onp": (0, 0, 20, 0, "taylor", None),
        "opnp": (10, 5, 20, 10, "taylor", None),
        "opnp+react": (0, 5, 0, 10, "taylor", 90.0),
    }
    found: dict[str, Any] = {"unpruned": trials[0]}
    for method, wanted in chosen.items():
        (trial,) = (t for t in trials if tuple(t[key] for key in (*CANDIDATE, "clip")) == wanted)
        found[method] = {**trial, **noise}
    write_json(
        HERE.search,
        {
            **found,
            **owner,
            "parameters": parameters().search.model_dump(),
            "candidates": len(trials),
            "families": {
                "uniform": {"unpruned": 40.0, "chosen": 20.0, "decides": True},
                "cutmix": {"unpruned": 90.0, "chosen": 91.0, "decides": False},
            },
            "doubts": ["The mask prunes 60 % of the lowest weights, the most that was tried."],
            "proxies": ["uniform", "blobs"],
            "outliers": [],
            "validation_samples": 40,
            "training_samples": 60,
        },
    )


def write_evaluation(head: torch.nn.Linear, rng: torch.Generator) -> None:
    sizes = {"test": (80, 3), "near-a": (50, 2), "far-b": (50, 1)}
    sets = {name: features(n, scale, rng) for name, (n, scale) in sizes.items()}
    search = read_json(HERE.search)
    pruned = PruningMask.load(HERE.mask).apply(head)
    with torch.no_grad():
        scores = {"msp": {s: -head(h).softmax(1).amax(1).double() for s, h in sets.items()}}
        heads = {"energy": head, "opp": head, "opnp": pruned, "opnp+gen": pruned}
        for name, of in heads.items():
            scores[name] = {s: -energy_score(of(h)).double() for s, h in sets.items()}
        scores["vim"] = {s: -h.sum(1).double() for s, h in sets.items()}
    table: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for name, by_set in scores.items():
        against = {s: by_set[s] for s in KINDS}
        of_set = {s: separation.ood_metrics(by_set["test"], against[s]) for s in against}
        table[name] = ranking.with_means(of_set, KINDS)
        intervals[name] = {
            column: {m: {"low": value - 1, "high": value + 1} for m, value in values.items()}
            for column, values in table[name].items()
        }
    quality = {"accuracy": 97.5, "ece": 1.25, "nll": 0.1234}
    calibration = dict.fromkeys(("unpruned", "opp", "opnp"), quality)
    write_json(HERE.metrics, {"detectors": table, "id": calibration})
    about = {name: {"low": value - 0.1, "high": value + 0.1} for name, value in quality.items()}
    id_intervals = dict.fromkeys(calibration, about)
    write_json(HERE.intervals, {"detectors": intervals, "id": id_intervals})
    mask = {key: search["opnp"][key] for key in CANDIDATE}
    write_json(
        HERE.evaluation,
        {
            "hyperparameters": {
                "msp": {},
                "energy": {},
                "opp": {key: search["opp"][key] for key in CANDIDATE},
                "opnp": mask,
                "vim": {"d": 4},
                "opnp+gen": {**mask, "gamma": 0.1},
            },
            "trials": dict.fromkeys(scores, 8),
            "pruned": {"opp": 10.0, "opnp": 40.0, "opnp+gen": 40.0},
            "same": {},
            "sets": {name: {"kind": kind, "count": 50} for name, kind in KINDS.items()},
            "id_test_samples": 80,
            "ranks": ranking.ranks(table, list(KINDS)),
            "unavailable": {"odin": "It needs gradients <of the input>."},
            "oracle": {
                "opnp": {**mask, "fpr95": 12.25, "kept": 61.0},
                "opnp+react": {**mask, "fpr95": 11.5, "kept": None},
            },
        },
    )
    columns: dict[str, Any] = {"set": [s for s, h in sets.items() for _ in h]}
    columns |= {name: torch.cat(list(by_set.values())).numpy() for name, by_set in scores.items()}
    write_parquet(HERE.scores, pa.table(columns))
    fpr = np.linspace(0, 1, 101)
    curves = {
        name: np.mean([separation.tpr_at_fpr(of["test"], of[s], fpr) for s in KINDS], axis=0)
        for name, of in scores.items()
    }
    rows = [
        {"fpr": 100 * at, **{name: 100 * float(curve[i]) for name, curve in curves.items()}}
        for i, at in enumerate(fpr.tolist())
    ]
    write_csv(HERE.roc, ["fpr", *curves], rows)


def test_page_needs_nothing_else(page: str) -> None:
    assert page.lstrip().startswith("<!doctype html>")
    assert "<script" not in page
    assert "<link" not in page
    assert "@import" not in page
    references = re.findall(r'(?:src|href|srcset|data)="([^"]*)"', page)
    assert references
    assert all(reference.startswith("#") for reference in references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert len(page) < 2_000_000


def test_ids_are_unique_and_all_references_resolve(page: str) -> None:
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)


COLUMNS = ("mean", "rank", "near-a", "near", "far-b", "far")


def rows_of(page: str, caption: str) -> dict[str, list[str]]:
    """Cells of each row of the table with this caption, by the head of the row."""
    body = page.split(f"<caption><span>{caption}")[1].split("</table>")[0]
    rows = re.findall(r"<tr[^>]*>\s*<th scope=\"row\">(.*?)</th>(.*?)</tr>", body, re.DOTALL)
    return {
        name: [cell.strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]
        for name, row in rows
    }


@pytest.mark.usefixtures("in_run")
@pytest.mark.parametrize(("metric", "choose_best"), [("fpr95", min), ("auroc", max)])
def test_tables_hold_the_metrics_and_the_best_is_bold(
    page: str, metric: str, choose_best: Any
) -> None:
    table = read_json(HERE.metrics)["detectors"]
    ranks = ranking.ranks(table, list(KINDS), metric)
    order = ranking.ranked(table, ranks, metric)
    rows = rows_of(page, f"{metric.upper()} in percent")
    assert list(rows) == [detector_name(name) for name in order]
    for place, column in enumerate(COLUMNS):
        if column == "rank":
            assert [cells[place] for cells in rows.values()] == [
                f"{ranks[name]['mean']:.1f}" for name in order
            ]
            continue
        values = [f"{table[name][column][metric]:.1f}" for name in order]
        first = choose_best(values, key=float)
        shown = [cells[place].split("<small")[0].strip() for cells in rows.values()]
        assert shown == [f"<b>{value}</b>" if value == first else value for value in values]
        if column in KINDS:
            small = [re.sub("<.*?>", "", cells[place]).split()[-1] for cells in rows.values()]
            assert small == [f"{ranks[name][column]:g}" for name in order]


def test_rows_that_prune_by_sensitivity_are_marked(page: str) -> None:
    marked = re.findall(r'<tr class="ours">\s*<th scope="row">(.*?)</th>', page)
    assert set(marked) == {"OPP", "OPNP", "OPNP+GEN"}


@pytest.mark.usefixtures("run")
def test_what_might_prune_but_did_not_is_not_shown_as_ours(page: str) -> None:
    assert "nothing pruned" not in page
    evaluation = read_json(HERE.evaluation)
    evaluation["pruned"] |= {"opp": 0.0, "opnp+gen": 0.0}
    write_json(HERE.evaluation, evaluation)
    changed = drawn(parameters(MORE))
    for table in ("FPR95 in percent", "AUROC in percent", "Means over the OOD sets"):
        names = set(rows_of(changed, table))
        assert {"OPP (nothing pruned)", "OPNP+GEN (nothing pruned)", "OPNP", "ViM"} <= names
        assert not names & {"OPP", "OPNP+GEN"}
    marked = re.findall(r'<tr class="ours">\s*<th scope="row">(.*?)</th>', changed)
    assert set(marked) == {"OPNP"}
    assert "“Nothing pruned”: no mask did better" in changed
    styles = shown_in_roc(Evaluation.of(run_of(parameters(MORE))))
    assert "opnp+gen" not in styles


@pytest.mark.usefixtures("run")
def test_what_is_another_detector_since_it_prunes_nothing_has_no_row_of_its_own() -> None:
    evaluation = read_json(HERE.evaluation)
    evaluation["pruned"] |= {"opnp+gen": 0.0}
    write_json(HERE.evaluation, evaluation | {"same": {"opnp+gen": "vim"}})
    changed = drawn(parameters(MORE))
    for table in ("FPR95 in percent", "AUROC in percent", "Means over the OOD sets"):
        assert not [name for name in rows_of(changed, table) if "GEN" in name]
    assert "so that these are another detector: <strong>OPNP+GEN = ViM</strong>." in changed
    assert f"Of {len(MORE) - 2} detectors" in changed  # MORE names one that could not run
    assert "<td>8</td>" in changed.partition('<th scope="row">OPNP+GEN = ViM</th>')[2][:40]
    assert "Nothing pruned" not in changed


def test_what_could_not_run_is_named_with_its_reason(page: str) -> None:
    assert "<strong>ODIN</strong>: It needs gradients &lt;of the input&gt;." in page
    assert '<th scope="row">ODIN</th>' not in page


@pytest.mark.usefixtures("run")
def test_times_are_shown_where_they_were_measured(page: str) -> None:
    assert "ms per 1,000" not in page
    write_json(HERE.times, {"opnp": {"tune": 9.0, "fit": 1.234, "score": 56.78}})
    rows = rows_of(drawn(), "FPR95 in percent")
    assert rows["OPNP"][-2:] == ["1.23", "56.8"]
    assert rows["Energy"][-2:] == ["–", "–"]


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("content", ["{", "[]", '{"opnp": {"tune": 9.0}}', '{"opnp": 1}'])
def test_no_report_depends_on_times(content: str) -> None:
    """As `search`, run again, or a crash may leave them."""
    HERE.logs.mkdir()
    HERE.times.write_text(content)
    assert "ms per 1,000" not in drawn()


def test_the_search_shows_what_it_chose_and_how_certainly(page: str) -> None:
    rows = rows_of(page.replace("\N{NO-BREAK SPACE}", " "), "What was chosen for each method")
    assert list(rows) == ["Clip", "OPP", "ONP", "OPNP", "OPNP+ReAct"]
    plain = {n: [re.sub("<.*?>", "", cell) for cell in cells] for n, cells in rows.items()}
    assert plain["OPP"][-1] == "the lowest 10 % of weights"
    assert plain["OPNP"][:2] == ["–", "1"]
    assert plain["OPNP"][2].endswith("(31.2–44.8)")
    assert plain["OPNP"][3:5] == ["17", "0.62"]
    assert plain["OPNP"][6:8] == ["12.2", "61 %"]
    assert plain["OPNP+ReAct"][0] == "90 % (at 2.5)"
    assert plain["OPNP+ReAct"][5:8] == ["–", "11.5", "–"]  # it is not among the detectors
    assert plain["OPP"][6:8] == ["–", "–"]
    assert "No test sample and no real OOD sample took part" in page


@pytest.mark.usefixtures("in_run")
@pytest.mark.parametrize(("width", "sets"), [(60, False), (200, True)])
def test_the_terminal_shows_what_fits(
    width: int, sets: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.pipeline import summarize

    monkeypatch.setenv("COLUMNS", str(width))
    summarize(run_of(parameters(MORE)))
    head, *rest = capsys.readouterr().out.split("not compared: ")
    assert max(map(len, head.splitlines())) <= width
    assert ("near-a" in head) == sets
    rows = [line.split() for line in head.splitlines() if "%" not in line]
    order = [row[0] for row in rows if row and row[0] in MORE]
    evaluation = read_json(HERE.evaluation)
    places = [evaluation["ranks"][name]["mean"] for name in order]
    assert len(places) == len(MORE) - 1
    assert places == sorted(places)
    assert [text.splitlines()[0] for text in rest] == ["odin: It needs gradients <of the input>."]


@pytest.mark.usefixtures("in_run")
def test_candidates_that_cost_too_much_are_counted() -> None:
    pruning = Pruning.of(run_of())
    assert "left out" not in tradeoff(parameters(), pruning).caption
    accuracy = pruning.trials["accuracy"].copy()
    accuracy[3:5] = accuracy[0] - 9
    pruning = replace(pruning, trials={**pruning.trials, "accuracy": accuracy})
    caption = tradeoff(parameters(drop=2.0), pruning).caption
    assert f"of {len(accuracy)} candidates" in caption
    caption = tradeoff(parameters(drop=1.0), pruning).caption
    assert f"of {len(accuracy) - 2} candidates" in caption
    assert caption.endswith("2 candidates of even lower accuracy are not shown.")


@pytest.mark.usefixtures("run")
def test_real_validation_sets_are_named() -> None:
    record = read_json(HERE.search)
    write_json(HERE.search, record | {"outliers": ["kept-c"]})
    page = drawn()
    assert "These OOD sets, kept for validation, took part: kept-c." in page
    assert "Chosen on the proxy outliers and the OOD sets for validation<" in page
    assert "no real OOD" not in page
    write_json(HERE.search, record | {"outliers": ["kept-c"], "proxies": []})
    page = drawn()
    assert "Chosen on the OOD sets for validation<" in page
    assert "proxy outliers" not in page


@pytest.mark.usefixtures("in_run")
def test_roc_shows_a_few_that_can_be_told_apart() -> None:
    evaluation = Evaluation.of(run_of(parameters(MORE)))
    order = ranking.ranked(evaluation.table, evaluation.ranks)
    others = [name for name in order if name in ("msp", "vim")]
    styles = shown_in_roc(evaluation)
    assert set(styles) == {"energy", "opp", "opnp", "opnp+gen", others[0]}
    assert len(set(styles.values())) == len(styles)


@pytest.mark.usefixtures("run")
def test_ties_are_all_bold() -> None:
    record = read_json(HERE.metrics)
    for name, fpr95 in (("energy", 14.04), ("opnp", 13.96)):
        record["detectors"][name]["mean"]["fpr95"] = fpr95
    write_json(HERE.metrics, record)
    evaluation = Evaluation.of(run_of(parameters(["energy", "opnp"])))
    assert best(evaluation, "fpr95")["mean"] == "14.0"  # as either of them is shown
    page = drawn(parameters(["energy", "opnp"]))
    rows = rows_of(page, "FPR95 in percent")
    assert {cells[0].split()[0] for cells in rows.values()} == {"<b>14.0</b>"}


@pytest.mark.usefixtures("in_run")
def test_mean_has_its_interval(page: str) -> None:
    interval = read_json(HERE.intervals)["detectors"]["opnp"]["mean"]["fpr95"]
    assert f"({interval['low']:.1f}–{interval['high']:.1f})" in page
    assert "97.50 <small>(97.4–97.6)</small>" in page


@pytest.mark.usefixtures("in_run")
def test_outcome_and_provenance(page: str) -> None:
    page = page.replace("\N{NO-BREAK SPACE}", " ")
    table = read_json(HERE.metrics)["detectors"]
    before, after = (f"{table[name]['mean']['fpr95']:.1f} %" for name in ("energy", "opnp"))
    assert f"from {before} (Energy) to {after} (OPNP)" in page
    assert "ID test accuracy stayed at 97.5 %" in page
    assert f"{100 * PruningMask.load(HERE.mask).pruned:.1f} % of the head’s weights" in page
    for text in (
        digest(HERE.backbone),
        "d" * 64,
        digest(HERE.mask),
        "bootstrap: 20",
        "near-a: letters",
    ):
        assert text in page


def test_exact_zeros_are_counted(page: str) -> None:
    assert "6 exactly zero" in page  # 3 classes × 2 dead neurons
    assert ">zero</text>" in page


@pytest.mark.usefixtures("in_run")
def test_heat_maps_show_the_least_of_the_accurate_trials() -> None:
    pruning = Pruning.of(run_of())
    trials = pq.read_table(HERE.trials).to_pylist()
    for drop in (0.0, 100.0):
        maps = heat_maps(parameters(drop=drop), pruning)
        assert [(m.kind, m.what) for m in maps] == [
            (kind, what) for kind in ("mean", "taylor") for what in ("weights", "neurons")
        ]
        for m in maps:
            least: dict[tuple[float, float], float] = {}
            for t in trials:
                neuronless = t["neurons_low"] == t["neurons_high"] == 0
                accurate = t["accuracy"] >= trials[0]["accuracy"] - drop
                if (
                    t["clip"] is None
                    and accurate
                    and (neuronless or t["neuron_sensitivity"] == m.kind)
                ):
                    at = t[f"{m.what}_low"], t[f"{m.what}_high"]
                    least[at] = min(least.get(at, 100), t["fpr95"])
            for low, cells in m.rows.items():
                for high, cell in zip(m.columns, cells, strict=True):
                    assert (cell is None) == ((low, high) not in least)
                    assert cell is None or cell.text == f"{least[low, high]:.1f}"


def test_chosen_cell_is_outlined_once_in_each_kind_of_map(page: str) -> None:
    assert len(re.findall(r'class="chosen">[\d.]+<span', page)) == 2


@pytest.mark.usefixtures("in_run")
def test_same_bits_again_whatever_the_settings_of_matplotlib(page: str) -> None:
    with matplotlib.rc_context({"font.size": 30.0, "lines.linewidth": 9.0}):
        assert drawn(parameters(MORE)) == page
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.usefixtures("run")
def test_empty_history() -> None:
    columns = ["epoch", "loss", "train_accuracy", "validation_accuracy"]
    write_csv(HERE.history, columns, [])
    page = drawn(parameters(["msp"]))
    assert "loaded from a checkpoint" in page
    assert "Training loss" not in page


@pytest.mark.usefixtures("in_run")
@pytest.mark.parametrize(
    ("detectors", "said"),
    [
        (["msp"], "Neither Energy nor OPNP"),
        (["energy"], "Energy has a mean FPR95 of"),
        (["msp", "opnp"], "OPNP has a mean FPR95 of"),
    ],
)
def test_detectors_may_be_missing(detectors: list[str], said: str) -> None:
    page = drawn(parameters(detectors))
    assert said in page
    assert len(rows_of(page, "FPR95 in percent")) == len(detectors)


@pytest.mark.usefixtures("run")
def test_only_near_sets() -> None:
    record = read_json(HERE.evaluation)
    del record["sets"]["far-b"]
    write_json(HERE.evaluation, record)
    page = drawn(parameters(["msp"]))
    assert "near OOD" in page
    assert "far OOD" not in page


READ = {
    HERE.manifest: "fetch",
    HERE.backbone: "train",
    HERE.training: "train",
    HERE.history: "train",
    HERE.clips: "sensitivity",
    HERE.sensitivity: "sensitivity",
    HERE.mask: "search",
    HERE.search: "search",
    HERE.trials: "search",
    HERE.metrics: "evaluate",
    HERE.intervals: "evaluate",
    HERE.evaluation: "evaluate",
    HERE.scores: "evaluate",
    HERE.roc: "evaluate",
}


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("content", [None, b"{}", b"epoch,fpr\n1,x\n", b"\xff\xfe"])
@pytest.mark.parametrize("path", READ, ids=str)
def test_missing_and_damaged_files_are_named(path: Path, content: bytes | None) -> None:
    if path == HERE.clips and content == b"{}":
        return  # as it is
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        drawn()
    assert str(path) in str(error.value)
    assert error.value.about == f"stage:{READ[path]}"
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("run")
def test_truncated_tables_are_named() -> None:
    for path in (HERE.sensitivity, HERE.trials, HERE.scores):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=re.escape(str(path))):
            drawn()
        path.write_bytes(whole)


@pytest.mark.usefixtures("run")
def test_files_of_another_backbone_are_refused() -> None:
    shown = [HERE.training, HERE.search, HERE.sensitivity, HERE.mask]
    for path in shown:
        whole = path.read_bytes()
        if path.suffix == ".json":
            key = "sha256" if path == HERE.training else "backbone"
            write_json(path, read_json(path) | {key: "c" * 64})
        else:
            found, about = tensors.load(path)
            tensors.save(path, found, about | {"backbone": "c" * 64})
        with pytest.raises(InputError, match=f"{path} was made with another backbone"):
            drawn()
        path.write_bytes(whole)
    write_backbone(HERE, ["another"])
    with pytest.raises(InputError, match="was made with another backbone"):
        drawn()


@pytest.mark.usefixtures("run")
def test_evaluation_of_another_mask_is_refused() -> None:
    record = read_json(HERE.evaluation)
    record["hyperparameters"]["opnp"]["weights_low"] += 1
    write_json(HERE.evaluation, record)
    with pytest.raises(InputError, match="another mask"):
        drawn()
