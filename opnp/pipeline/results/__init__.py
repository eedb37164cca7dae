"""What the stages of a run have written: one module for each stage, joined by `Run`."""

from opnp.pipeline.results.run import Run

__all__ = ["Run"]
