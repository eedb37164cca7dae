"""Train the backbone, or load its checkpoint.

One task: training is not divided.
"""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.stage import command
from opnp import parameters, stages

__all__ = ["train"]


@task(cache_policy=NO_CACHE)
def train_task() -> None:
    stages.train(parameters.load())


@flow
def train() -> None:
    """Train the backbone, or load its checkpoint."""
    train_task()


if __name__ == "__main__":
    command(train)
