"""Search the best mask on validation features and proxy outliers.

One task: the candidates share one set of features in memory.
"""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.stage import command
from opnp import parameters, stages

__all__ = ["search"]


@task(cache_policy=NO_CACHE)
def search_task() -> None:
    stages.search(parameters.load())


@flow
def search() -> None:
    """Search the best mask on validation features and proxy outliers."""
    search_task()


if __name__ == "__main__":
    command(search)
