"""Measure the sensitivity, one task for each training shard, then merge in shard order."""

from pathlib import Path

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE

from flows.stage import collect, command, unless_bad_input
from opnp import stages
from opnp.parameters import Parameters

__all__ = ["sensitivity"]


@task(tags=["gpu"], retries=2, retry_condition_fn=unless_bad_input, cache_policy=NO_CACHE)
def sensitivity_shard(parameters: Parameters, path: Path) -> bool:
    return stages.sensitivity.compute(parameters, path)


@task(cache_policy=NO_CACHE)
def merge(plan: list[Path]) -> None:
    stages.sensitivity.merge(plan)


@flow
def sensitivity(parameters: Parameters) -> None:
    """Sum over every training shard, and merge; sums that are whole stay."""
    plan = stages.sensitivity.plan(parameters)
    for _ in collect(
        sensitivity_shard.map(unmapped(parameters), plan), "sensitivity (shards)", len(plan)
    ):
        pass
    merge(plan)


if __name__ == "__main__":
    command(sensitivity)
