"""Evaluate: tune every detector on validation samples, then compare them on the test sets."""

import logging
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from opnp.detectors import names
from opnp.errors import InputError, UnavailableError
from opnp.metrics import ranking
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.report import tables
from opnp.pipeline.results import Run
from opnp.pipeline.results.times import add_times, read_times
from opnp.pruning import methods
from opnp.pruning.candidates import Candidate, candidate_record, candidates_of
from opnp.pruning.settings import SearchSettings
from opnp.pruning.table import Judge
from opnp.runtime import devices
from opnp.runtime.files import atomic, write_csv, write_json
from opnp.runtime.progress import track
from opnp.runtime.tables import write_table
from opnp.workspace import Workspace

if TYPE_CHECKING:  # pytorch-ood takes seconds to import
    from opnp.detectors.base import Samples, TrainedModel
    from opnp.detectors.fusion import Fusion
    from opnp.detectors.tuning import Tuned

ORACLES = ("opnp", "opnp+react")  # the methods for which the best mask in hindsight is reported


@dataclass
class Comparison:
    """The detectors of a run, filled in step by step.

    Attributes:
        tuned: fitted detectors by name, in the order of the parameters.
        scores: outlier scores (N,) of each detector on each test set; ``test`` is ID.
        same: of each detector of ours that prunes nothing, the compared one whose scores it has.
        unavailable: why each of the other detectors could not run.
        times: seconds to tune and to fit each detector, and milliseconds to score 1000 samples.
    """

    tuned: "dict[str, Tuned | Fusion]" = field(default_factory=dict)
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    times: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """The figures of all detectors: what `metrics.json` and `intervals.json` hold."""

    metrics: dict[str, Any]
    intervals: dict[str, Any]
    ranks: dict[str, dict[str, float]]


def run(workspace: Workspace, parameters: Parameters) -> dict[str, Any]:
    """Tune every detector, score the test sets for the first time, and compare the detectors.

    Returns:
        The contents of `metrics.json`.

    Raises:
        InputError: what earlier stages made is missing or damaged, or no detector can run.
    """
    # ViM logs each time that it takes fewer dimensions because there are fewer.
    logging.getLogger("pytorch_ood").setLevel(logging.ERROR)
    run = Run(workspace, parameters)
    chosen = {method: Candidate.stated(run.search[method]) for method in methods.METHODS}
    model = trained_model(run, chosen)
    with devices.deterministic(threads=1), torch.no_grad():
        settings = parameters.search.for_head(*model.head.weight.shape)
        comparison = tune(run, model, pruning_to_try(settings, chosen, parameters.seed))
        test = test_samples(run)  # only from here on are test features read
        score(comparison, test)
        measured = measure(run, comparison, test)
        oracle = oracles(run, chosen, test)
    write(run, comparison, measured, oracle, test)
    return measured.metrics


def trained_model(run: Run, chosen: Mapping[str, Candidate]) -> "TrainedModel":
    """The backbone as detectors take it, with what the mask search chose for it."""
    from opnp.detectors.base import SearchChoice, TrainedModel

    backbone, found = run.backbone, run.search
    tried = [Candidate.stated(row) for row in run.trials.to_pylist()]
    choices = {
        method: SearchChoice(
            candidate, found[method]["clip"], sum(map(methods.METHODS[method], tried))
        )
        for method, candidate in chosen.items()
    }
    return TrainedModel(
        backbone.classifier.head,
        run.parameters.energy.temperature,
        backbone.classifier,
        backbone.preprocessing.std,
        choices,
        run.training.record["spcp_threshold"],
    )


def samples_of(run: Run, split: str, *limits: int | None) -> "list[Samples]":
    """The first samples of a split, once for each limit; None for all of them."""
    from opnp.detectors.base import Samples

    h, labels = run.features(split)
    stops = [min(len(h), limit or len(h)) for limit in limits]
    return [Samples(h[:stop], labels[:stop], partial(run.images, split, stop)) for stop in stops]


