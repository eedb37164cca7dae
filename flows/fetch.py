"""Fetch the images of the parameters into `data/`, one task for each source."""

from functools import partial
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.stage import command, task_runner, unless_bad_input
from flows.versions import check_data, record_data
from opnp import parameters, stages
from opnp.datasets import ImageSet

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
def fetch_id() -> dict[str, ImageSet]:
    return stages.fetch_id(parameters.load())


@retried()  # type: ignore[untyped-decorator]
def fetch_ood(name: str) -> dict[str, ImageSet]:
    return stages.fetch_ood(parameters.load(), name)


@flow(task_runner=task_runner())
def fetch(accept: bool = False) -> None:
    """Fetch every source and record the data with DVC.

    Args:
        accept: record the data even if they differ from what `data.dvc` has recorded for the same
            parameters.
    """
    chosen = parameters.load()
    stages.begin_fetch()
    sets: dict[str, ImageSet] = {}
    for future in [fetch_id.submit(), *fetch_ood.map(stages.ood_sources(chosen))]:
        sets |= future.result()
    manifest = stages.fetched(chosen, sets)
    if not accept:
        check_data(manifest)
    stages.finish_fetch(manifest)
    record_data(manifest)


if __name__ == "__main__":
    command(fetch, accept="record the data even if data.dvc has recorded others")
