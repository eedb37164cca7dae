"""What a detector is given, and how any detector of pytorch-ood is fitted and scores on it."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from opnp.errors import UnavailableError
from opnp.pruning.masks import PruningMask

__all__ = ["Samples", "TrainedModel", "features_seen", "fit", "logits_of", "predict", "score"]


BATCH = 1024  # features scored at once,
NUMBERS = 1 << 27  # but never more numbers than this: DICE and GMM hold (batch, K, L)
IMAGES = 256  # images scored at once


class Keep(nn.Module):
    """Features (N, L) with those of the pruned neurons zeroed."""

    neurons: Tensor

    def __init__(self, neurons: Tensor):
        super().__init__()
        self.register_buffer("neurons", neurons)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.neurons.to(x.device)


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """What a detector is made for.

    Attributes:
        head: the classifier's last layer, weight (K, L).
        temperature: T of the energy.
        classifier: the whole classifier in evaluation mode, with ``head`` as its head; only
            detectors of images need it.
        std: of the preprocessing, one for each channel, by which ODIN scales its steps.
    """

    head: nn.Linear
    temperature: float = 1.0
    classifier: Classifier | None = None
    std: tuple[float, ...] = ()

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
        """Outlier scores (N,) of logits (N, K)."""
        return partial(EnergyBased.score, t=self.temperature)

    @property
    def head_of_maps(self) -> nn.Module:
        """The head as a module of feature maps (N, L, 1, 1)."""
        return nn.Sequential(nn.Flatten(), self.head)

    def whole(self) -> Classifier:
        """The classifier.

        Raises:
            UnavailableError: there is none.
        """
        if self.classifier is None:
            raise UnavailableError(
                "The detector needs the whole classifier, and there is only a head."
            )
        return self.classifier

    def at_pooling(self) -> tuple[nn.Module, nn.Module]:
        """The classifier in two: up to the feature maps (N, C, H, W), and the rest.

        Raises:
            UnavailableError: there is no classifier, or it does not pool feature maps.
        """
        layers = layers_of(self.whole().encoder)
        pools = [place for place, layer in enumerate(layers) if isinstance(layer, Pool)]
        if not pools:
            raise UnavailableError("The detector needs feature maps, and the encoder pools none.")
        maps, rest = layers[: pools[-1]], layers[pools[-1] :]
        return nn.Sequential(*maps), nn.Sequential(*rest, self.head)


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples as they were cached.

    Attributes:
        features: penultimate features (N, L).
        labels: (N,); none for outliers.
        images: returns the normalized images (N, C, H, W); called for each fit and each score of a
            detector of images, and for no other.
        logits: of the model's head, (N, K), where several detectors shall share them.
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
        TypeError: it is of a class that takes neither logits, features nor images.
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
    """Outlier scores (N,), float64, larger = OOD.

    Raises:
        UnavailableError: it cannot score these samples, or scores are not finite.
        TypeError: it is of a class that takes neither logits, features nor images.
    """
    with reasons(detector), torch.no_grad():
        scores = torch.cat([s.double() for _, s in scored(detector, model, samples)])
        if not scores.isfinite().all():
            raise ValueError("some of its scores are not finite")
    return scores


@torch.no_grad()
def predict(detector: Detector, model: TrainedModel, features: Tensor) -> Tensor:
    """Outlier scores (N,), larger = OOD, of one batch of features (N, L).

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
    """The features (N, L) that the head of the model is given when a fitted detector scores.

    ReAct clips them, ASH and SCALE shape them, RankFeat pools them from other feature maps; where
    the detector does not call the head, they are the features as they are.

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
                    return samples.features  # nothing shapes them: spare the other batches
                seen.append(given[-1].detach())  # the last, as ODIN calls it first for a gradient
                given.clear()
    finally:
        hook.remove()
    return torch.cat(seen)


def scored(
    detector: Detector, model: TrainedModel, samples: Samples
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of what a detector is given, and their scores."""
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
    # A detector of feature maps has a backbone only if pooled features do not serve it.
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
    """Tell what libraries raise when a detector cannot run here apart from programming errors."""
    name = type(detector).__name__
    try:
        yield
    # IndexError: SHE looks up the predicted class among those that the training samples have.
    except (ValueError, AssertionError, IndexError, LinAlgError) as error:
        said = str(error).strip().splitlines()
        line = traceback.extract_tb(error.__traceback__)[-1].line  # bare assertions say nothing
        reason = (said[0] if said else f"`{line}` does not hold").rstrip(".")
        raise UnavailableError(f"{name} cannot run here: {reason}.") from error