def test_samples(run: Run) -> "dict[str, Samples]":
    """The ID test set, and each OOD set by name."""
    splits = {"test": "test", **{name: f"ood/{name}" for name in kinds_of(run)}}
    return {name: samples_of(run, split, None)[0] for name, split in splits.items()}


def kinds_of(run: Run) -> dict[str, str]:
    """``near`` or ``far`` for each OOD set."""
    return {name: entry.role for name, entry in run.manifest.ood.items()}


def tune(run: Run, model: "TrainedModel", candidates: list[Candidate]) -> Comparison:
    """Tune and fit every detector on training, validation and outlier samples.

    A fusion takes its parts as they are tuned alone, and is calibrated on all validation samples.
    """
    from opnp.detectors import tuning
    from opnp.detectors.base import make, takes_images
    from opnp.detectors.fusion import Fusion

    settings, comparison = run.parameters.evaluate, Comparison(times=search_times(run.workspace))
    train, with_images = samples_of(run, "train", None, settings.training_images)
    everything, validation = samples_of(run, "validation", None, settings.tuning_samples)
    outliers = {
        name: samples_of(run, split, settings.tuning_samples)[0]
        for name, split in run.outlier_splits.items()
    }
    wanted = [names.alone(part) for name in settings.detectors for part in names.parts(name)]
    of_images = set()
    # A factory that does not return a detector is refused before anything is tuned.
    for key in dict.fromkeys(wanted):
        with suppress(UnavailableError):  # tuning it will say why
            if takes_images(make(key, model)):
                of_images.add(key)

    @cache  # a detector may also be where a combination starts, and a part of fusions
    def alone(name: str) -> "Tuned":
        key = names.alone(name)
        return tuning.tune(
            name,
            model,
            with_images if key in of_images else train,
            validation,
            outliers,
            budget=settings.budget,
            seed=run.parameters.seed,
            candidates=candidates,
            start=None if key == name else alone(key),
        )

    for name in track(settings.detectors, "tune (detectors)", len(settings.detectors)):
        start = time.perf_counter()
        try:
            parts = {part: alone(part) for part in names.parts(name)}
            tuned = parts[name] if name in parts else Fusion.of(parts, everything)
        except UnavailableError as error:
            comparison.unavailable[name] = str(error)
            continue
        comparison.tuned[name] = tuned
        took = {"tune": time.perf_counter() - start, "fit": tuned.fit_seconds}
        comparison.times[name] = took | comparison.times.get(name, {})
    return comparison


def search_times(workspace: Workspace) -> dict[str, dict[str, float]]:
    """Seconds that the mask search took, for each of its methods, if they were measured here."""
    times = {method: read_times(workspace).get(method, {}) for method in methods.METHODS}
    return {method: {"tune": of["tune"]} for method, of in times.items() if "tune" in of}


def pruning_to_try(
    settings: SearchSettings, chosen: dict[str, Candidate], seed: int
) -> list[Candidate]:
    """What a detector X may prune in ``opnp+X``: what the search chose, and each end by itself.

    What is best for the energy need not be best for X: detectors of features ignore pruned weights,
    and ViM, which adds the residual of the features, loses by pruned neurons. What the search chose
    comes first; a budget that is too small for all takes some of the others at random.
    """
    weights = [(0.0, high) for high in settings.weights_high or () if high]
    weights += [(low, 0.0) for low in settings.weights_low if low]
    neurons = [(0.0, high) for high in settings.neurons_high if high]
    neurons += [(low, 0.0) for low in settings.neurons_low if low]
    kinds = settings.neuron_sensitivity
    ends = [Candidate(weights=each) for each in weights]
    ends += [Candidate((0.0, 0.0), each, kind) for kind in kinds for each in neurons]
    random.Random(seed).shuffle(ends)
    searched = [
        replace(chosen[method], clip=None, temperature=1.0)  # these are X's affair
        for method in ("opnp+react", "opnp", "onp", "opp")
    ]
    return list(dict.fromkeys([*searched, *ends]))


