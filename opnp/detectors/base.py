"""What detectors are made from, and how any detector is made, fitted and asked for scores."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import torch
from pytorch_ood.api import (
    Detector,
    FeatureMapsDetector,
    FeaturesDetector,
    GradientDetector,
    LogitsDetector,
)
from pytorch_ood.detector import EnergyBased
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # missing in its stub

from opnp.backbones.backbone import Classifier
from opnp.backbones.networks import Pool
from opnp.detectors import names
from opnp.errors import InputError, UnavailableError
from opnp.pruning.candidates import Candidate
from opnp.pruning.masks import PruningMask

__all__ = [
    "Maker", "Samples", "SearchChoice", "TrainedModel", "features_seen", "fit", "logits_of", "make",
    "predict", "score",
]  # fmt: skip


BATCH = 1024  # rows of features to score at once, or fewer:
NUMBERS = 1 << 27  # DICE and GMM hold tensors of (batch, K, L) numbers, at most this many
IMAGES = 256  # images to score at once


class Keep(nn.Module):
    """Sets the features (N, L) of pruned neurons to zero."""

    neurons: Tensor

    def __init__(self, neurons: Tensor):
        super().__init__()
        self.register_buffer("neurons", neurons)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.neurons.to(x.device)


@dataclass(frozen=True)
class SearchChoice:
    """What a mask search chose for one of its methods.

    Attributes:
        candidate: what to prune, where to clip features, and T of the energy.
        percentile: the percentile of the training activations at which ``candidate`` clips; None if
            it does not clip.
        trials: number of candidates that the search tried.
    """

    candidate: Candidate
    percentile: float | None = None
    trials: int = 1


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """The model that a detector is made for.

    Attributes:
        head: the classifier's last layer, weight (K, L).
        temperature: T of the energy.
        classifier: the whole classifier in evaluation mode, with ``head`` as its head; only
            detectors of images need it.
        std: standard deviation of each image channel before normalization; ODIN scales its steps
            by it.
        choices: what a mask search chose for this model, by method; only detectors that are a
            choice of the search need it.
        spcp: λ, at which contributions to the logits were clipped while the model was trained, if
            they were; only the detector ``spcp`` needs it.
    """

    head: nn.Linear
    temperature: float = 1.0
    classifier: Classifier | None = None
    std: tuple[float, ...] = ()
    choices: Mapping[str, SearchChoice] = field(default_factory=dict)
    spcp: float | None = None

    def pruned(self, mask: PruningMask) -> Self:
        """The model without the weights and neurons that ``mask`` prunes.

        Raises:
            InputError: the mask is for another head.
        """
        head = mask.apply(self.head)
        if self.classifier is None:
            return replace(self, head=head)
        layers = layers_of(self.classifier.encoder)
        encoder = nn.Sequential(*layers, Keep(mask.neurons))
        return replace(self, head=head, classifier=Classifier(encoder, head))

    @property
    def energy(self) -> Callable[[Tensor], Tensor]:
        """A function that returns the energy, outlier scores (N,), of logits (N, K)."""
        return partial(EnergyBased.score, t=self.temperature)

    @property
    def head_of_maps(self) -> nn.Module:
        """The head as a module that takes feature maps (N, L, 1, 1)."""
        return nn.Sequential(nn.Flatten(), self.head)

    def whole(self) -> Classifier:
        """The classifier.

        Raises:
            UnavailableError: only the head is known.
        """
        if self.classifier is None:
            raise UnavailableError(
                "The detector needs the whole classifier, and there is only a head."
            )
        return self.classifier

    def choice(self, method: str) -> SearchChoice:
        """What the mask search chose for a method.

        Raises:
            UnavailableError: there was no such search.
        """
        if method not in self.choices:
            raise UnavailableError(f"{method} needs a mask search, and there was none.")
        return self.choices[method]

    def at_pooling(self) -> tuple[nn.Module, nn.Module]:
        """The classifier in two parts: up to the feature maps (N, C, H, W), and the rest.

        Raises:
            UnavailableError: only the head is known, or the encoder does not pool feature maps.
        """
        layers = layers_of(self.whole().encoder)
        pools = [place for place, layer in enumerate(layers) if isinstance(layer, Pool)]
        if not pools:
            raise UnavailableError(
                "The detector needs feature maps, and the encoder does not pool any."
            )
        maps, rest = layers[: pools[-1]], layers[pools[-1] :]
        return nn.Sequential(*maps), nn.Sequential(*rest, self.head)


Maker = Callable[[TrainedModel], Detector]
"""Makes a detector for a model."""


def make(key: str, model: TrainedModel) -> Detector:
    """Make a detector, not fitted yet.

    Args:
        key: of a row in `opnp.detectors.names.DETECTORS`, or ``module:factory``, a function that
            returns a detector of pytorch-ood for a `TrainedModel`.
        model: left as it is.

    Raises:
        InputError: there is no such detector, or the factory returns something else.
        UnavailableError: the model lacks what the detector needs.
    """
    made = names.maker(key)(model)
    if not isinstance(made, Detector):
        raise InputError(
            f"The detector {key} is of the type {type(made).__name__}: let its function return a "
            "detector of pytorch-ood, such as a FeaturesDetector or a LogitsDetector."
        )
    return made


@dataclass(frozen=True, eq=False)
class Samples:
    """Cached samples.

    Attributes:
        features: penultimate features (N, L).
        labels: (N,); None for outliers.
        images: returns the normalized images (N, C, H, W). Each fit and each scoring of a detector
            of images calls it; other detectors do not.
        logits: (N, K) of the model's head, if several detectors share them.
    """

    features: Tensor
    labels: Tensor | None = None
    images: Callable[[], Tensor] | None = None
    logits: Tensor | None = None

    def pruned(self, mask: PruningMask) -> Self:
        """The samples as the pruned model sees them."""
        neurons = mask.neurons.to(self.features.device)
        return replace(self, features=self.features * neurons, logits=None)


def layers_of(encoder: nn.Module) -> list[nn.Module]:
    return list(encoder) if isinstance(encoder, nn.Sequential) else [encoder]


def fit(detector: Detector, model: TrainedModel, samples: Samples) -> None:
    """Fit a detector on training samples, if it needs to be.

    Raises:
        UnavailableError: it cannot be fitted for this model or on these samples.
        TypeError: its class takes neither logits, features nor images.
    """
    if not detector.requires_fit:
        return
    with reasons(detector), torch.no_grad():
        if samples.labels is None:
            raise ValueError("it is fitted on labels, and there are none")
        if takes_images(detector):
            images = images_of(samples)
            detector.fit(list(zip(images.split(IMAGES), samples.labels.split(IMAGES), strict=True)))
        elif isinstance(detector, LogitsDetector):
            detector.fit_logits(logits_of(model, samples), samples.labels)
        elif isinstance(detector, FeatureMapsDetector):
            detector.fit_feature_maps(samples.features[:, :, None, None], samples.labels)
        elif isinstance(detector, FeaturesDetector):
            detector.fit_features(samples.features, samples.labels)
        else:
            raise unknown_class(detector)


def score(detector: Detector, model: TrainedModel, samples: Samples) -> Tensor:
    """Outlier scores (N,), float64; larger means OOD.

    Raises:
        UnavailableError: it cannot score these samples, or some scores are not finite.
        TypeError: its class takes neither logits, features nor images.
    """
    with reasons(detector), torch.no_grad():
        scores = torch.cat([s.double() for _, s in scored(detector, model, samples)])
        if not scores.isfinite().all():
            raise ValueError("some of its scores are not finite")
    return scores


@torch.no_grad()
def predict(detector: Detector, model: TrainedModel, features: Tensor) -> Tensor:
    """Outlier scores (N,) of one batch of features (N, L); larger means OOD.

    Raises:
        TypeError: the detector takes neither logits nor features.
    """
    if isinstance(detector, LogitsDetector):
        return detector.predict_logits(model.head(features))
    if isinstance(detector, FeatureMapsDetector):
        return detector.predict_feature_maps(features[:, :, None, None])
    if isinstance(detector, FeaturesDetector):
        return detector.predict_features(features)
    raise unknown_class(detector)


def features_seen(detector: Detector, model: TrainedModel, samples: Samples) -> Tensor:
    """The features (N, L) that reach the head of the model when a fitted detector scores.

    ReAct clips them, ASH and SCALE shape them, RankFeat pools them from other feature maps. If the
    detector does not call the head, these are the samples' features.

    Raises:
        UnavailableError: it cannot score these samples.
    """
    if isinstance(detector, LogitsDetector):
        return samples.features
    given: list[Tensor] = []
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        with reasons(detector), torch.no_grad():
            for batch, _ in scored(detector, model, samples):
                if not given or given[-1] is batch:
                    return samples.features  # the detector does not shape them
                seen.append(given[-1].detach())  # ODIN first calls the head for a gradient
                given.clear()
    finally:
        hook.remove()
    return torch.cat(seen)


def scored(
    detector: Detector, model: TrainedModel, samples: Samples
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of what a detector takes, and their scores."""
    if takes_images(detector):
        for batch in images_of(samples).split(IMAGES):
            yield batch, detector.predict(batch)
    elif isinstance(detector, LogitsDetector) and samples.logits is not None:
        for batch in samples.logits.split(BATCH):
            yield batch, detector.predict_logits(batch)
    else:
        for batch in samples.features.split(rows_at_once(model.head)):
            yield batch, predict(detector, model, batch)


