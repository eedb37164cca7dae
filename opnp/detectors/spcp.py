"""SPCP at test time: the energy of a head whose contributions are clipped as while it was trained.

A backbone that is trained by shaping parameter contribution patterns learns a threshold λ with its
weights (`opnp.backbones.spcp`). Its authors clip at λ at test time, too:

    f_i = Σ_j min(W_ij h_j, λ) + b_i,        score = −T·logsumexp(f/T).

Source: Xu and Yang, "Shaping Parameter Contribution Patterns for Out-of-Distribution Detection",
AAAI 2026, arXiv 2603.07195; code github.com/njustkmg/AAAI2026-SPCP. Here this detector alone clips:
classification and all other detectors see the plain head that was trained.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from opnp.backbones.spcp import rectified
from opnp.detectors.base import Maker, TrainedModel
from opnp.detectors.cached import EncoderDetector, about
from opnp.errors import UnavailableError
from opnp.pruning.energy import energy_score

__all__ = ["SPCP"]


class SPCP(EncoderDetector):
    """The energy of contributions clipped at the threshold of SPCP training; see the module.

    >>> head = nn.Linear(2, 2, bias=False)
    >>> head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> clipped = SPCP(None, head, threshold=2.0).predict_features(torch.tensor([[1.0, 1.0]]))
    >>> torch.allclose(clipped, -torch.tensor([[1.0, 2.0]]).logsumexp(dim=1))
    True
    """

    info = about(
        "Shaping Parameter Contribution Patterns for Out-of-Distribution Detection",
        "AAAI",
        2026,
        "https://arxiv.org/abs/2603.07195",
        "https://github.com/njustkmg/AAAI2026-SPCP",
    )
    requires_fit = False

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        threshold: float,
        temperature: float = 1.0,
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
            threshold: λ.
            temperature: T of the energy.
        """
        super().__init__(encoder, head)
        self.threshold = threshold
        self.temperature = temperature

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Outlier scores (N,) of features (N, L); larger means OOD."""
        x = x.to(self.head.weight)
        logits = rectified(self.head, x, x.new_tensor(self.threshold))
        return -energy_score(logits, self.temperature)


def of_model(model: TrainedModel) -> SPCP:
    if model.spcp is None:
        raise UnavailableError(
            "SPCP needs a backbone that was trained with it here, and this one was not."
        )
    return SPCP(None, model.head, model.spcp, model.temperature)


MAKERS: dict[str, Maker] = {"spcp": of_model}
