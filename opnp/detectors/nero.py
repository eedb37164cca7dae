"""NERO: how far the relevance of the penultimate neurons lies from that of the training classes.

For features h (L,), logits z = W h + b and p = softmax(z), layer-wise relevance propagation from
the class probabilities gives neuron j, and the bias as one more neuron of activation 1,

    R_j = Σ_c p_c W_cj h_j / z_c = h_j · Σ_c (p_c / z_c) W_cj        R_b = Σ_c p_c b_c / z_c

which sum to Σ_c p_c = 1. With r the projection of R on its principal components over the training
samples, μ_y the mean of r over those of label y, and D(x) = min_y ‖r(x) − μ_y‖₁, the score is

    (D(x) + |R_b(x)| · mean D / mean |R_b|) · ‖h_low‖₁ / ‖h‖₁                 (larger means OOD)

where the means are over the training samples and h_low are the features of lowest relevance.

Source: Chhetri et al., "NERO: Explainable Out-of-Distribution Detection with Neuron-level
Relevance", MICCAI 2025, arXiv 2506.15404.

From the authors' code (github.com/bhattarailab/NERO): centroids by label, two thirds of the
components, relevance ranked with its sign, the lowest 175 of ResNet-18's 512 features (34 %).
Decided here: the authors divide by z_c as it is, here ε with the sign of z_c is added (the LRP-ε
rule), since otherwise one logit of 1e-6 outweighs all other samples; their mean D is of relevances
not projected and joined by that of the bias, here it is of the score's own D, so that both terms
weigh the same on training samples; where h is zero the share of its norm is 1, the largest.
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from pytorch_ood.api import (
    DetectorInfo,
    FeaturesDetector,
    ModelNotSetException,
    Paper,
    RequiresFittingException,
    Task,
)
from pytorch_ood.utils import extract_features, is_known
from torch import Tensor, nn

from opnp.detectors.base import Maker
from opnp.errors import InputError
from opnp.pruning.energy import bias_of, check_head, logits

__all__ = ["NERO", "relevance"]

BATCH = 1024  # rows of features whose relevance is computed at once in fitting


@torch.no_grad()
def relevance(
    features: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Relevance of each neuron, and of the bias, for the class probabilities.

    The sum of both is Σ_c p_c |z_c| / (|z_c| + ε), which is 1 but for ε.

    Args:
        features: h, shape (N, L), any floating dtype.
        weight: W, shape (K, L).
        bias: b, shape (K,).
        epsilon: ε > 0, added to each logit with the logit's sign before dividing by it.

    Returns:
        R, shape (N, L), and R_b, shape (N,), float64, on the device of ``features``.

    Raises:
        InputError: shapes disagree or values are not finite.

    Source: Chhetri et al., arXiv 2506.15404; the ε rule: Bach et al., "On Pixel-Wise Explanations
    for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation", PLOS ONE 2015, Eq. 58.

    >>> neurons, rest = relevance(torch.rand(9, 8), torch.randn(3, 8), torch.randn(3))
    >>> neurons.shape, rest.shape
    (torch.Size([9, 8]), torch.Size([9]))
    """
    check_head(features, weight, bias)
    h = features.double()
    weight, bias = weight.to(h), bias.to(h)
    z = logits(h, weight, bias)
    p_by_z = z.softmax(dim=1) / (z + torch.full_like(z, epsilon).copysign(z))
    return h * (p_by_z @ weight), p_by_z @ bias  # no (N, K, L) of single terms is ever held


