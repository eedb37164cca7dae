"""Evaluate: tune every detector on proxies, then score the test sets, for the first time."""

import logging
import time
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from opnp import workspace
from opnp.backbones.backbone import load_backbone
from opnp.errors import InputError, UnavailableError
from opnp.metrics import ranking
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.report import tables
from opnp.pipeline.stages import features, fetch, search, sensitivity
from opnp.pruning import energy, methods
from opnp.pruning.candidates import Candidate, candidate_record, candidates_of, setting_of
from opnp.pruning.sensitivity import Sensitivity, SensitivitySums
from opnp.pruning.table import Judge
from opnp.runtime import devices
from opnp.runtime.files import atomic, read_json, write_csv, write_json
from opnp.runtime.progress import track
from opnp.runtime.tables import write_table


def run(parameters: Parameters) -> dict[str, Any]:
    """Tune every detector on proxies, then score the test sets, for the first time."""
    from opnp.detectors import tuning
    from opnp.detectors.base import Samples, TrainedModel, takes_images
    from opnp.detectors.zoo import by_name
    from opnp.metrics import bootstrap, calibration, separation

    # ViM says for each combination that it takes fewer dimensions where there are fewer.
    logging.getLogger("pytorch_ood").setLevel(logging.ERROR)
    settings, temperature = parameters.evaluate, parameters.energy.temperature
    backbone = load_backbone(workspace.BACKBONE, parameters.train.backbone)
    model, preprocessing = backbone.classifier, backbone.preprocessing
    trained = TrainedModel(model.head, temperature, model, preprocessing.std)
    measured = sensitivity.read(parameters)
    found = search.read(parameters)
    chosen = {method: Candidate.stated(found[method]) for method in methods.METHODS}

    @cache  # the training features serve twice
    def loaded(split: str) -> tuple[Tensor, Tensor]:
        return features.load(parameters, split)[0]

    def samples(split: str, limit: int | None = None) -> Samples:
        h, labels = loaded(split)
        stop = min(len(h), limit or len(h))
        return Samples(
            h[:stop],
            labels[:stop],
            lambda: features.load_images(parameters, split, stop),
        )

    heads = {
        method: candidate.mask(setting_of(measured, candidate)).apply(model.head)
        for method, candidate in chosen.items()
    }

    def pruned(method: str, features: Tensor) -> Tensor:
        """Logits of what the search chose for a method."""
        clip = chosen[method].clip
        return heads[method](features if clip is None else features.clamp(max=clip))

    train_split = samples("train")
    train_images = samples("train", settings.training_images)
    validation = samples("validation", settings.tuning_samples)
    outliers = {
        name: samples(split, settings.tuning_samples)
        for name, split in features.outlier_splits(parameters).items()
    }
    tuned: dict[str, tuning.Tuned] = {}
    hyperparameters: dict[str, dict[str, Any]] = {}
    trials: dict[str, int] = {}
    times: dict[str, dict[str, float]] = {}
    if workspace.TIMES.is_file():  # of the search
        times = {
            name: of for name, of in read_json(workspace.TIMES).items() if name in methods.METHODS
        }
    unavailable: dict[str, str] = {}
    with devices.deterministic(threads=1), torch.no_grad():
        for name in track(settings.detectors, "tune (detectors)", len(settings.detectors)):
            if name in methods.METHODS:
                kept = (*chosen[name].record(), "clip", "temperature")
                hyperparameters[name] = {key: found[name][key] for key in kept}
                trials[name] = found["candidates"]
                start = time.perf_counter()
                candidate = chosen[name]
                SensitivitySums.of(
                    train_split.features,
                    model.head.weight,
                    energy.bias_of(model.head),
                    candidate.temperature,
                    candidate.clip,
                ).mean()
                times[name] = times.get(name, {}) | {"fit": time.perf_counter() - start}
                continue
            start = time.perf_counter()
            try:
                on_images = takes_images(by_name(name.removeprefix("opnp+"))(trained))
                tuned[name] = tuning.tune(
                    name,
                    trained,
                    train_images if on_images else train_split,
                    validation,
                    outliers,
                    budget=settings.budget,
                    seed=parameters.seed,
                    candidates=pruning_to_try(parameters, chosen),
                )
            except UnavailableError as error:
                unavailable[name] = str(error)
                continue
            hyperparameters[name], trials[name] = tuned[name].hyperparameters, tuned[name].trials
            seconds = time.perf_counter() - start
            times[name] = {"tune": seconds, "fit": tuned[name].fit_seconds}

        # Only here are test features read.
        manifest = fetch.manifest_of(parameters)
        names = list(manifest.ood)
        kinds = {name: manifest.ood[name].role for name in names}
        test = {"test": samples("test"), **{name: samples(f"ood/{name}") for name in names}}
        h, labels = test["test"].features, test["test"].labels
        assert labels is not None
        scores: dict[str, dict[str, Tensor]] = {}
        for name in track(settings.detectors, "score (detectors)", len(settings.detectors)):
            start = time.perf_counter()
            try:
                if name in methods.METHODS:
                    t = chosen[name].temperature
                    scores[name] = {
                        split: -energy.energy_score(pruned(name, each.features), t).double()
                        for split, each in test.items()
                    }
                elif name in tuned:
                    scores[name] = {s: tuned[name].score(each) for s, each in test.items()}
            except UnavailableError as error:
                unavailable[name] = str(error)
                continue
            count = sum(len(each.features) for each in test.values())
            milliseconds = 1e6 * (time.perf_counter() - start) / count
            times[name] = times.get(name, {}) | {"score": milliseconds}
        if not scores:
            reasons = " ".join(unavailable.values())
            raise InputError(f"None of evaluate.detectors can run here: {reasons}")
        id_logits = {"unpruned": model.head(h)}
        id_logits |= {method: pruned(method, h) for method in methods.METHODS if method in scores}

        table: dict[str, dict[str, dict[str, float]]] = {}
        intervals: dict[str, Any] = {}
        resamples = settings.bootstrap
        for method, by_set in track(scores.items(), "bootstrap (detectors)", len(scores)):
            against = {split: by_set[split] for split in names}
            by = {s: separation.ood_metrics(by_set["test"], against[s]) for s in names}
            table[method] = ranking.with_means(by, kinds)
            drawn = bootstrap.bootstrap(by_set["test"], against, kinds, resamples, parameters.seed)
            intervals[method] = {split: spans(values) for split, values in drawn.items()}
        result = {
            "detectors": table,
            "id": {name: calibration.calibration(f, labels) for name, f in id_logits.items()},
        }
        id_intervals = {
            name: spans(calibration.calibration_intervals(f, labels, resamples, parameters.seed))
            for name, f in id_logits.items()
        }
        ood = {name: test[name].features for name in names}
        oracle = oracles(parameters, model.head, measured, chosen, h, ood)
    ranks = ranking.ranks(table, names)
    split_features = {split: each.features for split, each in test.items()}
    write_scores(scores, split_features, labels, model.head)
    write_roc(scores, names)
    write_json(workspace.INTERVALS, {"detectors": intervals, "id": id_intervals})
    evaluation = {
        "hyperparameters": {name: hyperparameters[name] for name in scores},
        "trials": {name: trials[name] for name in scores},
        "sets": {s: {"kind": kinds[s], "count": manifest.ood[s].count} for s in names},
        "id_test_samples": len(h),
        "ranks": ranks,
        "unavailable": unavailable,
        "oracle": oracle,
    }
    write_json(workspace.EVALUATION, evaluation)
    write_comparison(table, intervals, evaluation)
    write_json(workspace.TIMES, times)
    # The metrics come last: where they are, everything is.
    write_json(workspace.METRICS, result)
    return result


