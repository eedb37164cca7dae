"""The stages of the pipeline, from parameters and files to files: one module each.

Each has ``run(parameters)``; those whose work is divided also have ``plan``, what there is to do,
``compute``, one part of it, and what puts the parts together. `flows/` runs the parts as Prefect
tasks; ``run`` does the same in this process.
"""

from opnp.pipeline.stages import evaluate, features, fetch, report, search, sensitivity, train

__all__ = ["evaluate", "features", "fetch", "report", "search", "sensitivity", "train"]
