"""Compute penultimate features, one task for each shard."""

from collections.abc import Mapping
from pathlib import Path

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE

from flows import exchange
from flows.stage import collect, command, unless_bad_input
from opnp import stages
from opnp.artifacts import BACKBONE, MANIFEST
from opnp.features import Shard, described
from opnp.parameters import Parameters

__all__ = ["features"]


@task(tags=["gpu"], retries=2, retry_condition_fn=unless_bad_input, cache_policy=NO_CACHE)
def feature_shard(
    parameters: Parameters, shard: Shard, inputs: Mapping[Path, str]
) -> tuple[bool, str]:
    return exchange.compute(
        parameters,
        inputs,
        shard.path,
        lambda: described(shard, stages.features.origin_of(parameters, shard)),
        lambda: stages.features.compute(parameters, shard),
    )


@flow
def features(parameters: Parameters) -> None:
    """Compute the features of every split and proxy family; shards that are whole stay."""
    plan = stages.features.plan(parameters)
    inputs = exchange.put(parameters, MANIFEST, BACKBONE)
    exchange.put_images(parameters)
    futures = feature_shard.map(unmapped(parameters), plan, unmapped(inputs))
    parts = collect(futures, "features (shards)", len(plan))
    computed = sum(exchange.bring(parameters, [shard.path for shard in plan], parts))
    stages.features.finish(plan)
    if computed < len(plan):
        print(f"features: {len(plan) - computed} of {len(plan)} shards were there already")


if __name__ == "__main__":
    command(features)
