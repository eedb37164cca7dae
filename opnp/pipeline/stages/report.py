"""Report: everything found, drawn into one self-contained page."""

from pathlib import Path

from opnp import workspace
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.stages import fetch
from opnp.runtime.files import atomic


def run(parameters: Parameters) -> Path:
    """Draw everything found into one self-contained page."""
    from opnp.pipeline.report.page import render

    fetch.manifest_of(parameters)
    page = render(parameters)
    with atomic(workspace.REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return workspace.REPORT
