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
    fitted = ("means", "threshold")
    at_once = frozenset({"weights", "neurons"})

    means: Tensor | None  # E[h_j | c], (K, L)
    threshold: float | None  # that features are clipped at; infinite if they are not

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
        # By class, p_w and p_a: what |v_cj| W_ij and v_cj must exceed.
        self.cuts: dict[tuple[int, float, float], tuple[float, float]] = {}
        self.weights = weights
        self.neurons = neurons
        self.clip = clip

    def _fit(self, h: Tensor, y: Tensor) -> None:
        self.means, _ = class_means(h, y, self.head.out_features)
        clip = self.clip
        self.threshold = float("inf") if clip is None else percentile(h, clip)
        self.cuts = {}

    def _kept(self, label: int, weight: Tensor) -> Tensor:
        """W, (K, L), with zeros where the weights and neurons of a class are removed."""
        assert self.means is not None
        value = weight[label] * self.means[label]
        weighted = value.abs() * weight
        key = label, self.weights, self.neurons
        if key not in self.cuts:  # a percentile of K·L values takes most of the time
            self.cuts[key] = percentile(weighted, self.weights), percentile(value, self.neurons)
        of_weights, of_neurons = self.cuts[key]
        return torch.where((weighted > of_weights) & (value > of_neurons), weight, 0.0)

    def _score(self, h: Tensor) -> Tensor:
        h = h.clamp(max=self.threshold)
        weight, bias = self.weight, self.bias
        predicted, energies = self.logits(h).argmax(dim=1), h.new_empty(len(h))
        for label in predicted.unique().tolist():
            rows = predicted == label
            logits = h[rows] @ self._kept(label, weight).T + bias
            energies[rows] = -logits.logsumexp(dim=1)
        return energies


MAKERS: dict[str, Maker] = {"line": lambda m: LINe(None, m.head)}
