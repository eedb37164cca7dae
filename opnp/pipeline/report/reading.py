"""What the report shows, read from the artifacts of a run."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import ArrowException

from opnp import workspace
from opnp.detectors.names import label, ours
from opnp.errors import InputError
from opnp.metrics import ranking
from opnp.metrics.separation import METRICS
from opnp.pipeline.parameters import Parameters
from opnp.pruning.sensitivity import NeuronSensitivity
from opnp.runtime import tensors
from opnp.runtime.files import digest, read_json

Array = NDArray[Any]

CANDIDATE = ("weights_low", "weights_high", "neurons_low", "neurons_high", "neuron_sensitivity")
METHODS = ("opp", "onp", "opnp", "opnp+react")  # for which the search chooses a mask
TIMES = ("fit", "score")


@dataclass(frozen=True)
class Backbone:
    """`training.json`, and the columns of the history, which are empty for a loaded checkpoint."""

    record: dict[str, Any]
    history: dict[str, Array]


@dataclass(frozen=True)
class Pruning:
    """Sensitivities, all trials of the search, what it chose for each method, and OPNP's mask."""

    sensitivity: dict[str, Array]
    search: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    trials: dict[str, Array]
    mask: dict[str, Array]

    @property
    def chosen(self) -> dict[str, Any]:
        """What OPNP prunes, which the saved mask does."""
        return self.methods["opnp"]

    @property
    def zero(self) -> float:
        """Share of the head's weights that the mask sets to zero, in percent."""
        return 100 * (1 - float((self.mask["weights"] & self.mask["neurons"]).mean()))


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on the test sets.

    Attributes:
        table: metrics by detector and column, detectors in the order of the parameters.
        pruned: percent of the head's weights that a detector prunes, of those that may prune.
        unavailable: why each of the other detectors could not run.
        oracle: of a method, what a mask chosen on the test sets themselves would reach.
        times: of each detector, where they have been measured.
    """

    table: dict[str, dict[str, dict[str, float]]]
    intervals: dict[str, dict[str, dict[str, dict[str, float]]]]
    calibration: dict[str, dict[str, float]]
    id_intervals: dict[str, dict[str, dict[str, float]]]
    hyperparameters: dict[str, dict[str, Any]]
    trials: dict[str, int]
    pruned: dict[str, float]
    ranks: dict[str, dict[str, float]]
    unavailable: dict[str, str]
    oracle: dict[str, dict[str, Any]]
    times: dict[str, dict[str, float]]
    sets: dict[str, dict[str, Any]]
    id_count: int
    scores: dict[str, dict[str, Array]]
    roc: dict[str, Array]

    def name(self, detector: str) -> str:
        """The printed name of a detector, marked if it might have pruned but did not."""
        return label(detector, self.pruned.get(detector))

    def prunes(self, detector: str) -> bool:
        """Whether a detector is of our kind and prunes anything."""
        return ours(detector) and self.pruned[detector] > 0

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of the OOD sets that are near and far, as far as there are any."""
        groups = {
            kind: [name for name, entry in self.sets.items() if entry["kind"] == kind]
            for kind in ("near", "far")
        }
        return {kind: names for kind, names in groups.items() if names}

    @property
    def columns(self) -> list[str]:
        return ranking.columns({name: entry["kind"] for name, entry in self.sets.items()})

    @property
    def before_after(self) -> list[str]:
        return [name for name in ("energy", "opnp") if name in self.table]


@contextmanager
def reading(path: Path, about: str) -> Iterator[None]:
    """Turn whatever goes wrong while ``path`` is read into one sentence."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is missing.", about) from None
    except (ArrowException, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({reason}).", about) from None


def select(values: Any, *levels: Iterable[str]) -> Any:
    """The part of nested mappings with these keys on each level; `KeyError` where one lacks."""
    if not levels:
        return values
    return {key: select(values[key], *levels[1:]) for key in levels[0]}


def read_columns(path: Path, about: str, columns: Sequence[str]) -> dict[str, Array]:
    """Numeric columns of a CSV file."""
    with reading(path, about), open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        select(dict.fromkeys(reader.fieldnames or ()), columns)  # even where there are no rows
        return {name: np.array([float(row[name]) for row in rows]) for name in columns}


def read_tensors(path: Path, about: str, backbone: str) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays, and what is said of them, of a file made for the backbone of this SHA-256."""
    with reading(path, about):
        found, metadata = tensors.load(path, about)
        if metadata["backbone"] != backbone:
            raise InputError(f"{path} is of another backbone.", about)
        return {name: tensor.numpy() for name, tensor in found.items()}, metadata


def read_backbone() -> Backbone:
    about = "stage:train"
    keys = ("train_accuracy", "validation_accuracy", "parameters", "features", "classes", "sha256")
    with reading(workspace.TRAINING, about):
        record = select(read_json(workspace.TRAINING, about), keys)
    columns = ("epoch", "loss", "train_accuracy", "validation_accuracy")
    return Backbone(record, read_columns(workspace.HISTORY, about, columns))


