"""Report: everything found, drawn into one self-contained page."""

from pathlib import Path

from opnp import artifacts
from opnp.files import atomic
from opnp.parameters import Parameters
from opnp.stages import fetch


def run(parameters: Parameters) -> Path:
    """Draw everything found into one self-contained page."""
    from opnp.report import render

    fetch.manifest_of(parameters)
    page = render(parameters)
    with atomic(artifacts.REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return artifacts.REPORT
