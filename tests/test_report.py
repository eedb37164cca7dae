"""The report: one page, complete, self-contained and the same bits every time."""

import re
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from opnp import artifacts, metrics, stages
from opnp.energy import energy_score, linear_head
from opnp.errors import InputError
from opnp.files import digest, read_json, write_json
from opnp.masks import PruningMask
from opnp.parameters import Parameters
from opnp.report import Evaluation, best, heat_maps, read_pruning, render
from opnp.search import Grid, choose, search_masks
from opnp.sensitivity import SensitivitySums

BACKBONE = "b" * 64
DETECTORS = ["msp", "energy", "opp", "opnp"]
GRID = {
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
            "search": {**GRID, "max_accuracy_drop": drop, "proxies": ["uniform", "blobs"]},
            "evaluate": {"detectors": detectors, "bootstrap": 20},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of a small run."""
    folder = tmp_path_factory.mktemp("run")
    rng = torch.Generator().manual_seed(0)
    head = linear_head(torch.randn(3, 10, generator=rng), torch.zeros(3))
    with chdir(folder):
        write_backbone()
        write_pruning(head, rng)
        write_evaluation(head, rng)
    return folder


@pytest.fixture(scope="module")
def page(built: Path) -> str:
    """What is drawn of it; drawing takes seconds, so that tests share it."""
    with chdir(built):
        return render(parameters())


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


def write_backbone() -> None:
    sets = {
        name: {"role": "test", "source": "x", "count": 50, "classes": {}, "sha256": "d" * 64}
        for name in ("train", "validation", "test", "ood/near-a", "ood/far-b")
    }
    write_json(artifacts.MANIFEST, {"parameters": {}, "classes": ["0", "1", "2"], "sets": sets})
    record = {
        "train_accuracy": 99.0, "validation_accuracy": 98.0, "parameters": 33, "features": 10,
        "classes": 3, "checkpoint": None, "sha256": BACKBONE,
    }  # fmt: skip
    write_json(artifacts.TRAINING, record)
    columns = ["epoch", "loss", "train_accuracy", "validation_accuracy"]
    rows = [dict(zip(columns, (epoch, 1 / epoch, 90.0, 80.0), strict=True)) for epoch in (1, 2)]
    stages.write_csv(artifacts.HISTORY, columns, rows)


def write_pruning(head: torch.nn.Linear, rng: torch.Generator) -> None:
    train, h = features(60, 3, rng), features(40, 3, rng)
    sums = SensitivitySums.of(train, head.weight.detach(), head.bias.detach())
    measured, owner = sums.mean(), {"backbone": BACKBONE}
    stages.write_sensitivity(artifacts.SENSITIVITY, measured, owner)
    outliers = {name: features(40, 2, rng) for name in ("uniform", "blobs")}
    labels = head(h).argmax(dim=1)
    result = search_masks(head, h, outliers, measured, Grid(**GRID), labels=labels)  # type: ignore[arg-type]
    stages.write_trials(result.trials)
    # Of masks that prune both, so that the page has all kinds of cut points to show.
    chosen = choose(result.trials, 100, lambda c: min(*c.weights, *c.neurons) > 0)
    chosen.candidate.mask(measured).save(artifacts.MASK, owner)
    write_json(
        artifacts.SEARCH,
        {
            "unpruned": stages.trial_record(result.trials[0]),
            "opnp": stages.trial_record(chosen),
            "candidates": len(result.trials),
            "outliers": list(outliers),
            "validation_samples": len(h),
            "training_samples": measured.count,
        },
    )


def write_evaluation(head: torch.nn.Linear, rng: torch.Generator) -> None:
    sizes = {"test": (80, 3), "near-a": (50, 2), "far-b": (50, 1)}
    sets = {name: features(n, scale, rng) for name, (n, scale) in sizes.items()}
    chosen = read_json(artifacts.SEARCH, "")["opnp"]
    heads = {"energy": head, "opp": head, "opnp": PruningMask.load(artifacts.MASK).apply(head)}
    with torch.no_grad():
        scores = {"msp": {s: -head(h).softmax(1).amax(1).double() for s, h in sets.items()}}
        for name, pruned in heads.items():
            scores[name] = {s: -energy_score(pruned(h)).double() for s, h in sets.items()}
    table: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for name, by_set in scores.items():
        ood = {s: by_set[s] for s in ("near-a", "far-b")}
        table[name] = {s: metrics.ood_metrics(by_set["test"], ood[s]) for s in ood}
        table[name]["mean"] = {
            m: float(np.mean([table[name][s][m] for s in ood])) for m in metrics.METRICS
        }
        intervals[name] = {
            s: {m: {"low": low, "high": high} for m, (low, high) in values.items()}
            for s, values in metrics.bootstrap(by_set["test"], ood, 20, 0).items()
        }
    quality = {"accuracy": 97.5, "ece": 1.25, "nll": 0.1234}
    calibration = dict.fromkeys(("unpruned", "opp", "opnp"), quality)
    write_json(artifacts.METRICS, {"detectors": table, "id": calibration})
    about = {name: {"low": value - 0.1, "high": value + 0.1} for name, value in quality.items()}
    id_intervals = dict.fromkeys(calibration, about)
    write_json(artifacts.INTERVALS, {"detectors": intervals, "id": id_intervals})
    hyperparameters = {
        "msp": {},
        "energy": {},
        "opp": {"p": 0.25},
        "opnp": {key: chosen[key] for key in stages.PERCENTAGES},
    }
    kinds = {"near-a": {"kind": "near", "count": 50}, "far-b": {"kind": "far", "count": 50}}
    write_json(
        artifacts.EVALUATION,
        {"hyperparameters": hyperparameters, "sets": kinds, "id_test_samples": 80},
    )
    columns: dict[str, Any] = {"set": [s for s, h in sets.items() for _ in h]}
    columns |= {name: torch.cat(list(by_set.values())).numpy() for name, by_set in scores.items()}
    stages.write_table(artifacts.SCORES, pa.table(columns))
    stages.write_roc(scores, ["near-a", "far-b"])


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


@pytest.mark.usefixtures("in_run")
@pytest.mark.parametrize(("metric", "choose_best"), [("fpr95", min), ("auroc", max)])
def test_tables_hold_the_metrics_and_the_best_is_bold(
    page: str, metric: str, choose_best: Any
) -> None:
    table = read_json(artifacts.METRICS, "")["detectors"]
    body = page.split(f"<caption><span>{metric.upper()} in percent")[1].split("</table>")[0]
    rows = re.findall(r"<tr>\s*<th scope=\"row\">(\w+)</th>(.*?)</tr>", body, re.DOTALL)
    assert [name for name, _ in rows] == ["MSP", "Energy", "OPP", "OPNP"]
    for place, column in enumerate(("near-a", "far-b", "mean")):
        values = [f"{table[name][column][metric]:.1f}" for name in DETECTORS]
        first = choose_best(values, key=float)
        cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)[place] for _, row in rows]
        shown = [cell.split("<small>")[0].strip() for cell in cells]
        assert shown == [f"<b>{value}</b>" if value == first else value for value in values]


def test_ties_are_all_bold() -> None:
    values = {"fpr95": 14.04, "auroc": 90.0}
    tied = {"fpr95": 13.96, "auroc": 80.0}
    table = {name: {"mean": row} for name, row in (("energy", values), ("opnp", tied))}
    evaluation = Evaluation(table, {}, {}, {}, {}, {}, 0, {}, {})
    assert best(evaluation, "fpr95") == {"mean": "14.0"}  # as either of them is shown
    assert best(evaluation, "auroc") == {"mean": "90.0"}


@pytest.mark.usefixtures("in_run")
def test_mean_has_its_interval(page: str) -> None:
    interval = read_json(artifacts.INTERVALS, "")["detectors"]["opnp"]["mean"]["fpr95"]
    assert f"({interval['low']:.1f}–{interval['high']:.1f})" in page
    assert "97.50 <small>(97.4–97.6)</small>" in page


@pytest.mark.usefixtures("in_run")
def test_outcome_and_provenance(page: str) -> None:
    page = page.replace("\N{NO-BREAK SPACE}", " ")
    table = read_json(artifacts.METRICS, "")["detectors"]
    before, after = (f"{table[name]['mean']['fpr95']:.1f} %" for name in ("energy", "opnp"))
    assert f"from {before} (Energy) to {after} (OPNP)" in page
    assert "ID test accuracy stayed at 97.5 %" in page
    assert f"{100 * PruningMask.load(artifacts.MASK).pruned:.1f} % of the head’s weights" in page
    for text in (BACKBONE, "d" * 64, digest(artifacts.MASK), "bootstrap: 20", "near-a: letters"):
        assert text in page


def test_exact_zeros_are_counted(page: str) -> None:
    assert "6 exactly zero" in page  # 3 classes × 2 dead neurons
    assert ">zero</text>" in page


@pytest.mark.usefixtures("in_run")
def test_heat_maps_show_the_least_of_the_accurate_trials() -> None:
    pruning = read_pruning(BACKBONE)
    trials = pq.read_table(artifacts.TRIALS).to_pylist()
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
                if accurate and (neuronless or t["neuron_sensitivity"] == m.kind):
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
        assert render(parameters()) == page
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.usefixtures("run")
def test_empty_history() -> None:
    columns = ["epoch", "loss", "train_accuracy", "validation_accuracy"]
    stages.write_csv(artifacts.HISTORY, columns, [])
    page = render(parameters(["msp"]))
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
    page = render(parameters(detectors))
    assert said in page
    assert '<th scope="row">OPP</th>' not in page


@pytest.mark.usefixtures("run")
def test_only_near_sets() -> None:
    record = read_json(artifacts.EVALUATION, "")
    del record["sets"]["far-b"]
    write_json(artifacts.EVALUATION, record)
    page = render(parameters(["msp"]))
    assert "near OOD" in page
    assert "far OOD" not in page


READ = {
    artifacts.MANIFEST: "fetch",
    artifacts.TRAINING: "train",
    artifacts.HISTORY: "train",
    artifacts.SENSITIVITY: "sensitivity",
    artifacts.MASK: "search",
    artifacts.SEARCH: "search",
    artifacts.TRIALS: "search",
    artifacts.METRICS: "evaluate",
    artifacts.INTERVALS: "evaluate",
    artifacts.EVALUATION: "evaluate",
    artifacts.SCORES: "evaluate",
    artifacts.ROC: "evaluate",
}


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("content", [None, b"{}", b"epoch,fpr\n1,x\n", b"\xff\xfe"])
@pytest.mark.parametrize("path", READ, ids=str)
def test_missing_and_damaged_files_are_named(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        render(parameters())
    assert str(path) in str(error.value)
    assert f"`python -m flows.{READ[path]}`" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("run")
def test_truncated_tables_are_named() -> None:
    for path in (artifacts.SENSITIVITY, artifacts.TRIALS, artifacts.SCORES):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=re.escape(str(path))):
            render(parameters())
        path.write_bytes(whole)


@pytest.mark.usefixtures("run")
def test_files_of_another_backbone_are_refused() -> None:
    mask = PruningMask.load(artifacts.MASK)
    mask.save(artifacts.MASK, {"backbone": "c" * 64})
    with pytest.raises(InputError, match=re.escape(f"{artifacts.MASK} is of another backbone")):
        render(parameters())
    record = read_json(artifacts.TRAINING, "")
    write_json(artifacts.TRAINING, record | {"sha256": "c" * 64})
    with pytest.raises(InputError, match=f"{artifacts.SENSITIVITY} is of another backbone"):
        render(parameters())


@pytest.mark.usefixtures("run")
def test_evaluation_of_another_mask_is_refused() -> None:
    record = read_json(artifacts.EVALUATION, "")
    record["hyperparameters"]["opnp"]["weights_low"] += 1
    write_json(artifacts.EVALUATION, record)
    with pytest.raises(InputError, match="another mask"):
        render(parameters())
