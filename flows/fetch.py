"""Fetch the images of the parameters into `data/`, one task for each source."""

from functools import partial
from typing import Any

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE

from flows.dvc_repo import check_data, record_data
from flows.process import command, unless_bad_input
from opnp.data.imagesets import ImageSet
from opnp.pipeline import stages
from opnp.pipeline.parameters import Parameters

__all__ = ["fetch"]

# A download that fails is tried again, in a while.
retried: Any = partial(
    task,
    retries=3,
    retry_delay_seconds=[2, 10, 60],
    retry_condition_fn=unless_bad_input,
    cache_policy=NO_CACHE,
)


@retried()  # type: ignore[untyped-decorator]
def fetch_id(parameters: Parameters) -> dict[str, ImageSet]:
    return stages.fetch.id_sets(parameters)


@retried()  # type: ignore[untyped-decorator]
def fetch_ood(parameters: Parameters, name: str) -> dict[str, ImageSet]:
    return stages.fetch.ood_set(parameters, name)


@flow
def fetch(parameters: Parameters, accept: bool = False) -> None:
    """Fetch every source and record the data with DVC.

    Args:
        parameters: of the run.
        accept: record the data even if they differ from what `data.dvc` has recorded for the same
            parameters.
    """
    stages.fetch.begin(parameters)
    others = fetch_ood.map(unmapped(parameters), stages.fetch.ood_sources(parameters))
    sets: dict[str, ImageSet] = {}
    for future in [fetch_id.submit(parameters), *others]:
        sets |= future.result()
    manifest = stages.fetch.manifest(parameters, sets)
    if not accept:
        check_data(manifest)
    stages.fetch.finish(manifest)
    record_data(manifest)


if __name__ == "__main__":
    command("fetch")
