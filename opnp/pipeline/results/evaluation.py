"""What `evaluate` has measured on the test sets."""

from typing import TYPE_CHECKING, Any

from opnp.detectors.names import ours
from opnp.metrics import ranking
from opnp.metrics.separation import METRICS
from opnp.pipeline.results.reading import Array, read_columns, read_table, reading, select, stale
from opnp.pipeline.results.search import CANDIDATE
from opnp.runtime.files import read_json

if TYPE_CHECKING:
    from opnp.pipeline.results.run import Run

__all__ = ["read", "read_intervals", "read_metrics", "read_roc", "read_scores"]

CALIBRATION = ("accuracy", "ece", "nll")
PRUNED_HEADS = ("opp", "onp", "opnp")  # whose calibration is shown beside the unpruned one


def read(run: "Run") -> dict[str, Any]:
    """The record of the evaluation: what each detector tried, its ranks, and the test sets.

    Raises:
        InputError: the file is missing or damaged, or made with another mask or other detectors.
    """
    path = run.workspace.evaluation
    with reading(path, "evaluate"):
        record: dict[str, Any] = read_json(path)
        sets = select(record["sets"], record["sets"], ("kind", "count"))
        wanted = list[str](run.parameters.evaluate.detectors)
        unavailable = {name: why for name, why in record["unavailable"].items() if name in wanted}
        names = [name for name in wanted if name not in unavailable]
        tuned = select(record["hyperparameters"], names)
        found = {
            "hyperparameters": tuned,
            "trials": select(record["trials"], names),
            "pruned": select(record["pruned"], filter(ours, names)),
            "same": {name: of for name, of in record["same"].items() if {name, of} <= {*names}},
            "ranks": select(record["ranks"], names, (*sets, "mean")),
            "unavailable": unavailable,
            "oracle": select(record["oracle"], record["oracle"], (*CANDIDATE, "fpr95", "kept")),
            "sets": sets,
            "id_test_samples": record["id_test_samples"],
        }
        chosen = run.search["opnp"]
        if "opnp" in tuned and any(tuned["opnp"][key] != chosen[key] for key in CANDIDATE):
            raise stale(path, "another mask", "evaluate")
    return found


def columns(run: "Run") -> list[str]:
    """The columns that every metric has: the test sets and their means."""
    return ranking.columns({name: of["kind"] for name, of in run.evaluation["sets"].items()})


def read_metrics(run: "Run") -> dict[str, Any]:
    """Metrics of each detector that ran, and the calibration of the heads on the ID test set.

    Raises:
        InputError: the file is missing or damaged.
    """
    path, names = run.workspace.metrics, list(run.evaluation["ranks"])
    with reading(path, "evaluate"):
        found = read_json(path)
        table = select(found["detectors"], names, columns(run), METRICS)
        select(found["id"], heads(names), CALIBRATION)
        return {"detectors": table, "id": found["id"]}


def heads(names: list[str]) -> list[str]:
    """The heads whose calibration is shown."""
    return ["unpruned", *(name for name in names if name in PRUNED_HEADS)]


def read_intervals(run: "Run") -> dict[str, Any]:
    """The 95 % intervals of what `read_metrics` gives.

    Raises:
        InputError: the file is missing or damaged.
    """
    path, names, ends = run.workspace.intervals, list(run.evaluation["ranks"]), ("low", "high")
    with reading(path, "evaluate"):
        found = read_json(path)
        table = select(found["detectors"], names, columns(run), METRICS, ends)
        return {
            "detectors": table,
            "id": select(found["id"], heads(names), CALIBRATION, ends),
        }


def read_scores(run: "Run") -> dict[str, dict[str, Array]]:
    """Outlier scores by detector and set: ``test``, and each OOD test set.

    Raises:
        InputError: the file is missing or damaged, or lacks a set or a detector.
    """
    path, names = run.workspace.scores, list(run.evaluation["ranks"])
    table = read_table(path, "evaluate", ["set", *names])
    with reading(path, "evaluate"):
        place, sets = table["set"].to_numpy(), ("test", *run.evaluation["sets"])
        if missing := set(sets) - set(place):
            raise LookupError(f"no scores of {min(missing)}")
        return {name: {s: table[name].to_numpy()[place == s] for s in sets} for name in names}


def read_roc(run: "Run") -> dict[str, Array]:
    """Mean ROC curves in percent: ``fpr``, and the TPR of each detector.

    Raises:
        InputError: the file is missing or damaged, or lacks a detector.
    """
    return read_columns(run.workspace.roc, "evaluate", ("fpr", *run.evaluation["ranks"]))
