"""OPNP as a detector of the pytorch-ood library."""

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

from opnp.energy import bias_of, energy_score
from opnp.errors import InputError
from opnp.masks import Percentages, PruningMask, check_percentages
from opnp.search import Candidate
from opnp.sensitivity import NeuronSensitivity, Sensitivity, SensitivitySums

__all__ = ["OPNP"]


class OPNP(FeaturesDetector):
    """Energy of a head whose weights and neurons of extreme sensitivity are pruned.

    ``weights`` alone makes it OPP, ``neurons`` alone ONP; with neither it is the plain energy
    detector, bit for bit.

    Source: Chen et al., "Optimal Parameter and Neuron Pruning for Out-of-Distribution Detection",
    NeurIPS 2023, arXiv 2402.10062.

        detector = OPNP(model.encoder, model.head, weights=(0, 1), neurons=(10, 2))
        scores = detector.fit(train_loader).predict(images)
    """

    info = DetectorInfo(
        paper=Paper(
            title="Optimal Parameter and Neuron Pruning for Out-of-Distribution Detection",
            venue="NeurIPS",
            year=2023,
            url="https://arxiv.org/abs/2402.10062",
        ),
        tasks={Task.CLASSIFICATION},
    )

    requires_fit = True

    #: Search space for `pytorch_ood.utils.GridSearch`, in percent.
    hyperparameter_space = {
        "weights": [(0.0, 0.0), (0.0, 0.5), (0.0, 1.0), (0.0, 2.0), (30.0, 0.0), (30.0, 1.0)],
        "neurons": [(0.0, 0.0), (0.0, 2.0), (0.0, 5.0), (0.0, 10.0), (10.0, 0.0), (10.0, 5.0)],
    }

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        weights: Percentages = (0.0, 0.0),
        neurons: Percentages = (0.0, 0.0),
        neuron_sensitivity: NeuronSensitivity = "mean",
        temperature: float = 1.0,
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
            weights: (low, high), percent of weights to prune.
            neurons: (low, high), percent of neurons to prune.
            neuron_sensitivity: ``mean``, ``gradient`` or ``taylor``.
            temperature: T of the energy.

        Raises:
            InputError: percentages are out of range.
        """
        check_percentages("weights", weights)
        check_percentages("neurons", neurons)
        self.encoder = encoder
        self.head = copy.deepcopy(head).requires_grad_(False)
        self.weights = weights
        self.neurons = neurons
        self.neuron_sensitivity: NeuronSensitivity = neuron_sensitivity
        self.temperature = temperature
        self.sensitivity: Sensitivity | None = None
        self.mask: PruningMask | None = None
        self.pruned_head: nn.Linear | None = None

    @classmethod
    def from_mask(
        cls,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        mask: PruningMask,
        temperature: float = 1.0,
    ) -> Self:
        """A detector that needs no fitting, since its mask is known.

        Raises:
            InputError: the mask is for another head.
        """
        detector = cls(encoder, head, temperature=temperature)
        detector._prune(mask)
        detector.requires_fit = False
        return detector

    def _prune(self, mask: PruningMask) -> None:
        self.pruned_head = mask.apply(self.head)
        self.mask = mask

    def fit(self, data_loader: Any) -> Self:
        """Measure the sensitivity over a loader of ``(x, y)`` and prune.

        Samples with labels below zero are ignored.

        Raises:
            ModelNotSetException: there is no encoder.
            ValueError: the loader has no ID samples.
        """
        if self.encoder is None:
            raise ModelNotSetException
        device = self.device or torch.device("cpu")
        return self.fit_features(*extract_features(data_loader, self.encoder, device))

    def fit_features(self, x: Tensor, y: Tensor | None = None) -> Self:
        """Measure the sensitivity over features (N, L) and prune.

        Args:
            x: penultimate features of the training samples.
            y: labels (N,); samples with labels below zero are ignored.

        Raises:
            InputError: no sample is ID, or features are not finite or of another width.
        """
        known = x if y is None else x[is_known(y)]
        if len(known) == 0:
            raise InputError("OPNP cannot be fitted: no sample has a label of zero or above.")
        known = known.to(self.head.weight.device)
        sums = SensitivitySums.of(known, self.head.weight, bias_of(self.head), self.temperature)
        self.sensitivity = sums.mean()
        self._prune(self._candidate().mask(self.sensitivity))
        return self

    def _candidate(self) -> Candidate:
        return Candidate(self.weights, self.neurons, self.neuron_sensitivity)

    def set_hyperparameters(self, **kwargs: Any) -> Self:
        """Set percentages; a fitted detector is pruned anew from its sensitivity."""
        super().set_hyperparameters(**kwargs)
        if self.sensitivity is not None:
            self._prune(self._candidate().mask(self.sensitivity))
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores (N,) of inputs; larger means OOD.

        Raises:
            ModelNotSetException: there is no encoder.
            RequiresFittingException: neither `fit` nor `from_mask` came before.
        """
        if self.encoder is None:
            raise ModelNotSetException
        return self.predict_features(self.encoder(x if self.device is None else x.to(self.device)))

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Outlier scores (N,), the energy −T·logsumexp(f/T), of features (N, L); larger means OOD.

        Raises:
            RequiresFittingException: neither `fit` nor `from_mask` came before.
        """
        if self.pruned_head is None:
            raise RequiresFittingException
        return -energy_score(self.pruned_head(x), self.temperature)
