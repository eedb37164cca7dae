"""The stages of the pipeline as Prefect flows.

Stages whose work is divided run one task for each part of their plan, on the workers that the
parameters ask for; the others are one task, since their work shares what is in memory.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE

from flows import transfer
from flows.dvc_repo import check_data, record_data
from flows.process import collect, unless_bad_input
from opnp.data.imagesets import ImageSet
from opnp.pipeline import stages
from opnp.pipeline.parameters import Parameters
from opnp.workspace import Workspace

__all__ = ["evaluate", "features", "fetch", "report", "search", "sensitivity", "train"]


@task(cache_policy=NO_CACHE)
def whole(stage: str, workspace: Workspace, parameters: Parameters) -> None:
    """A stage in one task."""
    getattr(stages, stage).run(workspace, parameters)


@task(tags=["gpu"], retries=2, retry_condition_fn=unless_bad_input, cache_policy=NO_CACHE)
def shard(
    stage: str,
    workspace: Workspace,
    parameters: Parameters,
    part: Any,
    inputs: Mapping[str, str],
) -> tuple[bool, str]:
    """A part of a divided stage; whether it was computed, and its digest in the storage."""
    return transfer.compute(stages.DIVIDED[stage], workspace, parameters, part, inputs)


@task(cache_policy=NO_CACHE)
def together(stage: str, workspace: Workspace, planned: list[Any]) -> None:
    """What follows once all parts of a divided stage are made."""
    stages.DIVIDED[stage].finish(workspace, planned)


def divided(stage: str, workspace: Workspace, parameters: Parameters, images: bool = False) -> None:
    """Run a divided stage, a task for each part; parts that are whole stay.

    Args:
        stage: its name.
        workspace: of the run.
        parameters: of the run.
        images: whether workers need the images of the data.
    """
    of = stages.DIVIDED[stage]
    planned = list(of.plan(workspace, parameters))
    inputs = transfer.put(workspace, parameters, [of.needed(workspace, p) for p in planned])
    if images:
        transfer.put_images(workspace, parameters)
    mapped = shard.with_options(name=f"{stage} shard").map(
        unmapped(stage), unmapped(workspace), unmapped(parameters), planned, inputs
    )
    done = collect(mapped, f"{stage} (shards)", len(planned))
    files = [of.made(workspace, part) for part in planned]
    computed = sum(transfer.bring(parameters, files, done))
    together(stage, workspace, planned)
    if computed < len(planned):
        print(f"{stage}: {len(planned) - computed} of {len(planned)} shards were there already")


# A download that fails is tried again after a while.
retried: Any = partial(
    task,
    retries=3,
    retry_delay_seconds=[2, 10, 60],
    retry_condition_fn=unless_bad_input,
    cache_policy=NO_CACHE,
)


@retried()  # type: ignore[untyped-decorator]
def fetch_id(workspace: Workspace, parameters: Parameters) -> dict[str, ImageSet]:
    return stages.fetch.id_sets(workspace, parameters)


@retried()  # type: ignore[untyped-decorator]
def fetch_ood(workspace: Workspace, parameters: Parameters, name: str) -> dict[str, ImageSet]:
    return stages.fetch.ood_set(workspace, parameters, name)


@flow
def fetch(workspace: Workspace, parameters: Parameters, accept: bool = False) -> None:
    """Fetch the images of every source, one task for each, and record them with DVC.

    Args:
        workspace: of the run.
        parameters: of the run.
        accept: record the data even if the same parameters gave other data before.
    """
    stages.fetch.begin(workspace, parameters)
    names = stages.fetch.ood_sources(parameters)
    others = fetch_ood.map(unmapped(workspace), unmapped(parameters), names)
    sets: dict[str, ImageSet] = {}
    for future in [fetch_id.submit(workspace, parameters), *others]:
        sets |= future.result()
    manifest = stages.fetch.manifest(workspace, parameters, sets)
    if not accept:
        check_data(workspace, manifest)
    stages.fetch.finish(workspace, manifest)
    record_data(workspace, manifest)


@flow
def train(workspace: Workspace, parameters: Parameters) -> None:
    """Train the backbone, or load its weights."""
    whole("train", workspace, parameters)


@flow
def features(workspace: Workspace, parameters: Parameters) -> None:
    """Compute the penultimate features of every split and proxy family."""
    divided("features", workspace, parameters, images=True)


@flow
def sensitivity(workspace: Workspace, parameters: Parameters) -> None:
    """Measure the sensitivity of the head over the training features."""
    divided("sensitivity", workspace, parameters)


@flow
def search(workspace: Workspace, parameters: Parameters) -> None:
    """Search for the best mask on validation features and outliers."""
    whole("search", workspace, parameters)


@flow
def evaluate(workspace: Workspace, parameters: Parameters) -> None:
    """Compare the detectors on the untouched test sets."""
    whole("evaluate", workspace, parameters)


@flow
def report(workspace: Workspace, parameters: Parameters) -> None:
    """Draw the report, one self-contained page."""
    whole("report", workspace, parameters)
