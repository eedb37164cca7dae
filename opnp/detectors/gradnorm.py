"""GradNorm on cached features: the gradient with respect to the last layer needs no backbone."""

import copy

from pytorch_ood.api import FeaturesDetector
from pytorch_ood.detector import GradNorm
from torch import Tensor, nn

from opnp.detectors.base import Maker, rows_at_once

__all__ = ["LastLayerGradNorm"]


class LastLayerGradNorm(GradNorm, FeaturesDetector):
    """Norm of the gradient of the last layer's weight, the gradient that the paper takes.

    Source: Huang et al., "On the Importance of Gradients for Detecting Distributional Shifts in the
    Wild", NeurIPS 2021, arXiv 2110.00218.
    """

    def __init__(self, head: nn.Linear):
        """
        Args:
            head: the classifier's last layer; a copy is kept.
        """
        # The head is copied: gradients of single samples call it under vmap, and hooks that others
        # put on the head do not survive that.
        super().__init__(copy.deepcopy(head), lambda name: name == "weight", rows_at_once(head))

    def predict_features(self, x: Tensor) -> Tensor:
        """Outlier scores (N,) of features (N, L); larger means OOD."""
        return self.predict(x)


MAKERS: dict[str, Maker] = {"gradnorm": lambda m: LastLayerGradNorm(m.head)}
