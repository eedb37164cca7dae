"""OPNP as a detector of the pytorch-ood library, alone or combined with another detector."""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from pytorch_ood.api import (
    Detector,
    FeaturesDetector,
    LogitsDetector,
    RequiresFittingException,
)
from pytorch_ood.utils import is_known
from torch import Tensor, nn

from opnp.detectors import base
from opnp.detectors.base import Samples, TrainedModel
from opnp.detectors.cached import EncoderDetector, about
from opnp.errors import InputError
from opnp.pruning.candidates import Candidate
from opnp.pruning.energy import bias_of, check_head
from opnp.pruning.inputs import Numbers, as_features, as_labels
from opnp.pruning.masks import Percentages, PruningMask, check_percentages, warn_of_fractions
from opnp.pruning.sensitivity import NeuronSensitivity, Sensitivity, SensitivitySums

__all__ = ["OPNP"]


class LogitsScore(LogitsDetector):
    """A function of logits (N, K) as a detector."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def predict_logits(self, logits: Tensor) -> Tensor:
        """Outlier scores (N,)."""
        return self.function(logits)


class OPNP(EncoderDetector):
    """The energy of a head without its weights and neurons of extreme sensitivity.

    With ``weights`` alone it is OPP, with ``neurons`` alone ONP, and with neither the energy
    detector, bit for bit. With ``detector``, another detector scores the pruned model, and the
    sensitivity is that of the features which this detector passes to the head.

    Source: Chen et al., "Optimal Parameter and Neuron Pruning for Out-of-Distribution Detection",
    NeurIPS 2023, arXiv 2402.10062.

        detector = OPNP(model.encoder, model.head, weights=(0, 1), neurons=(10, 2))
        scores = detector.fit(train_loader).predict(images)
        clipped = OPNP(model.encoder, model.head, neurons=(10, 2), detector="react")
    """

    info = about(
        "Optimal Parameter and Neuron Pruning for Out-of-Distribution Detection",
        "NeurIPS",
        2023,
        "https://arxiv.org/abs/2402.10062",
    )

    #: Search space for `pytorch_ood.utils.GridSearch`, in percent. The space of an instance also
    #: holds that of its ``detector``.
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
        detector: str | Callable[[Tensor], Tensor] | Detector | None = None,
    ):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None to take features only.
            head: the classifier's last layer; a copy is kept.
            weights: percent of the weights with the lowest and with the highest sensitivity to
                prune, (low, high).
            neurons: the same for neurons.
            neuron_sensitivity: ``mean``, ``gradient`` or ``taylor``.
            temperature: T of the energy.
            detector: scores the pruned model instead of the energy: a function of logits (N, K)
                such as ``GEN.score``; a pytorch-ood detector of logits or features that does not
                hold the head, such as ``KNN(None, k=5)``, which is copied; or a name in
                `opnp.detectors.names.DETECTORS`, which is made for the pruned head.

        Raises:
            InputError: percentages are out of range, or there is no such detector.
            UnavailableError: the named detector needs images or feature maps.
        """
        check_percentages("weights", weights)
        check_percentages("neurons", neurons)
        warn_of_fractions(f"{weights=!s}, {neurons=!s}", [*weights, *neurons])
        super().__init__(encoder, head)
        self.weights = weights
        self.neurons = neurons
        self.neuron_sensitivity: NeuronSensitivity = neuron_sensitivity
        self.temperature = temperature
        self.sensitivity: Sensitivity | None = None
        self.mask: PruningMask | None = None
        self.pruned_head: nn.Linear | None = None
        self._given = detector
        self._inner = self._make(TrainedModel(self.head, temperature))  # holds hyperparameters
        self._fitted: Detector | None = None  # of the pruned head
        self.hyperparameter_space = {
            **self.hyperparameter_space,
            **self._inner.hyperparameter_space,
        }

    def _make(self, model: TrainedModel) -> Detector:
        given = model.energy if self._given is None else self._given
        if isinstance(given, str):
            return base.make(given, model)
        if not isinstance(given, Detector):
            return LogitsScore(given)
        if not isinstance(given, LogitsDetector | FeaturesDetector):
            raise InputError(
                f"OPNP takes detectors of logits or features, not {type(given).__name__}: give its "
                "name, so that OPNP can make it for the pruned head."
            )
        return copy.deepcopy(given)

    @classmethod
    def from_mask(
        cls,
        encoder: Callable[[Tensor], Tensor] | None,
        head: nn.Linear,
        mask: PruningMask,
        temperature: float = 1.0,
        detector: str | Callable[[Tensor], Tensor] | Detector | None = None,
    ) -> Self:
        """Make a detector with a given mask; it needs fitting only if ``detector`` does.

        Args:
            encoder: maps inputs to penultimate features (N, L); None to take features only.
            head: the classifier's last layer; a copy is kept.
            mask: what to prune.
            temperature: T of the energy.
            detector: scores the pruned model instead of the energy.

        Raises:
            InputError: the mask is for another head, or there is no such detector.
            UnavailableError: the named detector needs images or feature maps.
        """
        made = cls(encoder, head, temperature=temperature, detector=detector)
        made._prune(mask)
        made.requires_fit = made._inner.requires_fit
        return made

    def _built(self, model: TrainedModel) -> Detector:
        return self._make(model).set_hyperparameters(**self._inner.get_hyperparameters())

    def _prune(self, mask: PruningMask, train: Samples | None = None) -> None:
        """Prune, and make the detector of the pruned model again; fit it if there are samples."""
        model = TrainedModel(mask.apply(self.head), self.temperature)
        detector = self._built(model)
        if detector.requires_fit and train is not None:
            base.fit(detector, model, train.pruned(mask))
        self.mask, self.pruned_head = mask, model.head
        self._fitted = None if detector.requires_fit and train is None else detector

    def fit_features(self, x: Numbers, y: Numbers | None = None) -> Self:
        """Measure the sensitivity over features, prune, and fit the detector on what is left.

        A mask given to `from_mask` stays.

        Args:
            x: penultimate features (N, L) of the training samples: a tensor, an array or lists, of
                any real type.
            y: labels, whole numbers of any type (N,), (N, 1) or one-hot (N, K); samples with
                labels below zero are ignored. A ``detector`` that needs fitting needs them.

        Raises:
            InputError: no sample is ID, features are not finite or of another width, or labels
                are not classes of the head.
            UnavailableError: the detector cannot be fitted on these samples.
        """
        weight, bias = self.head.weight, bias_of(self.head)
        x = as_features(x, weight)
        y = None if y is None else as_labels(y, len(x), len(weight), weight.device)
        known = torch.ones(len(x), dtype=torch.bool) if y is None else is_known(y)
        if not known.any():
            raise InputError("OPNP cannot be fitted: no sample has a label of zero or above.")
        features = x if y is None else x[known]
        check_head(features, weight, bias, self.temperature)
        train = Samples(features, None if y is None else y[known])
        mask, sensitivity = self.mask, self.sensitivity
        if mask is None or sensitivity is not None:
            model = TrainedModel(self.head, self.temperature)
            unpruned = self._built(model)
            base.fit(unpruned, model, train)
            seen = base.features_seen(unpruned, model, train)
            sensitivity = SensitivitySums.of(seen, weight, bias, self.temperature).mean()
            mask = self._candidate().mask(sensitivity)
        self._prune(mask, train)
        self.sensitivity = sensitivity
        return self

    def _candidate(self) -> Candidate:
        return Candidate(self.weights, self.neurons, self.neuron_sensitivity)

    def get_hyperparameters(self) -> dict[str, Any]:
        """The percentages, and the hyperparameters of ``detector``, by name."""
        inner = self._inner.get_hyperparameters()
        return {
            name: inner[name] if name in inner else getattr(self, name)
            for name in self.hyperparameter_space
        }

    def set_hyperparameters(self, **kwargs: Any) -> Self:
        """Set percentages, or hyperparameters of ``detector``.

        New percentages prune a fitted detector again, by the sensitivity that it has measured. It
        must be fitted again if ``detector`` needs fitting, or if one of its hyperparameters is set:
        that may change the features which the sensitivity is of.
        """
        known = self._inner.hyperparameter_space
        inner = {name: kwargs.pop(name) for name in [*kwargs] if name in known}
        super().set_hyperparameters(**kwargs)
        self._inner.set_hyperparameters(**inner)
        if self.sensitivity is None:
            if self.mask is not None:
                self._prune(self.mask)
        elif inner:
            self.sensitivity = self.mask = self.pruned_head = self._fitted = None
        else:
            self._prune(self._candidate().mask(self.sensitivity))
        return self

    def to(self, device: str | torch.device) -> Self:
        """Move what it holds to a device."""
        super().to(device)
        for detector in (self._inner, self._fitted):
            if detector is not None:
                detector.to(device)
        return self

    @torch.no_grad()
    def predict_features(self, x: Numbers) -> Tensor:
        """Outlier scores (N,) of features (N, L); larger means OOD.

        They are the energy −T·logsumexp(f/T), or the scores of ``detector``.

        Args:
            x: a tensor, an array or lists, of any real type.

        Raises:
            InputError: features are of another width.
            RequiresFittingException: it was not fitted and needs to be.
        """
        if self._fitted is None or self.mask is None or self.pruned_head is None:
            raise RequiresFittingException
        model = TrainedModel(self.pruned_head, self.temperature)
        x = as_features(x, model.head.weight)
        return base.predict(self._fitted, model, x * self.mask.neurons.to(x.device))
