"""LINe: only the neurons and weights that matter for the predicted class speak.

The importance of neuron j for class c is its first-order Taylor value (a Shapley value of a linear
head), the mean of h_j ∂f_c/∂h_j over the training samples of label c,

    v_cj = W_cj · E[h_j | c].

For a sample of predicted class c, neurons among the lowest p_a % of v_c are removed, then weights
among the lowest p_w % of |v_cj| W_ij over all i and j; features are clipped from above first. The
score is the energy of what is left.

Source: Ahn et al., "LINe: Out-of-Distribution Detection by Leveraging Important Neurons", CVPR
2023, arXiv 2303.13995. From the authors' code: values by label and with their sign; (p_w, p_a) of
(10, 10) on ImageNet, (90, 90) on CIFAR-10 and (90, 10) on CIFAR-100, with features clipped at 0.8
and 1.0. Decided here: the clip is a percentile of the training activations, since its value depends
on the network.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about, class_means
from opnp.detectors.itp import percentile

__all__ = ["LINe"]


class LINe(CachedDetector):
    """Leveraging important neurons; see the module's formulas."""

    info = about(
        "LINe: Out-of-Distribution Detection by Leveraging Important Neurons",
        "CVPR",
        2023,
        "https://arxiv.org/abs/2303.13995",
    )
    hyperparameter_space = {
        "weights": [0, 10, 50, 90],
        "neurons": [0, 10, 50, 90],
        "clip": [90, 95, 99, None],
    }
    fitted = ("means", "thresholds")

    means: Tensor | None  # E[h_j | c], (K, L)
    thresholds: dict[float, float] | None  # activation at each percentile of the space

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        weights: float = 10,
        neurons: float = 10,
        clip: float | None = 95,
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
            weights: p_w, percent of the weights to remove for a class.
            neurons: p_a, percent of the neurons to remove for a class.
            clip: percentile of the training activations to clip features at; None: do not clip.
        """
        super().__init__(encoder, head)
        self.weights = weights
        self.neurons = neurons
        self.clip = clip

    def _fit(self, h: Tensor, y: Tensor) -> None:
        self.means, _ = class_means(h, y, self.head.out_features)
        wanted = [*self.hyperparameter_space["clip"], self.clip]
        self.thresholds = {each: percentile(h, each) for each in wanted if each is not None}

    def _score(self, h: Tensor) -> Tensor:
        assert self.means is not None
        assert self.thresholds is not None
        if self.clip is not None:
            h = h.clamp(max=self.thresholds[self.clip])
        predicted = self.logits(h).argmax(dim=1)
        values, energies = self.weight * self.means, h.new_empty(len(h))
        for label in predicted.unique():
            rows = predicted == label
            value = values[label]
            weighted = value.abs() * self.weight  # (K, L)
            kept = (weighted > percentile(weighted, self.weights)) & (
                value > percentile(value, self.neurons)
            )
            logits = h[rows] @ torch.where(kept, self.weight, 0.0).T + self.bias
            energies[rows] = -logits.logsumexp(dim=1)
        return energies


MAKERS: dict[str, Maker] = {"line": lambda m: LINe(None, m.head)}
