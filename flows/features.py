"""Compute penultimate features, one task for each shard."""

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE

from flows.stage import collect, command, unless_bad_input
from opnp import stages
from opnp.features import Shard
from opnp.parameters import Parameters

__all__ = ["features"]


@task(tags=["gpu"], retries=2, retry_condition_fn=unless_bad_input, cache_policy=NO_CACHE)
def feature_shard(parameters: Parameters, shard: Shard) -> bool:
    return stages.features.compute(parameters, shard)


@flow
def features(parameters: Parameters) -> None:
    """Compute the features of every split and proxy family; shards that are whole stay."""
    plan = stages.features.plan(parameters)
    futures = feature_shard.map(unmapped(parameters), plan)
    computed = sum(collect(futures, "features (shards)", len(plan)))
    stages.features.finish(plan)
    if computed < len(plan):
        print(f"features: {len(plan) - computed} of {len(plan)} shards were there already")


if __name__ == "__main__":
    command(features)
