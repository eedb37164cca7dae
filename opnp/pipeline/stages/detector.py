"""Detector: the folder that a finished run's backbone, mask and threshold make."""

from opnp import workspace
from opnp.backbones.backbone import load_backbone
from opnp.deployment.detector import SavedDetector, provenance
from opnp.errors import InputError
from opnp.pipeline.parameters import Parameters
from opnp.pipeline.stages import features, fetch, search, sensitivity
from opnp.pruning import methods
from opnp.pruning.candidates import Candidate, setting_of
from opnp.runtime import devices
from opnp.runtime.files import digest

METHOD = "opnp+react"  # the choice among all that the search tried, clipped or not


def from_run(parameters: Parameters, accept: float = 95.0, method: str = METHOD) -> SavedDetector:
    """The detector of this workspace's run; it needs `search`, and no image.

    Args:
        parameters: of the run.
        accept: percent of ID validation images that the threshold accepts.
        method: whose choice: ``opp``, ``onp``, ``opnp``, or ``opnp+react``, which may clip.

    Raises:
        InputError: artifacts are missing, damaged, or made with other parameters.
    """
    if method not in methods.METHODS:
        raise InputError(
            f"There is no method {method!r}: choose from {', '.join(methods.METHODS)}."
        )
    found, measured = search.read(parameters), sensitivity.read(parameters)
    [(h, _)] = features.load(parameters, "validation")
    candidate = Candidate.stated(found[method])
    chosen = setting_of(measured, candidate)
    backbone = load_backbone(workspace.BACKBONE, parameters.train.backbone)
    mask = candidate.mask(chosen)
    validation = fetch.manifest_of(parameters).sets["validation"]
    made = provenance() | {
        "by": "the pipeline",
        "method": method,
        "search": found[method]
        | {key: found[key] for key in ("unpruned", "candidates", "proxies", "outliers")}
        | {
            "images": found["validation_samples"],
            "max_accuracy_drop": parameters.search.max_accuracy_drop,
        },
        "train": {"source": parameters.data.id, "images": found["training_samples"]},
        "validation": {
            "source": parameters.data.id,
            "images": len(h),
            "labels": "of the data",
            "sha256": validation.sha256,
        },
        "unreadable": validation.unreadable,
        "backbone": digest(workspace.BACKBONE),
        "seed": parameters.seed,
    }
    with devices.deterministic(threads=1):
        return SavedDetector.of(backbone, mask, candidate, chosen, h, made, accept)
