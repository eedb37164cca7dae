"""The report: one page, complete, self-contained and the same bits every time."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from opnp import artifacts, metrics, stages
from opnp.energy import energy_score, linear_head
from opnp.errors import InputError
from opnp.files import read_json, write_json
from opnp.masks import PruningMask
from opnp.parameters import Parameters
from opnp.report import render
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


def parameters(detectors: list[str] = DETECTORS) -> Parameters:
    return Parameters.model_validate(
        {
            "data": {
                "id": "digits", "image_size": 8, "validation": 20.0, "test": 30.0,
                "near": {"near-a": "letters"}, "far": {"far-b": "noise"}, "ood_count": 50,
            },
            "train": {}, "features": {}, "energy": {},
            "search": {**GRID, "proxies": ["uniform", "blobs"]},
            "evaluate": {"detectors": detectors, "bootstrap": 20},
        }
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parameters]:
    """The artifacts of a small run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = torch.Generator().manual_seed(0)
    head = linear_head(torch.randn(3, 10, generator=rng), torch.zeros(3))
    write_backbone()
    write_pruning(head, rng)
    write_evaluation(head, rng)
    yield parameters()


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
    best = choose(result.trials, 100, lambda c: min(*c.weights, *c.neurons) > 0)
    best.candidate.mask(measured).save(artifacts.MASK, owner)
    write_json(
        artifacts.SEARCH,
        {
            "unpruned": stages.trial_record(result.trials[0]),
            "opnp": stages.trial_record(best),
            "candidates": len(result.trials),
            "outliers": list(outliers),
            "validation_samples": len(h),
            "training_samples": measured.count,
        },
    )


def write_evaluation(head: torch.nn.Linear, rng: torch.Generator) -> None:
    sets = {"test": features(80, 3, rng), "near-a": features(50, 2, rng), "far-b": features(50, 1, rng)}
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
    calibration = {name: quality for name in ("unpruned", "opp", "opnp")}
    write_json(artifacts.METRICS, {"detectors": table, "id": calibration})
    write_json(artifacts.INTERVALS, intervals)
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


def test_page_needs_nothing_else(run: Parameters) -> None:
    page = render(run)
    assert page.lstrip().startswith("<!doctype html>")
    assert "<script" not in page
    assert "<link" not in page
    assert "@import" not in page
    references = re.findall(r'(?:src|href|srcset|data)="([^"]*)"', page)
    assert references
    assert all(reference.startswith("#") for reference in references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique_and_all_references_resolve(run: Parameters) -> None:
    page = render(run)
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)) <= {
        pair for name in ids for pair in ((name, ""), ("", name))
    }


def test_tables_hold_the_metrics_and_the_best_is_bold(run: Parameters) -> None:
    page = render(run)
    table = read_json(artifacts.METRICS, "")["detectors"]
    for metric, choose_best in (("fpr95", min), ("auroc", max)):
        caption = "FPR95 in percent" if metric == "fpr95" else "AUROC in percent"
        body = page.split(f"<caption><span>{caption}")[1].split("</table>")[0]
        rows = re.findall(r"<tr>\s*<th scope=\"row\">(\w+)</th>(.*?)</tr>", body, re.DOTALL)
        assert [name for name, _ in rows] == ["MSP", "Energy", "OPP", "OPNP"]
        for place, column in enumerate(("near-a", "far-b", "mean")):
            values = {name: f"{table[name][column][metric]:.1f}" for name in DETECTORS}
            best = choose_best(values.values(), key=float)
            for name, (_, row) in zip(DETECTORS, rows, strict=True):
                cell = re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)[place].strip()
                text = f"<b>{best}</b>" if values[name] == best else values[name]
                assert cell.split(" <small>")[0].strip() == text
    # OPP scores as Energy does here, so at least one best is shared.
    assert page.count("<b>") >= len(metrics.METRICS) + 4


def test_mean_has_its_interval(run: Parameters) -> None:
    interval = read_json(artifacts.INTERVALS, "")["opnp"]["mean"]["fpr95"]
    assert f"({interval['low']:.1f}–{interval['high']:.1f})" in render(run)


