"""Draw the report, one self-contained page."""

import os

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.process import command, timings
from opnp.pipeline import records, stages
from opnp.pipeline.parameters import Parameters, load

__all__ = ["report"]


@task(cache_policy=NO_CACHE)
def report_task(parameters: Parameters) -> None:
    stages.report.run(parameters)


@flow
def report(parameters: Parameters) -> None:
    """Draw the report, one self-contained page."""
    report_task(parameters)


if __name__ == "__main__":
    command("report")
    # Under `dvc repro` this is the last stage, so the run is whole; `flows.pipeline` does the same.
    if "DVC_ROOT" in os.environ:
        records.record_run(load(), timings())
