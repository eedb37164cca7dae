"""OOD detectors on the same features, each tuned on the same proxies.

Adding a detector is one line in `DETECTORS`: any pytorch-ood detector of logits, features or
feature maps runs here, on cached features, through the three functions below.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from pytorch_ood.api import Detector, FeatureMapsDetector, FeaturesDetector, LogitsDetector
from pytorch_ood.detector import DICE, EnergyBased, MaxLogit, MaxSoftmax, ReAct
from torch import Tensor, nn

from opnp.energy import bias_of
from opnp.errors import InputError
from opnp.metrics import fpr95_auroc

__all__ = ["DETECTORS", "fit", "score", "tune"]

BATCH = 1024  # samples scored at once: DICE holds (BATCH, K, L) numbers

DETECTORS: dict[str, Callable[[nn.Linear, float], Detector]] = {
    "msp": lambda head, t: MaxSoftmax(None, t=t),
    "maxlogit": lambda head, t: MaxLogit(None),
    "energy": lambda head, t: EnergyBased(None, t=t),
    "react": lambda head, t: ReAct(nn.Identity(), head, detector=partial(EnergyBased.score, t=t)),
    "dice": lambda head, t: DICE(
        None, head.weight, bias_of(head), p=0.9, detector=partial(EnergyBased.score, t=t)
    ),
}
"""Detectors by name, made from a head (K, L) and the temperature of the energy."""


def fit(detector: Detector, features: Tensor, labels: Tensor) -> None:
    """Fit a detector on training features (N, L) and labels (N,), if it needs to be."""
    if not detector.requires_fit:
        return
    if isinstance(detector, FeaturesDetector):
        detector.fit_features(features, labels)
    elif isinstance(detector, FeatureMapsDetector):
        detector.fit_feature_maps(features, labels)
    else:
        raise InputError(f"{type(detector).__name__} cannot be fitted on penultimate features.")


@torch.no_grad()
def score(detector: Detector, head: nn.Linear, features: Tensor) -> Tensor:
    """Outlier scores (N,), larger = OOD, of features (N, L)."""
    if isinstance(detector, FeaturesDetector):
        predict = detector.predict_features
    elif isinstance(detector, FeatureMapsDetector):
        predict = detector.predict_feature_maps
    elif isinstance(detector, LogitsDetector):
        logits_detector = detector

        def predict(x: Tensor) -> Tensor:
            return logits_detector.predict_logits(head(x))

    else:
        raise InputError(f"{type(detector).__name__} cannot score penultimate features.")
    return torch.cat([predict(batch).double() for batch in features.split(BATCH)])


def tune(
    detector: Detector,
    head: nn.Linear,
    train: tuple[Tensor, Tensor],
    id_features: Tensor,
    outliers: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Choose a detector's hyperparameters as the mask search chooses percentages, and fit it.

    Each combination of its ``hyperparameter_space`` is judged by the mean FPR95 over the outlier
    sets, AUROC breaking ties.

    Args:
        detector: left fitted with the chosen values.
        head: of the classifier.
        train: training features (N, L) and labels (N,).
        id_features: ID validation features (N, L).
        outliers: features of each outlier set (N_i, L).

    Returns:
        The chosen values by name; empty for a detector without hyperparameters.
    """
    space = detector.hyperparameter_space
    sizes = [len(features) for features in outliers.values()]
    ranked: list[tuple[float, float, dict[str, Any]]] = []
    for values in product(*space.values()) if space else ():
        chosen = dict(zip(space, values, strict=True))
        detector.set_hyperparameters(**chosen)
        fit(detector, *train)
        ood = torch.cat([score(detector, head, features) for features in outliers.values()])
        fpr95, auroc = fpr95_auroc(score(detector, head, id_features), ood, sizes)
        ranked.append((round(float(fpr95.mean()), 9), -round(float(auroc.mean()), 9), chosen))
    best = min(ranked, key=lambda entry: entry[:2])[2] if ranked else {}
    detector.set_hyperparameters(**best)
    fit(detector, *train)
    return best