def takes_images(detector: Detector) -> bool:
    # Only a detector that needs real feature maps is made with a backbone.
    if isinstance(detector, FeatureMapsDetector):
        return detector.backbone is not None
    return isinstance(detector, GradientDetector) and not isinstance(detector, FeaturesDetector)


def images_of(samples: Samples) -> Tensor:
    if samples.images is None:
        raise ValueError("it runs on images, and there are none")
    return samples.images()


@torch.no_grad()
def logits_of(model: TrainedModel, samples: Samples) -> Tensor:
    """Logits (N, K), as they were cached or from the head."""
    if samples.logits is not None:
        return samples.logits
    return torch.cat([model.head(h) for h in samples.features.split(BATCH)])


def rows_at_once(head: nn.Linear) -> int:
    return max(1, min(BATCH, NUMBERS // head.weight.numel()))


def unknown_class(detector: Detector) -> TypeError:
    return TypeError(f"{type(detector).__name__} takes neither logits, features nor images.")


@contextmanager
def reasons(detector: Detector) -> Iterator[None]:
    """Turn the errors that mean that a detector cannot run here into `UnavailableError`.

    Other errors are mistakes in the code and pass through.
    """
    name = type(detector).__name__
    try:
        yield
    except (ValueError, AssertionError, LinAlgError) as error:
        said = str(error).strip().splitlines()
        line = traceback.extract_tb(error.__traceback__)[-1].line  # an assertion may have no words
        reason = (said[0] if said else f"`{line}` does not hold").rstrip(".")
        raise UnavailableError(f"{name} cannot run here: {reason}.") from error
