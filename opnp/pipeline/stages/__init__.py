"""The stages of the pipeline: one module each, which writes what one stage makes.

Each module has ``run(workspace, parameters)``. What other stages have written it reads through
`opnp.pipeline.results`; no stage imports another.

Stages whose work is divided, `Divided`, also have the parts of ``run``, which `flows` runs as
Prefect tasks on many workers; ``run`` itself does the same in this process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from opnp.pipeline.parameters import Parameters
from opnp.pipeline.stages import evaluate, features, fetch, report, search, sensitivity, train
from opnp.workspace import Workspace

__all__ = [
    "DIVIDED",
    "Divided",
    "evaluate",
    "features",
    "fetch",
    "report",
    "search",
    "sensitivity",
    "train",
]


class Divided(Protocol):
    """A stage that makes one file for each part of its plan, on any worker, in any order."""

    def plan(self, workspace: Workspace, parameters: Parameters) -> Sequence[Any]:
        """The parts, in order."""

    def needed(self, workspace: Workspace, part: Any) -> Sequence[Path]:
        """The files that a worker must have in its workspace to compute a part."""

    def made(self, workspace: Workspace, part: Any) -> Path:
        """The file of a part."""

    def origin(self, workspace: Workspace, parameters: Parameters, part: Any) -> dict[str, Any]:
        """What a part is made from: the same origin gives the same file."""

    def compute(self, workspace: Workspace, parameters: Parameters, part: Any) -> bool:
        """Make the file of a part; False if it was there already, whole."""

    def finish(self, workspace: Workspace, planned: Sequence[Any]) -> object:
        """Put the parts together, and remove what is not in the plan."""


DIVIDED: dict[str, Divided] = {"features": features, "sensitivity": sensitivity}