def read_pruning(backbone: str) -> Pruning:
    measure, search = "stage:sensitivity", "stage:search"
    arrays, _ = read_tensors(workspace.MASK, search, backbone)
    with reading(workspace.MASK, search):
        mask = {name: arrays[name].astype(bool) for name in ("weights", "neurons")}
    with reading(workspace.SEARCH, search):
        found = read_json(workspace.SEARCH, search)
        keys = (*CANDIDATE, "clip", "threshold", "temperature", "fpr95", "auroc", "accuracy")
        found_by = ("interval", "within_noise", "instability")
        methods = {method: select(found[method], (*keys, *found_by)) for method in METHODS}
        for chosen in methods.values():
            select(chosen["interval"], ("low", "high"))
        counts = ("candidates", "validation_samples", "training_samples")
        record = select(found, (*counts, "proxies", "outliers"))
        record["unpruned"] = select(found["unpruned"], ("fpr95", "accuracy"))
    arrays, metadata = read_tensors(workspace.SENSITIVITY, measure, backbone)
    with reading(workspace.SENSITIVITY, measure):
        # Sums over either half of the training samples, for each clip and temperature.
        wanted = (None, methods["opnp"]["temperature"])
        settings = [(each["clip"], each["temperature"]) for each in metadata["settings"]]
        place = settings.index(wanted)
        count = sum(metadata["counts"][2 * place : 2 * place + 2])
        sensitivity = {
            name: (arrays[f"{place}/0/{name}"] + arrays[f"{place}/1/{name}"]) / count
            for name in ("weights", *(f"neurons_{kind}" for kind in get_args(NeuronSensitivity)))
        }
    with reading(workspace.TRIALS, search):
        columns = (*CANDIDATE, "clip", "fpr95", "accuracy")
        table = pq.read_table(workspace.TRIALS, columns=list(columns))
        trials = {name: table[name].to_numpy() for name in columns if name != "clip"}
        trials["clips"] = ~table["clip"].is_null().to_numpy()
    return Pruning(sensitivity, record, methods, trials, mask)


def read_evaluation(parameters: Parameters, pruning: Pruning) -> Evaluation:
    about = "stage:evaluate"
    with reading(workspace.EVALUATION, about):
        record = read_json(workspace.EVALUATION, about)
        sets = select(record["sets"], record["sets"], ("kind", "count"))
        wanted = list[str](parameters.evaluate.detectors)
        unavailable = {n: reason for n, reason in record["unavailable"].items() if n in wanted}
        names = [name for name in wanted if name not in unavailable]
        tuned, trials = (select(record[key], names) for key in ("hyperparameters", "trials"))
        pruned = select(record["pruned"], filter(ours, names))
        ranks = select(record["ranks"], names, (*sets, "mean"))
        oracle = select(record["oracle"], record["oracle"], (*CANDIDATE, "fpr95", "kept"))
        id_count = record["id_test_samples"]
        if "opnp" in tuned and any(tuned["opnp"][key] != pruning.chosen[key] for key in CANDIDATE):
            raise InputError(f"{workspace.EVALUATION} is of another mask.", about)
    shown = ranking.columns({name: entry["kind"] for name, entry in sets.items()})
    with reading(workspace.METRICS, about):
        found = read_json(workspace.METRICS, about)
        table = select(found["detectors"], names, shown, METRICS)
        heads = ["unpruned", *(name for name in names if name in ("opp", "onp", "opnp"))]
        calibration = select(found["id"], heads, ("accuracy", "ece", "nll"))
    with reading(workspace.INTERVALS, about):
        found = read_json(workspace.INTERVALS, about)
        intervals = select(found["detectors"], names, shown, METRICS, ("low", "high"))
        id_intervals = select(found["id"], heads, ("accuracy", "ece", "nll"), ("low", "high"))
    with reading(workspace.SCORES, about):
        scores_of = pq.read_table(workspace.SCORES, columns=["set", *names])
        place = scores_of["set"].to_numpy()
        scores = {
            name: {s: scores_of[name].to_numpy()[place == s] for s in ("test", *sets)}
            for name in names
        }
        if missing := {"test", *sets} - set(place):
            raise LookupError(f"no scores of {min(missing)}")
    roc = read_columns(workspace.ROC, about, ("fpr", *names))
    return Evaluation(
        table=table,
        intervals=intervals,
        calibration=calibration,
        id_intervals=id_intervals,
        hyperparameters=tuned,
        trials=trials,
        pruned=pruned,
        ranks=ranks,
        unavailable=unavailable,
        oracle=oracle,
        times=read_times(names),
        sets=sets,
        id_count=id_count,
        scores=scores,
        roc=roc,
    )


def read_times(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Seconds and milliseconds of the detectors; none where they were not measured here."""
    if not workspace.TIMES.is_file():
        return {}
    about = "stage:evaluate"
    with reading(workspace.TIMES, about):
        found = read_json(workspace.TIMES, about)
        return {name: select(found[name], TIMES) for name in names if name in found}


def read_hashes(backbone: Backbone) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of what the run was made of and of what it made, and the OOD sets it went without."""
    about = "stage:fetch"
    with reading(workspace.MANIFEST, about):
        manifest = read_json(workspace.MANIFEST, about)
        sets, missing = manifest["sets"], manifest.get("missing", {})
        found = {f"data/{name}.parquet": sets[name]["sha256"] for name in sets}
    found[str(workspace.BACKBONE)] = backbone.record["sha256"]
    found |= {str(path): digest(path) for path in (workspace.SENSITIVITY, workspace.MASK)}
    return found, missing
