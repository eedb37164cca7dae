"""Train the backbone, or load its checkpoint.

One task: training is not divided.
"""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.process import command
from opnp.pipeline import stages
from opnp.pipeline.parameters import Parameters

__all__ = ["train"]


@task(cache_policy=NO_CACHE)
def train_task(parameters: Parameters) -> None:
    stages.train.run(parameters)


@flow
def train(parameters: Parameters) -> None:
    """Train the backbone, or load its checkpoint."""
    train_task(parameters)


if __name__ == "__main__":
    command("train")
