"""What `opnp.deployment.fit.fit` may choose from."""

from typing import Annotated

from pydantic import Field

from opnp.data.families import DECIDING, REPORTED, Families, Reported
from opnp.pruning.settings import SearchSettings
from opnp.runtime.settings import Count, Positive, Seed

__all__ = ["FitSettings"]


class FitSettings(SearchSettings):
    """The search for a mask, and how images are read and accepted.

    >>> FitSettings(accept=99.0, temperature=[1.0]).weights_low
    (0.0, 5.0, 30.0, 60.0)
    """

    proxies: Annotated[Families, Field(min_length=1)] = Field(
        default=DECIDING,
        description="Families of proxy outliers, made from validation images, that the mask is "
        "chosen on.",
    )
    reported: Reported = REPORTED
    accept: Annotated[float, Field(gt=0, le=100)] = Field(
        default=95.0, description="Percent of ID validation images that the threshold accepts."
    )
    search_images: Positive = Field(
        default=1000,
        description="Largest number of validation images to choose the mask on, evenly spaced; the "
        "threshold is set on all of them.",
    )
    max_unreadable: Count = Field(
        default=10, description="Largest number of unreadable images to leave out before giving up."
    )
    seed: Seed = Field(default=0, description="Seed of the proxy outliers and of the bootstraps.")
    batch_size: Positive = Field(
        default=64, description="Number of images that go through the model at once."
    )
