"""What a search for masks may choose from. Each field holds its name, default, check and meaning.

`SearchSettings` is the one place where a hyperparameter of the search is defined. The parameters
file, the program's options with their help, and the call `search_masks` all read it from here.
"""

from math import inf, sqrt
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from opnp.runtime.settings import Settings, Several

__all__ = ["HIGHEST", "NeuronSensitivity", "SearchSettings"]

NeuronSensitivity = Literal["mean", "gradient", "taylor"]
"""How the sensitivity of a neuron is defined; `opnp.pruning.sensitivity` has the formulas."""

Shares = Annotated[Several[Annotated[float, Field(ge=0, lt=100)]], Field(min_length=1)]
Clips = Annotated[Several[Annotated[float, Field(gt=0, lt=100)] | None], Field(min_length=1)]
Temperatures = Annotated[Several[Annotated[float, Field(gt=0)]], Field(min_length=1)]
Kinds = Annotated[Several[NeuronSensitivity], Field(min_length=1)]


HIGHEST = (0.0, 0.1, 0.5, 2.0)
"""Percentages of the weights with the highest sensitivity, for a head of 10 classes."""


class SearchSettings(Settings):
    """The grid of masks that a search tries, and how it chooses among them.

    Every combination of percentages, neuron sensitivity, clip and temperature is tried. A pruned
    head is sensitive at the high end and robust at the low end, the more so the more classes it
    has: of 1,000 classes, the highest 2 % of the weights cost nearly all that the energy tells. So
    the grid is fine at the high end and coarse at the low end, and `for_head` scales the high end.

    >>> SearchSettings(weights_low=[0], weights_high=[0, 1], clip=[None]).weights_high
    (0.0, 1.0)
    """

    weights_low: Shares = Field(
        default=(0, 5, 30, 60),
        description="Percent of the weights with the lowest sensitivity to prune.",
    )
    weights_high: Shares | None = Field(
        default=None,
        description="Percent of the weights with the highest sensitivity to prune; null: 0, 0.1, "
        "0.5 and 2 for up to 10 classes, and less the more classes there are.",
    )
    neurons_low: Shares = Field(
        default=(0, 5, 10, 30),
        description="Percent of the neurons with the lowest sensitivity to prune.",
    )
    neurons_high: Shares = Field(
        default=(0, 1, 2, 5, 10),
        description="Percent of the neurons with the highest sensitivity to prune.",
    )
    neuron_sensitivity: Kinds = Field(
        default=("gradient",),
        description="Definitions of a neuron's sensitivity: mean, gradient or taylor.",
    )
    clip: Clips = Field(
        default=(None, 80, 90, 95, 97.5, 99),
        description="Percentiles of the training activations at which to clip features before "
        "pruning, as ReAct does; null, which must come first: do not clip.",
    )
    temperature: Temperatures = Field(default=(1.0,), description="Temperatures T of the energy.")
    max_accuracy_drop: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Percentage points of ID validation accuracy that the pruned head may lose, "
        "for those who classify with it; null: any, since the unpruned head classifies.",
    )
    bootstrap: Annotated[int, Field(ge=2, lt=2**31)] = Field(
        default=200,
        description="Bootstrap resamples that tell which masks are within noise of the best.",
    )

    @model_validator(mode="after")
    def consistent(self) -> Self:
        for what in ("weights", "neurons"):
            low = max(getattr(self, f"{what}_low"))
            high = max(getattr(self, f"{what}_high") or HIGHEST)
            if low + high >= 100:
                raise ValueError(
                    f"`{what}_low` {low:g} and `{what}_high` {high:g} together prune 100 % or more"
                )
        if self.clip[0] is not None:
            raise ValueError(
                "`clip` must begin with no clipping: the unpruned head, which every mask is "
                "compared with, does not clip"
            )
        for what in ("clip", "temperature"):
            if len(set(getattr(self, what))) < len(getattr(self, what)):
                raise ValueError(f"`{what}` holds a value twice")
        return self

    def lowest_accuracy(self, unpruned: float) -> float:
        """The accuracy in percent that a pruned head must keep; −∞ if there is no limit.

        >>> SearchSettings(max_accuracy_drop=1).lowest_accuracy(99.5)
        98.5

        Args:
            unpruned: accuracy of the unpruned head in percent; NaN if it is not known.
        """
        return -inf if self.max_accuracy_drop is None else unpruned - self.max_accuracy_drop

    def for_head(self, classes: int, features: int) -> Self:
        """These settings for a head of K classes and L features.

        Where ``weights_high`` is not given, it becomes 0, 0.1, 0.5 and 2 % times √(10/K), and at
        most these. Each cut is at least one weight; cuts of as many weights are one, and what would
        leave no weights beside the lowest is left out.

        >>> SearchSettings().for_head(10, 512).weights_high
        (0.0, 0.1, 0.5, 2.0)
        >>> SearchSettings().for_head(1000, 1280).weights_high
        (0.0, 0.01, 0.05, 0.2)
        """
        if self.weights_high is not None:
            return self
        scale, weights = min(1.0, sqrt(10 / classes)), classes * features
        by_count: dict[int, float] = {}
        for share in HIGHEST:
            count = round(weights * share * scale / 100)
            share = float(f"{share * scale:.3g}")
            if share and not count:  # one weight, and no more by rounding
                count, share = 1, float(f"{100 / weights:.6g}")
            if share + max(self.weights_low) < 100:
                by_count.setdefault(count, share)
        return self.model_copy(update={"weights_high": tuple(by_count.values())})
