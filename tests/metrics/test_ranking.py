"""Means, ranks and tables of a comparison, on figures that can be checked by hand."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opnp.metrics import ranking
from opnp.pipeline.report import tables

KINDS = {"a": "near", "b": "far", "c": "far"}
FPR95 = {
    "energy": {"a": 30.0, "b": 20.0, "c": 10.0},
    "opnp+gen": {"a": 30.0, "b": 10.0, "c": 10.0},
    "nac": {"a": 50.0, "b": 30.0, "c": 10.0},
}


def comparison() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Metrics, intervals and evaluation, as `evaluate` writes them."""
    detectors = {
        name: ranking.with_means({s: {"fpr95": v, "auroc": 100 - v} for s, v in of.items()}, KINDS)
        for name, of in FPR95.items()
    }
    intervals = {
        name: {
            column: {m: {"low": v - 1, "high": v + 1} for m, v in values.items()}
            for column, values in by.items()
        }
        for name, by in detectors.items()
    }
    evaluation = {
        "hyperparameters": {"energy": {}, "opnp+gen": {"gamma": 0.1}, "nac": {"k": [1, 2]}},
        "trials": {"energy": 0, "opnp+gen": 4, "nac": 2},
        "pruned": {"opnp+gen": 12.5},
        "same": {},
        "sets": {name: {"kind": kind, "count": 5} for name, kind in KINDS.items()},
        "ranks": ranking.ranks(detectors, list(KINDS)),
        "unavailable": {"odin": "needs the\nwhole network"},
    }
    return detectors, intervals, evaluation


def test_means_of_near_far_and_all() -> None:
    detectors, _, _ = comparison()
    assert list(detectors["energy"]) == ["a", "b", "c", "near", "far", "mean"]
    assert detectors["energy"]["near"] == detectors["energy"]["a"]
    assert detectors["energy"]["far"] == {"fpr95": 15.0, "auroc": 85.0}
    assert detectors["energy"]["mean"] == {"fpr95": 20.0, "auroc": 80.0}


def test_a_kind_without_sets_has_no_mean() -> None:
    assert set(ranking.with_means({"b": {"fpr95": 1.0}}, {"b": "far"})) == {"b", "far", "mean"}


def test_columns_are_grouped_by_kind() -> None:
    kinds = {"c": "far", "a": "near", "b": "far"}
    assert ranking.columns(kinds) == ["a", "near", "c", "b", "far", "mean"]
    assert ranking.columns({"a": "near"}) == ["a", "near", "mean"]


def test_ties_share_the_mean_of_their_places() -> None:
    detectors, _, _ = comparison()
    found = ranking.ranks(detectors, list(KINDS))
    assert found == {
        "energy": {"a": 1.5, "b": 2, "c": 2, "mean": 5.5 / 3},
        "opnp+gen": {"a": 1.5, "b": 1, "c": 2, "mean": 1.5},
        "nac": {"a": 3, "b": 3, "c": 2, "mean": 8 / 3},
    }
    assert ranking.ranks(detectors, list(KINDS), "auroc") == found  # which is its complement here


@given(st.lists(st.sampled_from([1.0, 1.0 + 1e-12, 2.0, 3.0]), min_size=1, max_size=8))
def test_ranks_always_sum_to_the_same(values: list[float]) -> None:
    detectors = {str(i): {"a": {"fpr95": value}} for i, value in enumerate(values)}
    n = len(values)
    assert sum(of["a"] for of in ranking.ranks(detectors, ["a"]).values()) == n * (n + 1) / 2


def test_equal_ranks_are_parted_by_the_mean() -> None:
    detectors = {"x": {"mean": {"fpr95": 3.0}}, "y": {"mean": {"fpr95": 2.0}}}
    places = {"x": {"mean": 1.5}, "y": {"mean": 1.5}}
    assert ranking.ranked(detectors, places) == ["y", "x"]


def test_a_second_name_of_a_detector_is_not_ranked_apart() -> None:
    detectors, _, _ = comparison()
    both = {"opnp+nac": detectors["nac"], **detectors}
    found = ranking.ranks(both, list(KINDS), same={"opnp+nac": "nac"})
    assert found == ranking.ranks(detectors, list(KINDS)) | {"opnp+nac": found["nac"]}
    assert ranking.ranked(both, found, same={"opnp+nac"}) == ["opnp+gen", "energy", "nac"]


def test_long_table_has_a_row_for_each_detector_and_column() -> None:
    rows = tables.long_table(*comparison()).to_pylist()
    assert [row["detector"] for row in rows[::6]] == ["opnp+gen", "energy", "nac"]
    assert [row["column"] for row in rows[:6]] == ["a", "near", "b", "c", "far", "mean"]
    first, near, *_, mean = rows[:6]
    assert first | {
        "kind": "near", "fpr95": 30.0, "fpr95_low": 29.0, "fpr95_high": 31.0, "auroc": 70.0,
        "rank": 1.5, "trials": 4, "pruned": 12.5,
    } == first  # fmt: skip
    assert json.loads(first["hyperparameters"]) == {"gamma": 0.1}
    assert near["rank"] is None
    assert mean["rank"] == 1.5
    assert mean["fpr95"] == pytest.approx(50 / 3)
    assert rows[-1]["pruned"] is None


def test_markdown_is_a_table_with_what_could_not_run_below() -> None:
    lines = tables.to_markdown(*comparison()).splitlines()
    assert lines[2:7] == [
        "| detector | a (near) | **near** | b (far) | c (far) | **far** | **mean** | mean AUROC | "
        "mean rank | trials |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
        "| OPNP+GEN | **30.0** | **30.0** | **10.0** | **10.0** | **10.0** | **16.7** (15.7–17.7) "
        "| **83.3** | **1.5** | 4 |",
        "| Energy | **30.0** | **30.0** | 20.0 | **10.0** | 15.0 | 20.0 (19.0–21.0) | 80.0 | 1.8 "
        "| 0 |",
        "| NAC | 50.0 | 50.0 | 30.0 | **10.0** | 20.0 | 30.0 (29.0–31.0) | 70.0 | 2.7 | 2 |",
    ]
    assert lines[7:] == ["", "Not compared:", "", "- ODIN: needs the whole network"]


def test_markdown_marks_what_might_prune_but_did_not() -> None:
    metrics, intervals, evaluation = comparison()
    text = tables.to_markdown(metrics, intervals, evaluation | {"pruned": {"opnp+gen": 0.0}})
    assert "\n| OPNP+GEN (nothing pruned) | **30.0** |" in text
    assert "\n| NAC | 50.0 |" in text
    assert "\n“Nothing pruned”: no mask did better" in text
    assert "othing pruned" not in tables.to_markdown(metrics, intervals, evaluation)


def test_markdown_names_what_is_another_detector_below_the_table() -> None:
    metrics, intervals, evaluation = comparison()
    same = {"pruned": {"opnp+gen": 0.0}, "same": {"opnp+gen": "energy"}}
    text = tables.to_markdown(metrics, intervals, evaluation | same)
    assert "\n| OPNP+GEN" not in text
    assert "othing pruned" not in text
    assert text.count("so that these are another detector: OPNP+GEN = Energy.") == 1


def test_markdown_says_nothing_where_all_could_run() -> None:
    metrics, intervals, evaluation = comparison()
    text = tables.to_markdown(metrics, intervals, {**evaluation, "unavailable": {}})
    assert "Not compared" not in text
