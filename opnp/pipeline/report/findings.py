"""What the report shows of a run, in the form that its plots, tables and sentences need."""

from dataclasses import dataclass
from typing import Any, Self, get_args

from opnp.detectors.names import label, ours
from opnp.metrics import ranking
from opnp.pipeline.results import Run
from opnp.pipeline.results.evaluation import PRUNED_HEADS
from opnp.pipeline.results.reading import Array
from opnp.pipeline.results.search import CANDIDATE
from opnp.pipeline.results.times import read_times
from opnp.pruning.candidates import Candidate, setting_of
from opnp.pruning.methods import METHODS
from opnp.pruning.sensitivity import NeuronSensitivity

__all__ = ["Evaluation", "Pruning"]

TIMES = ("fit", "score")


@dataclass(frozen=True)
class Pruning:
    """The sensitivities, the trials of the search, its choices, and the mask of OPNP.

    Attributes:
        sensitivity: of the weights and, by each definition, of the neurons, at OPNP's setting.
        search: the record of the search.
        methods: the choice for each method.
        trials: a value for each candidate by column; ``clips`` says whether it clips features.
        mask: of OPNP, over the weights and the neurons: True where they stay.
    """

    sensitivity: dict[str, Array]
    search: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    trials: dict[str, Array]
    mask: dict[str, Array]

    @classmethod
    def of(cls, run: Run) -> Self:
        """Of a run.

        Raises:
            InputError: a file is missing, damaged, or made with something else.
        """
        search, table, mask = run.search, run.trials, run.mask
        measured = setting_of(run.sensitivities, Candidate.stated(search["opnp"]))
        names = ("weights", *(f"neurons_{kind}" for kind in get_args(NeuronSensitivity)))
        trials = {name: table[name].to_numpy() for name in (*CANDIDATE, "fpr95", "accuracy")}
        return cls(
            {name: getattr(measured, name).numpy() for name in names},
            search,
            {method: search[method] for method in METHODS},
            trials | {"clips": ~table["clip"].is_null().to_numpy()},
            {"weights": mask.weights.numpy(), "neurons": mask.neurons.numpy()},
        )

    @property
    def chosen(self) -> dict[str, Any]:
        """What the search has chosen for OPNP, whose mask this is."""
        return self.methods["opnp"]

    @property
    def zero(self) -> float:
        """Share of the head's weights that the mask sets to zero, in percent."""
        return 100 * (1 - float((self.mask["weights"] & self.mask["neurons"]).mean()))


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured on the test sets.

    Attributes:
        table: metrics by detector and column, detectors in the order of the parameters.
        intervals: 95 % intervals of the metrics.
        calibration: of the unpruned head and the pruned heads on the ID test set.
        id_intervals: 95 % intervals of the calibration.
        hyperparameters: the choice of each detector.
        trials: how many combinations of hyperparameters each detector tried.
        pruned: percent of the head's weights that a detector prunes, of those that may prune.
        same: the detectors that are another one, since they prune nothing, and which.
        ranks: of each detector by column.
        unavailable: why each of the other detectors could not run.
        oracle: what a mask chosen on the test sets themselves would reach, by method.
        times: of each detector, where they were measured in this workspace.
        sets: kind and size of each OOD test set.
        id_count: size of the ID test set.
        scores: outlier scores by detector and set.
        roc: mean ROC curves in percent.
    """

    table: dict[str, dict[str, dict[str, float]]]
    intervals: dict[str, dict[str, dict[str, dict[str, float]]]]
    calibration: dict[str, dict[str, float]]
    id_intervals: dict[str, dict[str, dict[str, float]]]
    hyperparameters: dict[str, dict[str, Any]]
    trials: dict[str, int]
    pruned: dict[str, float]
    same: dict[str, str]
    ranks: dict[str, dict[str, float]]
    unavailable: dict[str, str]
    oracle: dict[str, dict[str, Any]]
    times: dict[str, dict[str, float]]
    sets: dict[str, dict[str, Any]]
    id_count: int
    scores: dict[str, dict[str, Array]]
    roc: dict[str, Array]

    @classmethod
    def of(cls, run: Run) -> Self:
        """Of a run.

        Raises:
            InputError: a file is missing, damaged, or made with something else.
        """
        record, metrics, intervals = run.evaluation, run.metrics, run.intervals
        table, times = metrics["detectors"], read_times(run.workspace)
        heads = ("unpruned", *(name for name in table if name in PRUNED_HEADS))
        return cls(
            table=table,
            intervals=intervals["detectors"],
            calibration={name: metrics["id"][name] for name in heads},
            id_intervals={name: intervals["id"][name] for name in heads},
            hyperparameters=record["hyperparameters"],
            trials=record["trials"],
            pruned=record["pruned"],
            same=record["same"],
            ranks=record["ranks"],
            unavailable=record["unavailable"],
            oracle=record["oracle"],
            times={name: times[name] for name in table if set(TIMES) <= set(times.get(name, ()))},
            sets=record["sets"],
            id_count=record["id_test_samples"],
            scores=run.scores,
            roc=run.roc,
        )

    def name(self, detector: str) -> str:
        """The printed name of a detector; one that might have pruned but did not says so."""
        return label(detector, self.pruned.get(detector), self.same.get(detector))

    def prunes(self, detector: str) -> bool:
        """Whether a detector is of our kind and prunes anything."""
        return ours(detector) and self.pruned[detector] > 0

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of the OOD sets of each kind, near and far, without a kind that has none."""
        groups = {
            kind: [name for name, entry in self.sets.items() if entry["kind"] == kind]
            for kind in ("near", "far")
        }
        return {kind: names for kind, names in groups.items() if names}

    @property
    def columns(self) -> list[str]:
        """The columns of the tables: each OOD set, and the means."""
        return ranking.columns({name: entry["kind"] for name, entry in self.sets.items()})

    @property
    def before_after(self) -> list[str]:
        """The detectors that are shown before and after pruning."""
        return [name for name in ("energy", "opnp") if name in self.table]