def pruning_to_try(parameters: Parameters, chosen: dict[str, Candidate]) -> list[Candidate]:
    """What a detector may prune in combination: what the search chose, and each end by itself.

    What is best for the energy need not be for others: detectors of features heed no weights, and
    ViM, which adds the residual of the features, loses by pruned neurons.
    """
    settings = parameters.search
    weights = [(0.0, high) for high in settings.weights_high if high]
    weights += [(low, 0.0) for low in settings.weights_low if low]
    neurons = [(0.0, high) for high in settings.neurons_high if high]
    neurons += [(low, 0.0) for low in settings.neurons_low if low]
    return [
        *(replace(chosen[method], clip=None) for method in ("opp", "onp", "opnp")),
        *(Candidate(weights=ends) for ends in weights),
        *(
            Candidate((0.0, 0.0), ends, kind)
            for kind in settings.neuron_sensitivity
            for ends in neurons
        ),
    ]


def oracles(
    parameters: Parameters,
    head: nn.Linear,
    measured: list[Sensitivity],
    chosen: dict[str, Candidate],
    h: Tensor,
    ood: dict[str, Tensor],
) -> dict[str, Any]:
    """What choosing masks on the test sets themselves would have given, which nobody may do.

    Beside the lowest mean FPR95 of any candidate that keeps the accuracy on ID validation stands
    how much of its gain over the unpruned head the mask chosen without these sets keeps.
    """
    rows = pq.read_table(workspace.TRIALS).to_pylist()
    floor = rows[0]["accuracy"] - parameters.search.max_accuracy_drop - 1e-9
    accurate = {Candidate.stated(row) for row in rows if row["accuracy"] >= floor}
    candidates = candidates_of(measured, search.grid_of(parameters))
    tested = Judge.of(head, h, ood).trials(measured, candidates)
    percentiles = {each["threshold"]: each["clip"] for each in sensitivity.settings_of(parameters)}
    by_candidate = {
        trial.candidate: trial.mean_fpr95
        for trial in track(tested, "oracle (masks)", len(candidates))
    }
    unpruned, found = by_candidate[candidates[0]], {}
    for method in ("opnp", "opnp+react"):
        eligible = [
            each for each in candidates if methods.METHODS[method](each) and each in accurate
        ]
        lowest = min(eligible, key=lambda candidate: by_candidate[candidate])
        gain, kept = unpruned - by_candidate[lowest], unpruned - by_candidate[chosen[method]]
        found[method] = candidate_record(lowest, percentiles) | {
            "fpr95": by_candidate[lowest],
            "kept": 100 * kept / gain if gain > 0 else 100.0,
        }
    return found


