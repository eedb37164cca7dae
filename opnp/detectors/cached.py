"""What the detectors of this package that work on cached features have in common."""

import copy
from abc import abstractmethod
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

from opnp.errors import InputError
from opnp.pruning.energy import bias_of, check_head

__all__ = ["CachedDetector", "EncoderDetector", "about", "class_means"]

BLOCK = 1 << 24  # numbers of (rows, K, L) held at once


def about(title: str, venue: str, year: int, url: str, code: str | None = None) -> DetectorInfo:
    """What pytorch-ood states of a detector: its paper."""
    paper = Paper(title=title, venue=venue, year=year, url=url, code=code)
    return DetectorInfo(paper=paper, tasks={Task.CLASSIFICATION})


class EncoderDetector(FeaturesDetector):
    """A detector of penultimate features, which makes them itself if it is given an encoder.

    A subclass has `fit_features` and `predict_features`.
    """

    requires_fit = True

    def __init__(self, encoder: Callable[[Tensor], Tensor] | None, head: nn.Linear):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
        """
        self.encoder = encoder
        self.head = copy.deepcopy(head).requires_grad_(False)

    def fit(self, data_loader: Any) -> Self:
        """Fit on a loader of ``(x, y)``; samples with labels below zero are ignored.

        Raises:
            ModelNotSetException: there is no encoder.
            ValueError: the loader has no ID samples.
        """
        if self.encoder is None:
            raise ModelNotSetException
        device = self.device or torch.device("cpu")
        return self.fit_features(*extract_features(data_loader, self.encoder, device))

    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores (N,) of inputs; larger means OOD.

        Raises:
            ModelNotSetException: there is no encoder.
            RequiresFittingException: it was not fitted and needs to be.
        """
        if self.encoder is None:
            raise ModelNotSetException
        return self.predict_features(self.encoder(x if self.device is None else x.to(self.device)))


class CachedDetector(EncoderDetector):
    """A detector of penultimate features that is fitted to labelled training features.

    A subclass has `_fit`, which is given float64 features and labels of ID samples alone, and
    `_score`, which is given float64 features.

    Attributes:
        fitted: names of the attributes that fitting makes; None before.
        at_once: names of the hyperparameters that take effect without another fit. To set any other
            discards what is fitted.
    """

    hyperparameter_space: dict[str, list[Any]] = {}
    fitted: tuple[str, ...] = ()
    at_once: frozenset[str] = frozenset()

    def __init__(self, encoder: Callable[[Tensor], Tensor] | None, head: nn.Linear):
        """
        Args:
            encoder: maps inputs to penultimate features (N, L); None if only features are given.
            head: the classifier's last layer; a copy is kept.
        """
        super().__init__(encoder, head)
        self._forget()

    def _forget(self) -> None:
        """Discard what was fitted."""
        for name in self.fitted:
            setattr(self, name, None)

    def _check(self) -> None:
        """Refuse hyperparameters out of range; called whenever some are set.

        Raises:
            InputError: one is.
        """

    def set_hyperparameters(self, **kwargs: Any) -> Self:
        """Set hyperparameters; unless all are in ``at_once``, fit again afterwards.

        Raises:
            InputError: a value is out of range.
            ValueError: there is no such hyperparameter.
        """
        super().set_hyperparameters(**kwargs)
        self._check()
        if not self.at_once.issuperset(kwargs):
            self._forget()
        return self

    @abstractmethod
    def _fit(self, h: Tensor, y: Tensor) -> None:
        """Fit to features (N, L), float64, and labels (N,), none below zero."""

    @abstractmethod
    def _score(self, h: Tensor) -> Tensor:
        """Outlier scores (N,) of features (N, L), float64."""

    @property
    def weight(self) -> Tensor:
        """W, (K, L), float64."""
        return self.head.weight.double()

    @property
    def bias(self) -> Tensor:
        """b, (K,), float64; zeros for a head without one."""
        return bias_of(self.head).double()

    def logits(self, h: Tensor) -> Tensor:
        """f = W h + b, (N, K), float64."""
        return h @ self.weight.T + self.bias

    def rows_at_once(self) -> int:
        """How many rows of (K, L) numbers fit in a block of memory."""
        return max(1, BLOCK // self.head.weight.numel())

    def _id_samples(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The features and labels of the ID samples, on the device of the head; see `fit_features`.

        Raises:
            InputError: see `fit_features`.
        """
        name = type(self).__name__
        if y.shape != x.shape[:1]:
            raise InputError(
                f"{name} needs one label for each row of features {tuple(x.shape)}, not "
                f"{tuple(y.shape)}."
            )
        known = is_known(y)
        if not known.any():
            raise InputError(f"{name} cannot be fitted: no sample has a label of zero or above.")
        h = x[known.to(x.device)].to(self.head.weight.device)
        check_head(h, self.head.weight, bias_of(self.head))
        return h, y[known].to(h.device)

    @torch.no_grad()
    def fit_features(self, x: Tensor, y: Tensor) -> Self:
        """Fit on features.

        Args:
            x: penultimate features of the training samples, (N, L), any floating dtype.
            y: labels, (N,), integers; samples with labels below zero are ignored.

        Raises:
            InputError: no sample is ID, there is not one label for each sample, or features are
                not finite or of another width.
        """
        h, y = self._id_samples(x, y)
        self._fit(h.double(), y)
        return self

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Outlier scores (N,), float64, of features (N, L); larger means OOD.

        Raises:
            RequiresFittingException: it was not fitted.
            InputError: features are not finite or of another width.
        """
        if any(getattr(self, name) is None for name in self.fitted):
            raise RequiresFittingException
        h = x.to(self.head.weight.device)
        check_head(h, self.head.weight, bias_of(self.head))
        return self._score(h.double())


def class_means(h: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The mean features of each class, and how many samples each class has.

    Args:
        h: features, (N, L), float64.
        y: labels, (N,), from 0 to K − 1.
        classes: K.

    Returns:
        (K, L), the mean of all samples in place of a class without any; and (K,), int64.

    Raises:
        InputError: a label is K or above.
    """
    if int(y.max()) >= classes:
        raise InputError(f"A label is {int(y.max())}, and the head has {classes} classes.")
    counts = torch.bincount(y, minlength=classes)
    sums = torch.zeros(classes, h.shape[1], dtype=h.dtype, device=h.device).index_add_(0, y, h)
    means = sums / counts.clamp(min=1)[:, None]
    return torch.where(counts[:, None] > 0, means, h.mean(dim=0)), counts
