"""Search: the best masks, on ID validation and outliers."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from opnp import artifacts, backbones, devices, tables
from opnp.errors import InputError
from opnp.files import digest, read_json, write_json
from opnp.parameters import Parameters
from opnp.progress import track
from opnp.search import (
    Candidate,
    Grid,
    SearchResult,
    Trial,
    choice_record,
    search_masks,
    setting_of,
    trial_record,
)
from opnp.stages import features, sensitivity

# What OPP, ONP and OPNP, the methods of the paper, may do, and what OPNP with ReAct's clipping may.
METHODS: dict[str, Callable[[Candidate], bool]] = {
    "opp": lambda candidate: candidate.clip is None and candidate.neurons == (0, 0),
    "onp": lambda candidate: candidate.clip is None and candidate.weights == (0, 0),
    "opnp": lambda candidate: candidate.clip is None,
    "opnp+react": lambda candidate: True,
}


def run(parameters: Parameters) -> SearchResult:
    """Search the grid on ID validation and outliers; write all trials and the chosen masks."""
    settings, measured = parameters.search, sensitivity.read(parameters)
    model = backbones.load(artifacts.BACKBONE, parameters.train.backbone).classifier
    [(h, labels)], outliers = (
        features.load(parameters, "validation"),
        features.load_outliers(parameters),
    )

    def progress(trials: Iterator[Trial], count: int) -> Iterator[Trial]:
        return track(trials, "search (masks)", count)

    start = time.perf_counter()
    with devices.deterministic(threads=1):
        result = search_masks(
            model.head,
            h,
            outliers,
            measured,
            grid_of(parameters),
            labels=labels,
            max_accuracy_drop=settings.max_accuracy_drop,
            restrictions=METHODS,
            resamples=settings.bootstrap,
            seed=parameters.seed,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    write_json(artifacts.TIMES, {method: {"tune": seconds} for method in METHODS})
    percentiles = {each["threshold"]: each["clip"] for each in sensitivity.settings_of(parameters)}
    write_trials(result.trials, percentiles)
    for method, path in (("opnp", artifacts.MASK), ("opnp+react", artifacts.MASK_REACT)):
        candidate = result.choices[method].trial.candidate
        mask = candidate.mask(setting_of(measured, candidate))
        about = {"backbone": digest(artifacts.BACKBONE), "candidate": asdict(candidate)}
        mask.save(path, about)
    record = {"unpruned": trial_record(result.trials[0], percentiles)}
    for method in METHODS:
        record[method] = choice_record(result.choices[method], percentiles)
    write_json(
        artifacts.SEARCH,
        {
            **record,
            "backbone": digest(artifacts.BACKBONE),
            "parameters": settings.model_dump(),
            "candidates": len(result.trials),
            "proxies": settings.proxies,
            "outliers": list(settings.outliers),
            "validation_samples": len(h),
            "training_samples": measured[0].count,
        },
    )
    return result


def read(parameters: Parameters) -> dict[str, Any]:
    """What `run` wrote of its choices.

    Raises:
        InputError: it is missing, or of another backbone or other parameters.
    """
    found: dict[str, Any] = read_json(artifacts.SEARCH, "python -m flows.search")
    for key, value, what in (
        ("backbone", digest(artifacts.BACKBONE), "another backbone"),
        ("parameters", parameters.search.model_dump(), "other parameters in section search"),
    ):
        if found.get(key) != value:
            raise InputError(
                f"{artifacts.SEARCH} was made with {what}: run `python -m flows.search`."
            )
    return found


def grid_of(parameters: Parameters) -> Grid:
    settings = parameters.search
    return Grid(
        settings.weights_low,
        settings.weights_high,
        settings.neurons_low,
        settings.neurons_high,
        settings.neuron_sensitivity,
    )


def write_trials(trials: list[Trial], percentiles: Mapping[float | None, float | None]) -> None:
    rows = [
        trial_record(trial, percentiles)
        | {f"fpr95/{name}": value for name, value in trial.fpr95.items()}
        | {f"auroc/{name}": value for name, value in trial.auroc.items()}
        for trial in trials
    ]
    tables.write(artifacts.TRIALS, pa.Table.from_pylist(rows))
