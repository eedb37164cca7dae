"""Report: everything found, drawn into one self-contained page."""

from pathlib import Path

from opnp.pipeline.parameters import Parameters
from opnp.pipeline.results import Run
from opnp.runtime.files import atomic
from opnp.workspace import Workspace


def run(workspace: Workspace, parameters: Parameters) -> Path:
    """Draw everything found into one self-contained page.

    Raises:
        InputError: a file of the run is missing, damaged, or made with something else.
    """
    from opnp.pipeline.report.page import render

    page = render(Run(workspace, parameters))
    with atomic(workspace.report) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return workspace.report
