"""The detectors of pytorch-ood: how each is made for a trained model.

What a detector is given follows from its class: logits, penultimate features, the same features as
1 × 1 feature maps, or images. The paper of a detector is in its ``info``. Where the library has no
values to try, or none that suit, ours stand here.
"""

from typing import Any, Self, TypeVar

from pytorch_ood.api import Detector
from pytorch_ood.detector import (
    ASH,
    DICE,
    GEN,
    LTS,
    NCI,
    ODIN,
    SCALE,
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
from pytorch_ood.utils import is_known
from torch import Tensor, nn

from opnp.detectors.base import Maker
from opnp.detectors.knn import NEIGHBOURS
from opnp.pruning.energy import bias_of

__all__ = ["MAKERS"]

Made = TypeVar("Made", bound=Detector)

TEMPERATURES = [0.5, 1.0, 2.0, 5.0, 10.0]


class GuidingNeighbours(NNGuide):
    """NNGuide with k at most the number of samples that it is fitted on."""

    hyperparameter_space = {"k": NEIGHBOURS}
    k: int

    def fit_features(self, z: Tensor, labels: Tensor, batch_size: int = 4096) -> Self:
        """Fit on features (N, L), and lower k to what they allow."""
        self.k = max(1, min(self.k, int(is_known(labels).sum())))
        return super().fit_features(z, labels, batch_size)


class TemperedRankFeat(RankFeat):
    """RankFeat with the temperature of its energy as a hyperparameter."""

    hyperparameter_space = {"temperature": TEMPERATURES}

    def __init__(self, backbone: nn.Module, head: nn.Module, temperature: float):
        """
        Args:
            backbone: maps images to feature maps (N, C, H, W).
            head: maps feature maps to logits (N, K).
            temperature: T of the energy.
        """
        super().__init__(backbone, head, self._energy)
        self.temperature = temperature

    def _energy(self, logits: Tensor) -> Tensor:
        return EnergyBased.score(logits, t=self.temperature)


def tried(detector: Made, **space: list[Any]) -> Made:
    """The detector, with these values of its hyperparameters to try."""
    detector.hyperparameter_space = space
    return detector


MAKERS: dict[str, Maker] = {
    "msp": lambda m: tried(MaxSoftmax(None, t=m.temperature), t=TEMPERATURES),
    "maxlogit": lambda m: MaxLogit(None),
    "energy": lambda m: tried(EnergyBased(None, t=m.temperature), t=TEMPERATURES),
    "gen": lambda m: GEN(None),
    "klmatching": lambda m: KLMatching(None),
    "react": lambda m: tried(
        ReAct(None, m.head_of_maps, detector=m.energy),
        percentile=[0.8, 0.85, 0.9, 0.95, 0.975, 0.99],
    ),
    "dice": lambda m: DICE(None, m.head.weight, bias_of(m.head), p=0.9, detector=m.energy),
    "ash": lambda m: ASH(None, m.head_of_maps, detector=m.energy),
    "scale": lambda m: SCALE(None, m.head_of_maps, detector=m.energy),
    "vra": lambda m: VRA(None, m.head_of_maps, detector=m.energy),
    "vim": lambda m: ViM(None, max(1, m.head.in_features // 2), m.head.weight, bias_of(m.head)),
    "fdbd": lambda m: fDBD(None, m.head),
    "nci": lambda m: NCI(None, m.head),
    "nnguide": lambda m: GuidingNeighbours(None, m.head),
    "lts": lambda m: tried(
        LTS(None, m.head, detector=m.energy), p=[0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5]
    ),
    "openmax": lambda m: OpenMax(None),
    "odin": lambda m: ODIN(m.whole(), norm_std=list(m.std)),
    "rankfeat": lambda m: TemperedRankFeat(*m.at_pooling(), m.temperature),
}
"""Makers by key; each raises `UnavailableError` if the model lacks what the detector needs."""
