"""OPP, ONP, OPNP, OPNP with ReAct's clipping, and clipping alone, as a mask search chose them.

Each is the energy of a head, which is pruned unless features are clipped alone. What to prune,
where to clip the features and the temperature are the search's choice, so that there is nothing
left to tune.
"""

import copy
from functools import partial
from typing import Any, Self

import torch
from pytorch_ood.api import FeaturesDetector, ModelNotSetException, RequiresFittingException
from torch import Tensor, nn

from opnp.detectors.base import Maker, SearchChoice, TrainedModel
from opnp.pruning.energy import bias_of, energy_score
from opnp.pruning.masks import PruningMask
from opnp.pruning.methods import METHODS
from opnp.pruning.sensitivity import SensitivitySums

__all__ = ["SearchedMask"]


class SearchedMask(FeaturesDetector):
    """The energy of a head, pruned as a mask search chose.

    Its ``hyperparameter_space`` holds the search's choice and nothing else.

    Source: Chen et al., "Optimal Parameter and Neuron Pruning for Out-of-Distribution Detection",
    NeurIPS 2023, arXiv 2402.10062; the clipping: Sun et al., "ReAct: Out-of-distribution Detection
    With Rectified Activations", NeurIPS 2021, arXiv 2111.12797.
    """

    requires_fit = True

    def __init__(self, head: nn.Linear, choice: SearchChoice):
        """
        Args:
            head: the classifier's last layer, weight (K, L); a copy is kept.
            choice: of the search on this head.
        """
        self.head = copy.deepcopy(head).requires_grad_(False)
        self.candidate = choice.candidate
        self.trials = choice.trials
        self.mask: PruningMask | None = None
        self.pruned_head: nn.Linear | None = None
        chosen = {
            **choice.candidate.record(),
            "clip": choice.percentile,
            "temperature": choice.candidate.temperature,
        }
        self.hyperparameter_space = {name: [value] for name, value in chosen.items()}

    def get_hyperparameters(self) -> dict[str, Any]:
        """What the search chose, by name."""
        return {name: value for name, [value] in self.hyperparameter_space.items()}

    def set_hyperparameters(self, **kwargs: Any) -> Self:
        """Accept what the search chose.

        Raises:
            ValueError: a value is not the search's.
        """
        chosen = self.get_hyperparameters()
        for name, value in kwargs.items():
            if name not in chosen or chosen[name] != value:
                raise ValueError(f"{name}={value} is not what the mask search chose: search again.")
        return self

    def fit_features(self, x: Tensor, y: Tensor | None = None) -> Self:
        """Measure the sensitivity over features and prune.

        Args:
            x: penultimate features (N, L) of the training samples.
            y: labels, which do not matter.

        Raises:
            InputError: features are not finite or of another width, or there are none.
        """
        del y
        t, clip = self.candidate.temperature, self.candidate.clip
        sums = SensitivitySums.of(x, self.head.weight, bias_of(self.head), t, clip)
        self.mask = self.candidate.mask(sums.mean())
        self.pruned_head = self.mask.apply(self.head)
        return self

    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, K) of the pruned head for features (N, L), which are clipped first.

        Raises:
            RequiresFittingException: it was not fitted.
        """
        if self.pruned_head is None:
            raise RequiresFittingException
        clip = self.candidate.clip
        found: Tensor = self.pruned_head(x if clip is None else x.clamp(max=clip))
        return found

    def predict(self, x: Tensor) -> Tensor:
        """Refuse images, since there is no encoder; use `predict_features`.

        Raises:
            ModelNotSetException: always.
        """
        raise ModelNotSetException

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Outlier scores (N,) of features (N, L): −T·logsumexp(f/T); larger means OOD.

        Raises:
            RequiresFittingException: it was not fitted.
        """
        return -energy_score(self.logits(x), self.candidate.temperature)


def of_method(method: str, model: TrainedModel) -> SearchedMask:
    return SearchedMask(model.head, model.choice(method))


MAKERS: dict[str, Maker] = {method: partial(of_method, method) for method in METHODS}