def score(comparison: Comparison, test: "Mapping[str, Samples]") -> None:
    """Score all test sets by every tuned detector.

    Raises:
        InputError: no detector can.
    """
    count = sum(len(each.features) for each in test.values())
    tuned = comparison.tuned
    for name in track(list(tuned), "score (detectors)", len(tuned)):
        start = time.perf_counter()
        try:
            scores = {split: tuned[name].score(each) for split, each in test.items()}
        except UnavailableError as error:
            comparison.unavailable[name] = str(error)
            continue
        comparison.scores[name] = scores
        comparison.times[name]["score"] = 1e6 * (time.perf_counter() - start) / count
    if not comparison.scores:
        reasons = " ".join(comparison.unavailable.values())
        raise InputError(f"None of the detectors can run here: {reasons}")
    comparison.same = without_effect(comparison)


def without_effect(comparison: Comparison) -> dict[str, str]:
    """The detectors of ours that prune nothing, with the compared ones that give their scores."""
    scores, tuned = comparison.scores, comparison.tuned
    could = {name: names.unpruned(name) for name in scores if names.ours(name)}
    return {
        name: other
        for name, other in could.items()
        if tuned[name].pruned == 0
        and other in scores
        and all(torch.equal(scores[other][split], of) for split, of in scores[name].items())
    }


def measure(run: Run, comparison: Comparison, test: "Mapping[str, Samples]") -> Measured:
    """Metrics of every detector on every OOD set, and of the classifier, with their intervals."""
    from opnp.metrics import bootstrap, calibration, separation

    resamples, seed = run.parameters.evaluate.bootstrap, run.parameters.seed
    kinds, scores = kinds_of(run), comparison.scores
    table: dict[str, dict[str, dict[str, float]]] = {}
    intervals: dict[str, Any] = {}
    for name, by_set in track(scores.items(), "bootstrap (detectors)", len(scores)):
        inside, against = by_set["test"], {split: by_set[split] for split in kinds}
        by = {split: separation.ood_metrics(inside, against[split]) for split in kinds}
        table[name] = ranking.with_means(by, kinds)
        drawn = bootstrap.bootstrap(inside, against, kinds, resamples, seed)
        intervals[name] = {split: spans(values) for split, values in drawn.items()}
    h, labels = test["test"].features, test["test"].labels
    assert labels is not None
    logits = {"unpruned": run.backbone.classifier.head(h)}
    for name in scores:
        if (pruned := comparison.tuned[name].pruned_logits(h)) is not None:
            logits[name] = pruned
    quality = {name: calibration.calibration(f, labels) for name, f in logits.items()}
    id_intervals = {
        name: spans(calibration.calibration_intervals(f, labels, resamples, seed))
        for name, f in logits.items()
    }
    trials = {name: comparison.tuned[name].trials for name in scores}
    return Measured(
        {"detectors": table, "id": quality, "trials": trials},
        {"detectors": intervals, "id": id_intervals},
        ranking.ranks(table, list(kinds), same=comparison.same),
    )


