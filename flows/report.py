"""Draw the report, one self-contained page."""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.stage import command
from opnp import parameters, stages

__all__ = ["report"]


@task(cache_policy=NO_CACHE)
def report_task() -> None:
    stages.report(parameters.load())


@flow
def report() -> None:
    """Draw the report, one self-contained page."""
    report_task()


if __name__ == "__main__":
    command(report)
