"""NERO: the distance between the relevance of a sample's neurons and that of the training classes.

Let h (L,) be the features, z = W h + b the logits and p = softmax(z). Layer-wise relevance
propagation from the class probabilities gives the relevance of neuron j, and that of the bias,
which counts as one more neuron of activation 1:

    R_j = Σ_c p_c W_cj h_j / z_c = h_j · Σ_c (p_c / z_c) W_cj        R_b = Σ_c p_c b_c / z_c

They sum to Σ_c p_c = 1. Let r be the projection of R on its principal components over the training
samples, μ_y the mean of r over the samples of label y, and D(x) = min_y ‖r(x) − μ_y‖₁. The score is

    (D(x) + |R_b(x)| · mean D / mean |R_b|) · ‖h_low‖₁ / ‖h‖₁                 (larger means OOD)

where the means are over the training samples and h_low are the features of lowest relevance.

Source: Chhetri et al., "NERO: Explainable Out-of-Distribution Detection with Neuron-level
Relevance", MICCAI 2025, arXiv 2506.15404.

Taken from the authors' code (github.com/bhattarailab/NERO): centroids by label, two thirds of the
components, relevance ranked with its sign, the lowest 175 of ResNet-18's 512 features (34 %).

Decided here:
- The authors divide by z_c. We first add ε with the sign of z_c (the LRP-ε rule), because otherwise
  one logit of 1e-6 outweighs all other samples.
- Their mean D is the distance of relevances that are not projected and include the bias. Ours is
  the mean of the D in the score, so that both terms weigh the same on training samples.
- If h is zero, ‖h_low‖₁ / ‖h‖₁ is taken to be 1, its largest value.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from opnp.detectors.base import Maker
from opnp.detectors.cached import CachedDetector, about
from opnp.errors import InputError
from opnp.pruning.energy import bias_of, check_head, logits

__all__ = ["NERO", "relevance"]

BATCH = 1024  # rows of features whose relevance is computed at once in fitting


@torch.no_grad()
def relevance(
    features: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Relevance of each neuron and of the bias for the class probabilities.

    Their sum is Σ_c p_c |z_c| / (|z_c| + ε), which approaches 1 as ε goes to 0.

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
    # This order of products needs no tensor (N, K, L) of single terms.
    return h * (p_by_z @ weight), p_by_z @ bias


class NERO(CachedDetector):
    """Distance of a sample's neuron relevance to the nearest class; formulas are in the module.

    Source: Chhetri et al., "NERO: Explainable Out-of-Distribution Detection with Neuron-level
    Relevance", MICCAI 2025, arXiv 2506.15404.

        detector = NERO(model.encoder, model.head).fit(train_loader)
        scores = detector.predict(images)
        neurons, bias = detector.relevance(model.encoder(images))  # what the scores are based on
    """

    info = about(
        "NERO: Explainable Out-of-Distribution Detection with Neuron-level Relevance",
        "MICCAI",
        2025,
        "https://arxiv.org/abs/2506.15404",
        "https://github.com/bhattarailab/NERO",
    )
    # As fractions of the features.
    hyperparameter_space = {"components": [1 / 3, 2 / 3, 1.0], "lowest": [0.1, 0.34, 0.67]}
    fitted = ("basis", "centroids")
    at_once = frozenset({"lowest"})

    basis: Tensor | None  # (L, d)
    centroids: Tensor | None  # (classes, d)
    bias_scale = 0.0

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
            encoder: maps inputs to penultimate features (N, L); None to take features only.
            head: the classifier's last layer; a copy is kept.
            components: number of principal components to keep, as a fraction of L in (0, 1]; at
                most as many as the training samples span.
            lowest: number of features that count as those of lowest relevance, as a fraction of L
                in (0, 1].
            epsilon: ε > 0, keeps the division by a logit near zero finite.

        Raises:
            InputError: a fraction or epsilon is out of range.
        """
        super().__init__(encoder, head)
        self.components = components
        self.lowest = lowest
        self.epsilon = epsilon
        self._check()

    def _check(self) -> None:
        for name in ("components", "lowest"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise InputError(f"{name}={value} must be a fraction of the features in (0, 1].")
        if not 0 < self.epsilon < float("inf"):
            raise InputError(f"epsilon={self.epsilon} must be positive and finite.")

    def _count(self, share: float) -> int:
        return max(1, int(share * self.head.in_features))

    def relevance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance (N, L) of each neuron and (N,) of the bias, float64, of features (N, L).

        Raises:
            InputError: features are not finite or of another width.
        """
        x = x.to(self.head.weight.device)
        return relevance(x, self.head.weight, bias_of(self.head), self.epsilon)

    @torch.no_grad()
    def fit_features(self, x: Tensor, y: Tensor) -> Self:
        """Fit centroids and components on features; their relevances take 8·N·L bytes.

        Args:
            x: penultimate features (N, L) of the training samples.
            y: labels (N,), any integers; samples with labels below zero are ignored.

        Raises:
            InputError: no sample is ID, the number of labels differs from that of samples, or
                features are not finite or of another width.
        """
        self._fit(*self._id_samples(x, y))  # as they are: only relevances are float64
        return self

    def _fit(self, h: Tensor, y: Tensor) -> None:
        parts = [self.relevance(each) for each in h.split(BATCH)]
        neurons, bias = (torch.cat(column) for column in zip(*parts, strict=True))

        centred = neurons - neurons.mean(dim=0)
        _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending; exact, unlike a random SVD
        kept = max(1, min(self._count(self.components), len(h) - 1))
        self.basis = vectors[:, -kept:]
        # The mean of the projections is the projection of the mean. Centring is skipped because it
        # cancels in every distance.
        means = torch.stack([neurons[y == label].mean(dim=0) for label in y.unique()])
        self.centroids = means @ self.basis

        size = float(bias.abs().mean())
        self.bias_scale = float(self._distance(neurons).mean()) / size if size else 0.0

    def _distance(self, neurons: Tensor) -> Tensor:
        """D, shape (N,), of relevances (N, L)."""
        assert self.basis is not None
        assert self.centroids is not None
        return torch.cdist(neurons @ self.basis, self.centroids, p=1).amin(dim=1)

    def _score(self, h: Tensor) -> Tensor:
        neurons, bias = self.relevance(h)
        size = h.abs()
        low = neurons.argsort(dim=1, stable=True)[:, : self._count(self.lowest)]
        norm = size.sum(dim=1)
        share = torch.where(norm > 0, size.gather(1, low).sum(dim=1) / norm, 1.0)
        return (self._distance(neurons) + self.bias_scale * bias.abs()) * share

    def predict_features(self, x: Tensor) -> Tensor:
        """Outlier scores (N,), at least float32, of features (N, L); larger means OOD.

        Raises:
            RequiresFittingException: it was not fitted.
            InputError: features are not finite or of another width.
        """
        return super().predict_features(x).to(torch.promote_types(x.dtype, torch.float32))


MAKERS: dict[str, Maker] = {"nero": lambda m: NERO(None, m.head)}
