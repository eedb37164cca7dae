"""The detector that a finished run makes: its backbone, mask and threshold as a folder."""

from opnp.deployment.detector import SavedDetector
from opnp.deployment.record import record
from opnp.errors import InputError
from opnp.pipeline.results import Run
from opnp.pruning import methods
from opnp.pruning.candidates import Candidate, setting_of
from opnp.runtime import devices

__all__ = ["from_run"]

METHOD = "opnp+react"  # the choice among everything that the search tried, clipped or not


def from_run(run: Run, accept: float = 95.0, method: str = METHOD) -> SavedDetector:
    """The detector of a run that has finished `search`; no image is read.

    Args:
        run: the run.
        accept: percent of ID validation images that the threshold accepts.
        method: whose choice to take: ``opp``, ``onp``, ``opnp``, or ``opnp+react``, which may clip;
            or ``clip``, which prunes nothing.

    Raises:
        InputError: a file is missing, damaged, or made with something else.
    """
    if method not in methods.METHODS:
        raise InputError(
            f"There is no method {method!r}: choose from {', '.join(methods.METHODS)}."
        )
    parameters, found = run.parameters, run.search
    h, _ = run.features("validation")
    candidate = Candidate.stated(found[method])
    chosen = setting_of(run.sensitivities, candidate)
    backbone, mask = run.backbone, candidate.mask(chosen)
    validation = run.manifest.sets["validation"]
    source = parameters.data.id
    made = record(
        "the pipeline",
        found,
        method,
        images=found["validation_samples"],
        max_accuracy_drop=parameters.search.max_accuracy_drop,
        train=(source, found["training_samples"]),
        validation={
            "source": source,
            "images": len(h),
            "labels": "of the data",
            "sha256": validation.sha256,
        },
        unreadable=validation.unreadable,
        seed=parameters.seed,
        method=method,
        backbone=run.backbone_stated.sha256,
    )
    with devices.deterministic(threads=1):
        return SavedDetector.of(backbone, mask, candidate, chosen, h, made, accept)
