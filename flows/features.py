"""Compute penultimate features, one task for each shard."""

from collections.abc import Mapping
from pathlib import Path

from prefect import flow, task, unmapped
from prefect.cache_policies import NO_CACHE

from flows import transfer
from flows.process import collect, command, unless_bad_input
from opnp.backbones.shards import Shard, described
from opnp.pipeline import stages
from opnp.pipeline.parameters import Parameters
from opnp.workspace import BACKBONE, MANIFEST

__all__ = ["features"]


@task(tags=["gpu"], retries=2, retry_condition_fn=unless_bad_input, cache_policy=NO_CACHE)
def feature_shard(
    parameters: Parameters, shard: Shard, inputs: Mapping[Path, str]
) -> tuple[bool, str]:
    return transfer.compute(
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
    inputs = transfer.put(parameters, MANIFEST, BACKBONE)
    transfer.put_images(parameters)
    futures = feature_shard.map(unmapped(parameters), plan, unmapped(inputs))
    parts = collect(futures, "features (shards)", len(plan))
    computed = sum(transfer.bring(parameters, [shard.path for shard in plan], parts))
    stages.features.finish(plan)
    if computed < len(plan):
        print(f"features: {len(plan) - computed} of {len(plan)} shards were there already")


if __name__ == "__main__":
    command("features")
