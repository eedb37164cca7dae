"""Compare the detectors on the untouched test sets.

One task: all detectors share the cached features.
"""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.process import command
from opnp.pipeline import stages
from opnp.pipeline.parameters import Parameters

__all__ = ["evaluate"]


@task(cache_policy=NO_CACHE)
def evaluate_task(parameters: Parameters) -> None:
    stages.evaluate.run(parameters)


@flow
def evaluate(parameters: Parameters) -> None:
    """Compare the detectors on the untouched test sets."""
    evaluate_task(parameters)


if __name__ == "__main__":
    command("evaluate")
