"""How long each detector took in this workspace.

Times are no artifacts, since they differ from run to run: no stage depends on them, and a run
without them is whole. So each stage adds its own times to what is there, and what cannot be read
counts as not measured.
"""

import json

from opnp.runtime.files import write_json
from opnp.workspace import Workspace

__all__ = ["add_times", "read_times"]

Times = dict[str, dict[str, float]]


def read_times(workspace: Workspace) -> Times:
    """Times by detector: ``tune`` and ``fit`` in seconds, ``score`` in ms for 1,000 samples."""
    try:
        found = json.loads(workspace.times.read_text())
        return {str(name): {k: float(v) for k, v in of.items()} for name, of in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def add_times(workspace: Workspace, times: Times) -> None:
    """Add the times of detectors to those that were measured before."""
    before = read_times(workspace)
    write_json(workspace.times, before | {n: before.get(n, {}) | of for n, of in times.items()})
