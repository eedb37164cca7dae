"""NAC-UE of pytorch-ood, on the layers that the paper looks at."""

import copy

from pytorch_ood.api import Detector
from pytorch_ood.detector import NACUE
from torch import Tensor, nn

from opnp.backbones.backbone import Classifier
from opnp.detectors.base import Maker, TrainedModel, layers_of

__all__ = ["last_blocks"]


def last_blocks(classifier: Classifier, count: int = 3) -> list[nn.Module]:
    """The last blocks of an encoder's final stages, the last stage at the end.

    An encoder does not say where its stages end, so its blocks are divided into ``count`` stages of
    equal length.

    Args:
        classifier: its encoder is a sequence of layers, some of which are blocks.
        count: number of stages.
    """
    layers = layers_of(classifier.encoder)
    blocks = [layer for layer in layers if next(layer.children(), None) is not None] or layers
    return blocks[:: -max(1, len(blocks) // count)][:count][::-1]


def mean_of_places(z: Tensor) -> Tensor:
    """Activations (N, C) of a layer's neurons, from (N, C), (N, tokens, C) or (N, C, H, W)."""
    if z.ndim == 2:
        return z
    return z.mean(dim=1) if z.ndim == 3 else z.mean(dim=(2, 3))


def nac(model: TrainedModel) -> Detector:
    """NAC-UE on the last blocks of a classifier.

    Raises:
        UnavailableError: there is no whole classifier.

    Source: Liu et al., "Neuron Activation Coverage: Rethinking Out-of-distribution Detection and
    Generalization", ICLR 2024, arXiv 2306.02879.
    """
    # NACUE leaves its hooks behind when it fails, and needs gradients of activations: work on a
    # copy of the classifier.
    classifier = copy.deepcopy(model.whole()).requires_grad_()
    return NACUE(classifier, last_blocks(classifier), feature_reduce=mean_of_places)


MAKERS: dict[str, Maker] = {"nac": nac}
