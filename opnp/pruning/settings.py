"""What a search for masks may choose from. Each field holds its name, default, check and meaning.

`SearchSettings` is the one place where a hyperparameter of the search is defined. The parameters
file, the program's options with their help, and the call `search_masks` all read it from here.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from opnp.runtime.settings import Settings, Several

__all__ = ["NeuronSensitivity", "SearchSettings"]

NeuronSensitivity = Literal["mean", "gradient", "taylor"]
"""How the sensitivity of a neuron is defined; `opnp.pruning.sensitivity` has the formulas."""

Shares = Annotated[Several[Annotated[float, Field(ge=0, lt=100)]], Field(min_length=1)]
Clips = Annotated[Several[Annotated[float, Field(gt=0, lt=100)] | None], Field(min_length=1)]
Temperatures = Annotated[Several[Annotated[float, Field(gt=0)]], Field(min_length=1)]
Kinds = Annotated[Several[NeuronSensitivity], Field(min_length=1)]


class SearchSettings(Settings):
    """The grid of masks that a search tries, and how it chooses among them.

    Every combination of percentages, neuron sensitivity, clip and temperature is tried. A pruned
    head is sensitive at the high end and robust at the low end: of 10 classes × 256 features, or
    2,560 weights, 0.5 % is 13 weights. So the grid should be fine at the high end, and may be
    coarse at the low end.

    >>> SearchSettings(weights_low=[0], weights_high=[0, 1], clip=[None]).weights_high
    (0.0, 1.0)
    """

    weights_low: Shares = Field(
        default=(0, 10, 30, 50),
        description="Percent of the weights with the lowest sensitivity to prune.",
    )
    weights_high: Shares = Field(
        default=(0, 0.2, 0.5, 1, 2, 3, 5),
        description="Percent of the weights with the highest sensitivity to prune.",
    )
    neurons_low: Shares = Field(
        default=(0, 10, 30),
        description="Percent of the neurons with the lowest sensitivity to prune.",
    )
    neurons_high: Shares = Field(
        default=(0, 1, 2, 5, 10, 20),
        description="Percent of the neurons with the highest sensitivity to prune.",
    )
    neuron_sensitivity: Kinds = Field(
        default=("mean", "gradient", "taylor"),
        description="Definitions of a neuron's sensitivity: mean, gradient or taylor.",
    )
    clip: Clips = Field(
        default=(None, 80, 90),
        description="Percentiles of the training activations at which to clip features before "
        "pruning, as ReAct does; null, which must come first: do not clip.",
    )
    temperature: Temperatures = Field(
        default=(1.0, 2.0), description="Temperatures T of the energy."
    )
    max_accuracy_drop: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="Percentage points of ID validation accuracy that pruning may cost.",
    )
    bootstrap: Annotated[int, Field(ge=2, lt=2**31)] = Field(
        default=200,
        description="Bootstrap resamples that tell which masks are within noise of the best.",
    )

    @model_validator(mode="after")
    def consistent(self) -> Self:
        for what in ("weights", "neurons"):
            low, high = max(getattr(self, f"{what}_low")), max(getattr(self, f"{what}_high"))
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