def write_comparison(
    table: dict[str, Any], intervals: dict[str, Any], evaluation: dict[str, Any]
) -> None:
    """The comparison as a long table and as Markdown."""
    write_table(workspace.COMPARISON, tables.long_table(table, intervals, evaluation))
    text = tables.to_markdown(table, intervals, evaluation)
    with atomic(workspace.COMPARISON_TEXT) as temporary:
        temporary.write_text(text, encoding="utf-8")


def spans(intervals: dict[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {metric: {"low": low, "high": high} for metric, (low, high) in intervals.items()}


def write_scores(
    scores: dict[str, dict[str, Tensor]],
    split_features: dict[str, Tensor],
    labels: Tensor,
    head: nn.Linear,
) -> None:
    """One row for each test sample: its set, index, label, predicted class and outlier scores."""
    columns: dict[str, Any] = {"set": [], "index": [], "label": [], "prediction": []}
    for split, h in split_features.items():
        n = len(h)
        columns["set"] += [split] * n
        columns["index"] += range(n)
        columns["label"] += labels.tolist() if split == "test" else [-1] * n
        columns["prediction"] += head(h).argmax(dim=1).tolist()
    for name, by_set in scores.items():
        columns[name] = torch.cat([by_set[split] for split in split_features]).numpy()
    write_table(workspace.SCORES, pa.table(columns))


def write_roc(scores: dict[str, dict[str, Tensor]], names: list[str]) -> None:
    """ROC curves with ID positive, averaged over the OOD sets at each FPR, in percent."""
    from opnp.metrics.separation import tpr_at_fpr

    fpr = np.linspace(0, 1, 101)
    curves = {
        name: np.mean([tpr_at_fpr(by_set["test"], by_set[s], fpr) for s in names], axis=0)
        for name, by_set in scores.items()
    }
    rows = [
        {"fpr": 100 * fpr[i], **{name: 100 * float(curve[i]) for name, curve in curves.items()}}
        for i in range(len(fpr))
    ]
    write_csv(workspace.ROC, ["fpr", *curves], rows)