def spans(intervals: dict[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {metric: {"low": low, "high": high} for metric, (low, high) in intervals.items()}


def oracles(
    run: Run, chosen: dict[str, Candidate], test: "Mapping[str, Samples]"
) -> dict[str, Any]:
    """What choosing masks on the test sets themselves would have given, which is not allowed.

    The lowest mean FPR95 of all candidates that keep the accuracy on ID validation, and how much of
    its gain over the unpruned head the mask keeps that was chosen without these sets.
    """
    measured, rows = run.sensitivities, run.trials.to_pylist()
    floor = run.parameters.search.lowest_accuracy(rows[0]["accuracy"]) - 1e-9
    accurate = {Candidate.stated(row) for row in rows if row["accuracy"] >= floor}
    candidates = candidates_of(measured, run.parameters.search)
    ood = {name: each.features for name, each in test.items() if name != "test"}
    judge = Judge.of(run.backbone.classifier.head, test["test"].features, ood)
    tested = judge.trials(measured, candidates)
    by_candidate = {
        trial.candidate: trial.mean_fpr95
        for trial in track(tested, "oracle (masks)", len(candidates))
    }
    unpruned, found = by_candidate[candidates[0]], {}
    for method in ORACLES:
        eligible = [
            each for each in candidates if methods.METHODS[method](each) and each in accurate
        ]
        lowest = min(eligible, key=lambda candidate: by_candidate[candidate])
        gain, kept = unpruned - by_candidate[lowest], unpruned - by_candidate[chosen[method]]
        found[method] = candidate_record(lowest, run.percentiles) | {
            "fpr95": by_candidate[lowest],
            "kept": 100 * kept / gain if gain > 0 else 100.0,
        }
    return found


def write(
    run: Run,
    comparison: Comparison,
    measured: Measured,
    oracle: dict[str, Any],
    test: "Mapping[str, Samples]",
) -> None:
    """Write scores, curves, tables and figures; the metrics come last."""
    workspace, kinds, scores = run.workspace, kinds_of(run), comparison.scores
    tuned = {name: comparison.tuned[name] for name in scores}
    sizes = {name: len(each.features) for name, each in test.items()}
    write_scores(workspace, scores, test, run.backbone.classifier.head)
    write_roc(workspace, scores, list(kinds))
    write_json(workspace.intervals, measured.intervals)
    evaluation = {
        "hyperparameters": {name: each.hyperparameters for name, each in tuned.items()},
        "trials": measured.metrics["trials"],
        "pruned": {name: each.pruned or 0.0 for name, each in tuned.items() if names.ours(name)},
        "same": comparison.same,
        "sets": {name: {"kind": kind, "count": sizes[name]} for name, kind in kinds.items()},
        "id_test_samples": sizes["test"],
        "ranks": measured.ranks,
        "unavailable": comparison.unavailable,
        "oracle": oracle,
    }
    write_json(workspace.evaluation, evaluation)
    write_comparison(workspace, measured, evaluation)
    add_times(workspace, comparison.times)
    # Where the metrics are, everything is.
    write_json(workspace.metrics, measured.metrics)


def write_comparison(workspace: Workspace, measured: Measured, evaluation: dict[str, Any]) -> None:
    """Write the comparison as a long table and as Markdown."""
    figures = (measured.metrics["detectors"], measured.intervals["detectors"], evaluation)
    write_table(workspace.comparison, tables.long_table(*figures))
    with atomic(workspace.comparison_text) as temporary:
        temporary.write_text(tables.to_markdown(*figures), encoding="utf-8")


def write_scores(
    workspace: Workspace,
    scores: dict[str, dict[str, Tensor]],
    test: "Mapping[str, Samples]",
    head: nn.Linear,
) -> None:
    """Write a row for each test sample: its set, index, label, predicted class and scores."""
    columns: dict[str, Any] = {"set": [], "index": [], "label": [], "prediction": []}
    for split, samples in test.items():
        n, labels = len(samples.features), samples.labels if split == "test" else None
        columns["set"] += [split] * n
        columns["index"] += range(n)
        columns["label"] += [-1] * n if labels is None else labels.tolist()
        columns["prediction"] += head(samples.features).argmax(dim=1).tolist()
    for name, by_set in scores.items():
        columns[name] = torch.cat([by_set[split] for split in test]).numpy()
    write_table(workspace.scores, pa.table(columns))


def write_roc(workspace: Workspace, scores: dict[str, dict[str, Tensor]], sets: list[str]) -> None:
    """Write ROC curves with ID positive, averaged over the OOD sets at each FPR, in percent."""
    from opnp.metrics.separation import tpr_at_fpr

    fpr = np.linspace(0, 1, 101)
    curves = {
        name: np.mean([tpr_at_fpr(by_set["test"], by_set[s], fpr) for s in sets], axis=0)
        for name, by_set in scores.items()
    }
    rows = [
        {"fpr": 100 * fpr[i], **{name: 100 * float(curve[i]) for name, curve in curves.items()}}
        for i in range(len(fpr))
    ]
    write_csv(workspace.roc, ["fpr", *curves], rows)