def test_outcome_and_provenance(run: Parameters) -> None:
    page = render(run).replace("\N{NO-BREAK SPACE}", " ")
    table = read_json(artifacts.METRICS, "")["detectors"]
    before, after = (f"{table[name]['mean']['fpr95']:.1f} %" for name in ("energy", "opnp"))
    assert f"from {before} (Energy) to {after} (OPNP)" in page
    assert "ID test accuracy stayed at 97.5 %" in page
    kept = PruningMask.load(artifacts.MASK)
    assert f"leaves {100 * kept.pruned:.1f} % of the head’s weights zero" in page
    assert BACKBONE in page
    assert "d" * 64 in page
    assert "bootstrap: 20" in page
    assert "max_accuracy_drop: 1.0" in page


def test_heat_maps_show_the_least_over_the_other_axes(run: Parameters) -> None:
    record = read_json(artifacts.SEARCH, "")["opnp"]
    page = render(run)
    chosen = re.findall(r'class="chosen">([\d.]+)<', page)
    # Once among weights and once among neurons; no mask at the same cell is better.
    assert len(chosen) == 2
    assert all(float(value) <= round(record["fpr95"], 1) for value in chosen)


def test_exact_zeros_are_counted(run: Parameters) -> None:
    page = render(run)
    assert "6 exactly zero" in page  # 3 classes × 2 dead neurons
    assert ">zero</text>" in page


def test_two_renders_are_identical(run: Parameters) -> None:
    assert render(run) == render(run)


def test_matplotlib_settings_neither_matter_nor_change(run: Parameters) -> None:
    import matplotlib

    page = render(run)
    with matplotlib.rc_context({"font.size": 30.0, "lines.linewidth": 9.0}):
        assert render(run) == page
        assert matplotlib.rcParams["font.size"] == 30


def test_empty_history(run: Parameters) -> None:
    columns = ["epoch", "loss", "train_accuracy", "validation_accuracy"]
    stages.write_csv(artifacts.HISTORY, columns, [])
    assert "loaded from a checkpoint" in render(run)


@pytest.mark.parametrize(
    ("detectors", "said"),
    [
        (["msp"], "Neither Energy nor OPNP"),
        (["energy"], "Energy has a mean FPR95 of"),
        (["msp", "opnp"], "OPNP has a mean FPR95 of"),
    ],
)
def test_detectors_may_be_missing(run: Parameters, detectors: list[str], said: str) -> None:
    page = render(parameters(detectors))
    assert said in page
    assert '<th scope="row">OPP</th>' not in page


def test_only_near_sets(run: Parameters) -> None:
    record = read_json(artifacts.EVALUATION, "")
    del record["sets"]["far-b"]
    write_json(artifacts.EVALUATION, record)
    page = render(run)
    assert "near OOD" in page
    assert "far OOD" not in page
    assert "over 1 OOD set " in page


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


@pytest.mark.parametrize("content", [None, b"", b"{}", b"epoch,fpr\n1,x\n", b"\xff\xfe"])
@pytest.mark.parametrize("path", READ, ids=str)
def test_missing_and_damaged_files_are_named(
    run: Parameters, path: Path, content: bytes | None
) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    if path == artifacts.HISTORY and content == b"":
        return  # no rows: a loaded checkpoint
    with pytest.raises(InputError) as error:
        render(run)
    assert str(path) in str(error.value)
    assert f"python -m flows.{READ[path]}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", [artifacts.SENSITIVITY, artifacts.MASK], ids=str)
def test_files_of_another_backbone_are_refused(run: Parameters, path: Path) -> None:
    record = read_json(artifacts.TRAINING, "")
    write_json(artifacts.TRAINING, record | {"sha256": "c" * 64})
    if path == artifacts.MASK:
        tensors, metadata = stages.read_tensors(artifacts.SENSITIVITY, "")
        values = stages.Sensitivity(**tensors, count=int(metadata["count"]))
        stages.write_sensitivity(artifacts.SENSITIVITY, values, {"backbone": "c" * 64})
    with pytest.raises(InputError, match=re.escape(str(path))):
        render(run)


def test_evaluation_of_another_mask_is_refused(run: Parameters) -> None:
    record = read_json(artifacts.EVALUATION, "")
    record["hyperparameters"]["opnp"]["weights_low"] += 1
    write_json(artifacts.EVALUATION, record)
    with pytest.raises(InputError, match="another mask"):
        render(run)
