"""Draw the report: ``python -m flows.report``."""

import os
from pathlib import Path

from flows.process import command, timings
from flows.stages import report
from opnp.pipeline import parameters, records
from opnp.pipeline.results import Run
from opnp.workspace import Workspace

__all__ = ["report"]

if __name__ == "__main__":
    command("report")
    # Under `dvc repro` this is the last stage, so the run is whole; `flows.pipeline` does the same.
    if "DVC_ROOT" in os.environ:
        workspace = Workspace(Path.cwd())
        run = Run(workspace, parameters.load(workspace.parameters))
        records.record_run(run, timings())
