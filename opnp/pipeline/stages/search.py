"""Search: the best masks, on ID validation and outliers."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict

import pyarrow as pa

from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.pipeline.results.times import add_times
from opnp.pruning.candidates import Trial, setting_of, trial_record
from opnp.pruning.methods import METHODS
from opnp.pruning.search import SearchResult, search_masks, search_record
from opnp.runtime import devices
from opnp.runtime.files import write_json
from opnp.runtime.progress import track
from opnp.runtime.tables import write_table
from opnp.workspace import Workspace


def run(workspace: Workspace, parameters: Parameters) -> SearchResult:
    """Search the grid on ID validation and outliers; write all trials and the chosen masks."""
    run, settings = Run(workspace, parameters), parameters.search
    h, labels = run.features("validation")

    def progress(trials: Iterator[Trial], count: int) -> Iterator[Trial]:
        return track(trials, "search (masks)", count)

    outliers, reported = (
        {name: run.features(split)[0] for name, split in splits.items()}
        for splits in (run.outlier_splits, run.reported_splits)
    )
    start = time.perf_counter()
    with devices.deterministic(threads=1):
        result = search_masks(
            run.backbone.classifier.head,
            h,
            outliers,
            run.sensitivities,
            settings,
            labels=labels,
            reported=reported,
            restrictions=METHODS,
            seed=parameters.seed,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    add_times(workspace, {method: {"tune": seconds} for method in METHODS})
    write_trials(workspace, result.trials, run.percentiles)
    write_masks(run, result)
    write_json(
        workspace.search,
        {
            **search_record(result, run.percentiles, [*METHODS]),
            "backbone": run.backbone_stated.sha256,
            "parameters": settings.model_dump(),
            "proxies": settings.proxies,
            "reported": settings.reported,
            "outliers": list(settings.outliers),
            "validation_samples": len(h),
            "training_samples": run.sensitivities[0].count,
        },
    )
    return result


def write_trials(
    workspace: Workspace, trials: list[Trial], percentiles: Mapping[float | None, float | None]
) -> None:
    """Write the figures of every candidate, over all outliers and for each set of them."""
    rows = [
        trial_record(trial, percentiles)
        | {f"fpr95/{name}": value for name, value in trial.fpr95.items()}
        | {f"auroc/{name}": value for name, value in trial.auroc.items()}
        for trial in trials
    ]
    write_table(workspace.trials, pa.Table.from_pylist(rows))


def write_masks(run: Run, result: SearchResult) -> None:
    """Write the masks of OPNP, for features as they are and for features that are clipped."""
    workspace = run.workspace
    for method, path in (("opnp", workspace.mask), ("opnp+react", workspace.mask_react)):
        candidate = result.choices[method].trial.candidate
        mask = candidate.mask(setting_of(run.sensitivities, candidate))
        about = {"backbone": run.backbone_stated.sha256, "candidate": asdict(candidate)}
        mask.save(path, about)
