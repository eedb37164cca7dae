"""Measure the sensitivity, one task for each training shard, then merge in shard order."""

from collections.abc import Mapping
from pathlib import Path

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE

from flows import transfer
from flows.process import collect, command, unless_bad_input
from opnp.backbones.shards import read_shard
from opnp.pipeline import stages
from opnp.pipeline.parameters import Parameters
from opnp.workspace import BACKBONE, CLIPS

__all__ = ["sensitivity"]


@task(tags=["gpu"], retries=2, retry_condition_fn=unless_bad_input, cache_policy=NO_CACHE)
def sensitivity_shard(
    parameters: Parameters, path: Path, inputs: Mapping[Path, str]
) -> tuple[bool, str]:
    return transfer.compute(
        parameters,
        inputs,
        stages.sensitivity.sums_file(path),
        lambda: stages.sensitivity.origin_of(parameters, path, read_shard(path)[2]),
        lambda: stages.sensitivity.compute(parameters, path),
    )


@task(cache_policy=NO_CACHE)
def merge(plan: list[Path]) -> None:
    stages.sensitivity.merge(plan)


@flow
def sensitivity(parameters: Parameters) -> None:
    """Sum over every training shard, and merge; sums that are whole stay."""
    plan = stages.sensitivity.plan(parameters)
    common = transfer.put(parameters, BACKBONE, CLIPS)
    inputs = [common | transfer.put(parameters, path) for path in plan]
    futures = sensitivity_shard.map(unmapped(parameters), plan, inputs)
    parts = collect(futures, "sensitivity (shards)", len(plan))
    for _ in transfer.bring(parameters, [stages.sensitivity.sums_file(p) for p in plan], parts):
        pass
    merge(plan)


if __name__ == "__main__":
    command("sensitivity")
