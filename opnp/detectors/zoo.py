"""The detectors of pytorch-ood: how each is made for a trained model.

What a detector is given follows from its class: logits, penultimate features, the same features as
1 × 1 feature maps, or images. The paper of a detector is in its ``info``.
"""

from pytorch_ood.detector import (
    ASH,
    DICE,
    GEN,
    GMM,
    KNN,
    LTS,
    NCI,
    ODIN,
    SCALE,
    SHE,
    VRA,
    EnergyBased,
    KLMatching,
    MaxLogit,
    MaxSoftmax,
    NNGuide,
    OpenMax,
    RankFeat,
    ReAct,
    ViM,
    fDBD,
)

from opnp.detectors.base import Maker
from opnp.pruning.energy import bias_of

__all__ = ["MAKERS"]


MAKERS: dict[str, Maker] = {
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
    "vim": lambda m: ViM(None, max(1, m.head.in_features // 2), m.head.weight, bias_of(m.head)),
    "gmm": lambda m: GMM(None),
    "fdbd": lambda m: fDBD(None, m.head),
    "nci": lambda m: NCI(None, m.head),
    "nnguide": lambda m: NNGuide(None, m.head),
    "lts": lambda m: LTS(None, m.head, detector=m.energy),
    "openmax": lambda m: OpenMax(None),
    "odin": lambda m: ODIN(m.whole(), norm_std=list(m.std)),
    "rankfeat": lambda m: RankFeat(*m.at_pooling(), detector=m.energy),
}
"""Makers by key; each raises `UnavailableError` if the model lacks what the detector needs."""
