"""Search: the best masks, on ID validation and outliers."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from opnp import workspace
from opnp.backbones.backbone import load_backbone
from opnp.errors import InputError
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.stages import features, sensitivity
from opnp.pruning.candidates import Trial, setting_of, trial_record
from opnp.pruning.methods import METHODS
from opnp.pruning.search import SearchResult, choice_record, search_masks
from opnp.runtime import devices
from opnp.runtime.files import digest, read_json, write_json
from opnp.runtime.progress import track
from opnp.runtime.tables import write_table


def run(parameters: Parameters) -> SearchResult:
    """Search the grid on ID validation and outliers; write all trials and the chosen masks."""
    settings, measured = parameters.search, sensitivity.read(parameters)
    model = load_backbone(workspace.BACKBONE, parameters.train.backbone).classifier
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
            settings,
            labels=labels,
            restrictions=METHODS,
            seed=parameters.seed,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    write_json(workspace.TIMES, {method: {"tune": seconds} for method in METHODS})
    percentiles = {each["threshold"]: each["clip"] for each in sensitivity.settings_of(parameters)}
    write_trials(result.trials, percentiles)
    for method, path in (("opnp", workspace.MASK), ("opnp+react", workspace.MASK_REACT)):
        candidate = result.choices[method].trial.candidate
        mask = candidate.mask(setting_of(measured, candidate))
        about = {"backbone": digest(workspace.BACKBONE), "candidate": asdict(candidate)}
        mask.save(path, about)
    record = {"unpruned": trial_record(result.trials[0], percentiles)}
    for method in METHODS:
        record[method] = choice_record(result.choices[method], percentiles)
    write_json(
        workspace.SEARCH,
        {
            **record,
            "backbone": digest(workspace.BACKBONE),
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
    found: dict[str, Any] = read_json(workspace.SEARCH, "stage:search")
    for key, value, what in (
        ("backbone", digest(workspace.BACKBONE), "another backbone"),
        ("parameters", parameters.search.model_dump(), "other parameters in section search"),
    ):
        if found.get(key) != value:
            raise InputError(f"{workspace.SEARCH} was made with {what}.", "stage:search")
    return found


def write_trials(trials: list[Trial], percentiles: Mapping[float | None, float | None]) -> None:
    rows = [
        trial_record(trial, percentiles)
        | {f"fpr95/{name}": value for name, value in trial.fpr95.items()}
        | {f"auroc/{name}": value for name, value in trial.auroc.items()}
        for trial in trials
    ]
    write_table(workspace.TRIALS, pa.Table.from_pylist(rows))
