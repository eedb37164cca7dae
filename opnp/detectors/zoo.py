"""Detectors by name, and how to fit and score any pytorch-ood detector on what was cached.

Adding a detector is one line in `DETECTORS`. What a detector is given follows from its class in
pytorch-ood: logits, penultimate features, the same features as 1 × 1 feature maps, or images.
"""

import copy
from collections.abc import Callable
from difflib import get_close_matches

from pytorch_ood.api import Detector, FeaturesDetector
from pytorch_ood.detector import (
    ASH,
    DICE,
    GEN,
    GMM,
    KNN,
    LTS,
    NACUE,
    NCI,
    ODIN,
    RMD,
    SCALE,
    SHE,
    VRA,
    EnergyBased,
    GradNorm,
    KLMatching,
    Mahalanobis,
    MaxLogit,
    MaxSoftmax,
    NNGuide,
    OpenMax,
    RankFeat,
    ReAct,
    ViM,
    fDBD,
)
from torch import Tensor, nn

from opnp.backbones.backbone import Classifier
from opnp.detectors.base import TrainedModel, layers_of, rows_at_once
from opnp.detectors.nero import NERO
from opnp.errors import InputError
from opnp.pruning.energy import bias_of

__all__ = ["DETECTORS", "by_name"]


class LastLayerGradNorm(GradNorm, FeaturesDetector):
    """GradNorm on features: the paper's gradient is that of the last layer's weight alone."""

    def __init__(self, head: nn.Linear):
        # A copy, because gradients of single samples call it under vmap, which no hook outlives.
        super().__init__(copy.deepcopy(head), lambda name: name == "weight", rows_at_once(head))

    def predict_features(self, x: Tensor) -> Tensor:
        """Outlier scores (N,) of features (N, L)."""
        return self.predict(x)


def last_blocks(classifier: Classifier, count: int = 3) -> list[nn.Module]:
    """The ends of the last stages of an encoder, taking the blocks to be spread evenly on them."""
    layers = layers_of(classifier.encoder)
    blocks = [layer for layer in layers if next(layer.children(), None) is not None] or layers
    return blocks[:: -max(1, len(blocks) // count)][:count][::-1]


def mean_of_places(z: Tensor) -> Tensor:
    """Activations (N, C) of a layer's neurons, from (N, C), (N, tokens, C) or (N, C, H, W)."""
    if z.ndim == 2:
        return z
    return z.mean(dim=1) if z.ndim == 3 else z.mean(dim=(2, 3))


def nac(model: TrainedModel) -> Detector:
    # A copy: NAC-UE leaves hooks behind when it fails, and needs gradients of activations.
    classifier = copy.deepcopy(model.whole()).requires_grad_()
    return NACUE(classifier, last_blocks(classifier), feature_reduce=mean_of_places)


DETECTORS: dict[str, Callable[[TrainedModel], Detector]] = {
    "msp": lambda m: MaxSoftmax(None, t=m.temperature),
    "maxlogit": lambda m: MaxLogit(None),
    "energy": lambda m: EnergyBased(None, t=m.temperature),
    "gen": lambda m: GEN(None),
    "klmatching": lambda m: KLMatching(None),
    "react": lambda m: ReAct(None, m.head_of_maps, detector=m.energy),
    "dice": lambda m: DICE(None, m.head.weight, bias_of(m.head), p=0.9, detector=m.energy),
    "ash": lambda m: ASH(None, m.head_of_maps, detector=m.energy),
    "scale": lambda m: SCALE(None, m.head_of_maps, detector=m.energy),
    "vra": lambda m: VRA(None, m.head_of_maps, detector=m.energy),
    "she": lambda m: SHE(None, m.head),
    "knn": lambda m: KNN(None),
    "mahalanobis": lambda m: Mahalanobis(None),
    "rmd": lambda m: RMD(None),
    "vim": lambda m: ViM(None, max(1, m.head.in_features // 2), m.head.weight, bias_of(m.head)),
    "gmm": lambda m: GMM(None),
    "fdbd": lambda m: fDBD(None, m.head),
    "nci": lambda m: NCI(None, m.head),
    "nnguide": lambda m: NNGuide(None, m.head),
    "lts": lambda m: LTS(None, m.head, detector=m.energy),
    "openmax": lambda m: OpenMax(None),
    "nero": lambda m: NERO(None, m.head),
    "odin": lambda m: ODIN(m.whole(), norm_std=list(m.std)),
    "gradnorm": lambda m: LastLayerGradNorm(m.head),
    "rankfeat": lambda m: RankFeat(*m.at_pooling(), detector=m.energy),
    "nac": nac,
}
"""Makers of detectors by name; each raises `UnavailableError` where the model lacks what it needs.

The papers are in ``info`` of each detector.
"""


def by_name(name: str) -> Callable[[TrainedModel], Detector]:
    """The maker of a detector.

    Raises:
        InputError: there is no such detector.
    """
    if name not in DETECTORS:
        near = get_close_matches(name, DETECTORS) or list(DETECTORS)
        raise InputError(f"There is no detector {name!r}: choose {' or '.join(map(repr, near))}.")
    return DETECTORS[name]
