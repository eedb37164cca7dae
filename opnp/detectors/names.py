"""The one list of detectors: a row for each, and what follows from its name.

A detector of pytorch-ood needs a row here and a maker in `opnp.detectors.zoo`. One of our own needs
a file in this room with its maker, a row here that names the file, and a test. A detector of yours
needs neither: its name is ``module:factory``. ``opnp+X`` is a detector X on a pruned model, and
``A&B`` the fusion of A and B (see `opnp.detectors.fusion`).

Importing this module is cheap. The module of a detector, and with it pytorch-ood, is imported when
the detector is made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from opnp.errors import InputError, did_you_mean, first_line

if TYPE_CHECKING:
    from pytorch_ood.api import Detector

    from opnp.detectors.base import TrainedModel

__all__ = [
    "DETECTORS",
    "FUSED",
    "Row",
    "alone",
    "check",
    "detector_name",
    "label",
    "maker",
    "ours",
    "parts",
    "unpruned",
]

Takes = Literal["logits", "features", "images", "search"]

COMBINED = "opnp+"
FUSED = "&"


@dataclass(frozen=True)
class Row:
    """A detector.

    Attributes:
        key: its name in parameters and files.
        name: its name as papers print it.
        takes: what it scores: logits, penultimate features or images; or ``search``, if it is what
            the mask search chose for one of its methods.
        unpruned: of a choice of the search that may prune, the detector that it is where it prunes
            nothing.
        module: where its maker is, in a dictionary ``MAKERS`` by key. A maker takes a
            `opnp.detectors.base.TrainedModel` and returns a detector.
    """

    key: str
    name: str
    takes: Takes
    module: str = "opnp.detectors.zoo"
    unpruned: str | None = None


DETECTORS = {
    row.key: row
    for row in (
        Row("msp", "MSP", "logits"),
        Row("maxlogit", "MaxLogit", "logits"),
        Row("energy", "Energy", "logits"),
        Row("gen", "GEN", "logits"),
        Row("klmatching", "KL matching", "logits"),
        Row("react", "ReAct", "features"),
        Row("dice", "DICE", "features"),
        Row("ash", "ASH", "features"),
        Row("scale", "SCALE", "features"),
        Row("vra", "VRA", "features"),
        Row("she", "SHE", "features", "opnp.detectors.she"),
        Row("knn", "KNN", "features", "opnp.detectors.knn"),
        Row("mahalanobis", "Mahalanobis", "features", "opnp.detectors.mahalanobis"),
        Row("rmd", "RMD", "features", "opnp.detectors.mahalanobis"),
        Row("vim", "ViM", "features"),
        Row("gmm", "GMM", "features", "opnp.detectors.gmm"),
        Row("fdbd", "fDBD", "features"),
        Row("nci", "NCI", "features"),
        Row("nnguide", "NNGuide", "features"),
        Row("lts", "LTS", "features"),
        Row("openmax", "OpenMax", "logits"),
        Row("nero", "NERO", "features", "opnp.detectors.nero"),
        Row("odin", "ODIN", "images"),
        Row("gradnorm", "GradNorm", "features", "opnp.detectors.gradnorm"),
        Row("rankfeat", "RankFeat", "images"),
        Row("mahalanobis++", "Mahalanobis++", "features", "opnp.detectors.mahalanobis"),
        Row("rmd++", "RMD++", "features", "opnp.detectors.mahalanobis"),
        Row("cadref", "CADRef", "features", "opnp.detectors.cadref"),
        Row("core", "CORE", "features", "opnp.detectors.core"),
        Row("itp", "ITP", "features", "opnp.detectors.itp"),
        Row("kpca", "KPCA", "features", "opnp.detectors.kpca"),
        Row("line", "LINe", "features", "opnp.detectors.line"),
        Row("nac", "NAC", "features", "opnp.detectors.nac"),
        Row("optfs", "OptFS", "features", "opnp.detectors.optfs"),
        Row("ras", "RAS", "features", "opnp.detectors.ras"),
        Row("spcp", "SPCP", "features", "opnp.detectors.spcp"),
        Row("clip", "Clip", "search", "opnp.detectors.searched"),
        Row("opp", "OPP", "search", "opnp.detectors.searched", "energy"),
        Row("onp", "ONP", "search", "opnp.detectors.searched", "energy"),
        Row("opnp", "OPNP", "search", "opnp.detectors.searched", "energy"),
        Row("opnp+react", "OPNP+ReAct", "search", "opnp.detectors.searched", "clip"),
    )
}


def alone(name: str) -> str:
    """The detector X of a combination ``opnp+X``; any other name stays as it is."""
    return name if name in DETECTORS else name.removeprefix(COMBINED)


def parts(name: str) -> list[str]:
    """The detectors that a fusion ``A&B`` joins; any other name is the only one."""
    return name.split(FUSED)


def detector_name(name: str) -> str:
    """A detector's name as papers print it; a detector of the user's keeps its own name."""
    if FUSED in name:
        return " & ".join(map(detector_name, parts(name)))
    key = alone(name)
    printed = DETECTORS[key].name if key in DETECTORS else key
    return printed if key == name else f"OPNP+{printed}"


def unpruned(name: str) -> str:
    """The detector that one of ours is where it prunes nothing; any other is itself.

    >>> unpruned("opnp+vim"), unpruned("opnp&vim"), unpruned("vim")
    ('vim', 'energy&vim', 'vim')
    """
    if FUSED in name:
        return FUSED.join(map(unpruned, parts(name)))
    return (DETECTORS[name].unpruned if name in DETECTORS else None) or alone(name)


def label(name: str, pruned: float | None, same: str | None = None) -> str:
    """A detector's printed name; one that might have pruned but did not says so.

    Without pruning, OPNP+ViM is ViM, and no method of ours.

    Args:
        name: of the detector.
        pruned: percent of the head's weights that it prunes; None if it is not one that prunes.
        same: the detector whose scores it has, since it prunes nothing.

    >>> label("opnp+vim", 0.0, "vim"), label("opp", 0.0), label("opp", 1.0)
    ('OPNP+ViM = ViM', 'OPP (nothing pruned)', 'OPP')
    """
    if same is not None:
        return f"{detector_name(name)} = {detector_name(same)}"
    return detector_name(name) + " (nothing pruned)" * (pruned == 0)


def ours(name: str) -> bool:
    """Whether a detector may prune by sensitivity: OPP, ONP, OPNP, or a combination with OPNP."""
    return unpruned(name) != name


def check(name: str) -> None:
    """Refuse a name that no detector has.

    A name ``module:factory`` imports the module, which runs its code.

    Raises:
        InputError: there is no such detector, the module cannot be imported, or it holds no such
            function.
    """
    if FUSED in name:
        if len(set(parts(name))) < len(parts(name)):
            raise InputError(f"The fusion {name!r} names a detector twice.")
        for part in parts(name):
            check(part)
        return
    key = alone(name)
    if ":" in key:
        factory(key)
    elif key not in DETECTORS or (key != name and DETECTORS[key].takes == "search"):
        raise unknown(name)


def maker(key: str) -> "Callable[[TrainedModel], Detector]":
    """The function that makes a detector for a trained model.

    It raises `opnp.errors.UnavailableError` if the model lacks what the detector needs.

    Args:
        key: of a row, or ``module:factory``.

    Raises:
        InputError: there is no such detector.
    """
    if ":" in key:
        return factory(key)
    if key not in DETECTORS:
        raise unknown(key)
    found: Callable[[TrainedModel], Detector] = import_module(DETECTORS[key].module).MAKERS[key]
    return found


def unknown(name: str) -> InputError:
    return InputError(f"There is no detector {name!r}; {did_you_mean(alone(name), DETECTORS)}")


def factory(spec: str) -> Callable[..., Any]:
    """The function that ``module:factory`` names."""
    place, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*place.split("."), name]):
        raise InputError(
            f"The detector {spec!r} is not of the form module:factory: give the name of a module "
            "and of a function in it."
        )
    try:
        module = import_module(place)
    except Exception as error:  # a module of the user's may raise anything
        raise InputError(
            f"The detector {spec} cannot be imported ({first_line(error)}): correct its module, or "
            "put it where Python finds it."
        ) from error
    if not callable(found := getattr(module, name, None)):
        what = "is not a function" if hasattr(module, name) else "does not exist"
        raise InputError(f"The detector {spec} {what}: name a function of the module {place}.")
    return found
