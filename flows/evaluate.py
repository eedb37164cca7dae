"""Compare the detectors on the untouched test sets.

One task: all detectors share the cached features.
"""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.stage import command
from opnp import parameters, stages

__all__ = ["evaluate"]


@task(cache_policy=NO_CACHE)
def evaluate_task() -> None:
    stages.evaluate(parameters.load())


@flow
def evaluate() -> None:
    """Compare the detectors on the untouched test sets."""
    evaluate_task()


if __name__ == "__main__":
    command(evaluate)