class NERO(FeaturesDetector):
    """Distance of a sample's neuron relevance to the nearest class, see the module's formulas.

    Source: Chhetri et al., "NERO: Explainable Out-of-Distribution Detection with Neuron-level
    Relevance", MICCAI 2025, arXiv 2506.15404.

        detector = NERO(model.encoder, model.head).fit(train_loader)
        scores = detector.predict(images)
        neurons, bias = detector.relevance(model.encoder(images))  # what the scores rest on
    """

    info = DetectorInfo(
        paper=Paper(
            title="NERO: Explainable Out-of-Distribution Detection with Neuron-level Relevance",
            venue="MICCAI",
            year=2025,
            url="https://arxiv.org/abs/2506.15404",
            code="https://github.com/bhattarailab/NERO",
        ),
        tasks={Task.CLASSIFICATION},
    )

    requires_fit = True

    #: Search space for `pytorch_ood.utils.GridSearch`, in shares of the features.
    hyperparameter_space = {"components": [1 / 3, 2 / 3, 1.0], "lowest": [0.1, 0.34, 0.67]}

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        components: float = 2 / 3,
        lowest: float = 0.34,
        epsilon: float = 1e-3,
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
            components: principal components kept, as a share of L in (0, 1]; never more than the
                training samples can span.
            lowest: features that count as of lowest relevance, as a share of L in (0, 1].
            epsilon: keeps the division by a logit near zero finite.

        Raises:
            InputError: a share or epsilon is out of range.
        """
        self.encoder = encoder
        self.head = copy.deepcopy(head).requires_grad_(False)
        self.components = components
        self.lowest = lowest
        self.epsilon = epsilon
        self.basis: Tensor | None = None  # (L, d), float64
        self.centroids: Tensor | None = None  # (classes, d), float64
        self.bias_scale = 0.0
        self._check()

    def _check(self) -> None:
        for name in ("components", "lowest"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise InputError(f"{name}={value} is no share of the features: give one in (0, 1].")
        if not 0 < self.epsilon < float("inf"):
            raise InputError(f"epsilon={self.epsilon} is not positive.")

    def set_hyperparameters(self, **kwargs: Any) -> Self:
        """Set shares; ``components`` counts from the next fit on, ``lowest`` at once.

        Raises:
            InputError: a share is out of range.
        """
        super().set_hyperparameters(**kwargs)
        self._check()
        return self

    def _count(self, share: float) -> int:
        return max(1, int(share * self.head.in_features))

    def relevance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance (N, L) of each neuron and (N,) of the bias, float64, of features (N, L).

        Raises:
            InputError: features are not finite or of another width.
        """
        x = x.to(self.head.weight.device)
        return relevance(x, self.head.weight, bias_of(self.head), self.epsilon)

    def fit(self, data_loader: Any) -> Self:
        """Fit centroids and components on a loader of ``(x, y)``.

        Samples with labels below zero are ignored.

        Raises:
            ModelNotSetException: there is no encoder.
            ValueError: the loader has no ID samples.
        """
        if self.encoder is None:
            raise ModelNotSetException
        device = self.device or torch.device("cpu")
        return self.fit_features(*extract_features(data_loader, self.encoder, device))

    @torch.no_grad()
    def fit_features(self, x: Tensor, y: Tensor) -> Self:
        """Fit centroids and components on features (N, L); their relevances take 8·N·L bytes.

        Args:
            x: penultimate features of the training samples.
            y: labels (N,), any integers; samples with labels below zero are ignored.

        Raises:
            InputError: no sample is ID, there is not one label a sample, or features are not
                finite or of another width.
        """
        if y.shape != x.shape[:1]:
            raise InputError(
                f"NERO needs one label for each row of features {tuple(x.shape)}, not "
                f"{tuple(y.shape)}."
            )
        known = is_known(y)
        if not known.any():
            raise InputError("NERO cannot be fitted: no sample has a label of zero or above.")
        x, y = x[known.to(x.device)], y[known].to(self.head.weight.device)
        parts = [self.relevance(h) for h in x.split(BATCH)]
        neurons, bias = (torch.cat(column) for column in zip(*parts, strict=True))

        centred = neurons - neurons.mean(dim=0)
        _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending; exact, unlike a random SVD
        kept = max(1, min(self._count(self.components), len(x) - 1))
        self.basis = vectors[:, -kept:]
        # The mean of the projections is the projection of the mean; so is its origin, which cancels
        # in every distance.
        means = torch.stack([neurons[y == label].mean(dim=0) for label in y.unique()])
        self.centroids = means @ self.basis

        size = float(bias.abs().mean())
        self.bias_scale = float(self._distance(neurons).mean()) / size if size else 0.0
        return self

    def _distance(self, neurons: Tensor) -> Tensor:
        """D, shape (N,), of relevances (N, L)."""
        if self.basis is None or self.centroids is None:
            raise RequiresFittingException
        return torch.cdist(neurons @ self.basis, self.centroids, p=1).amin(dim=1)

    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores (N,) of inputs; larger means OOD.

        Raises:
            ModelNotSetException: there is no encoder.
            RequiresFittingException: it was not fitted.
        """
        if self.encoder is None:
            raise ModelNotSetException
        return self.predict_features(self.encoder(x if self.device is None else x.to(self.device)))

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Outlier scores (N,), at least float32, of features (N, L); larger means OOD.

        Raises:
            RequiresFittingException: it was not fitted.
            InputError: features are not finite or of another width.
        """
        if self.basis is None:
            raise RequiresFittingException
        neurons, bias = self.relevance(x)
        size = x.double().abs()
        low = neurons.argsort(dim=1, stable=True)[:, : self._count(self.lowest)]
        norm = size.sum(dim=1)
        share = torch.where(norm > 0, size.gather(1, low).sum(dim=1) / norm, 1.0)
        scores = (self._distance(neurons) + self.bias_scale * bias.abs()) * share
        return scores.to(torch.promote_types(x.dtype, torch.float32))


MAKERS: dict[str, Maker] = {"nero": lambda m: NERO(None, m.head)}
