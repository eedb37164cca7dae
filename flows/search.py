"""Search the best mask on validation features and proxy outliers.

One task: the candidates share one set of features in memory.
"""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.process import command
from opnp.pipeline import stages
from opnp.pipeline.parameters import Parameters

__all__ = ["search"]


@task(cache_policy=NO_CACHE)
def search_task(parameters: Parameters) -> None:
    stages.search.run(parameters)


@flow
def search(parameters: Parameters) -> None:
    """Search the best mask on validation features and proxy outliers."""
    search_task(parameters)


if __name__ == "__main__":
    command("search")
