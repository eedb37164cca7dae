"""Thresholds at which features are clipped before they reach the head, as in ReAct.

Source: Sun et al., "ReAct: Out-of-distribution Detection With Rectified Activations", NeurIPS 2021,
arXiv 2111.12797, section 3.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opnp.errors import InputError

__all__ = ["clip_threshold", "clip_thresholds"]


def clip_threshold(features: Tensor, percentile: float) -> float:
    """The value below which ``percentile`` % of all N·L activations of training features lie.

    Args:
        features: penultimate features of the training samples, shape (N, L).
        percentile: from 0 to 100.

    Returns:
        The value, interpolated linearly between the two nearest activations.

    Raises:
        InputError: there are no features, or the percentile is not between 0 and 100.

    >>> clip_threshold(torch.arange(101.0).reshape(1, 101), 90)
    90.0
    """
    check_percentile(percentile, features.numel())
    return float(np.percentile(features.cpu().numpy(), percentile))


def check_percentile(percentile: float, count: int) -> None:
    if count == 0 or not 0 <= percentile <= 100:
        raise InputError(
            f"Percentile {percentile:g} of {count} activations is undefined: it needs a percentile "
            "between 0 and 100, and at least one sample."
        )


def by_threshold(
    percentiles: Sequence[float], thresholds: Sequence[float]
) -> dict[float | None, float | None]:
    """The percentile of each threshold that features are clipped at; first None, for no clip.

    At two percentiles the activations may be the same: the first stands for both.

    >>> by_threshold([50, 80, 90], [0.0, 0.0, 1.5])
    {None: None, 0.0: 50, 1.5: 90}
    """
    found: dict[float | None, float | None] = {None: None}
    for percentile, threshold in zip(percentiles, thresholds, strict=True):
        found.setdefault(threshold, percentile)
    return found


def clip_thresholds(
    blocks: Callable[[], Iterable[Tensor]], percentiles: Sequence[float]
) -> list[float]:
    """`clip_threshold` at several percentiles of features that need not fit in memory.

    The result is exact, because float32 numbers can be sorted by their bits: read as integers, the
    bits of positive numbers are in the order of the numbers once the sign bit is set, and those of
    negative numbers once all bits are inverted. A first pass over the features counts how often
    each upper half of 16 bits occurs, which tells the upper half of every number sought. A second
    pass counts the lower halves of the activations that share such an upper half.

    Args:
        blocks: called once for each pass; gives the features (N, L) part by part, as float32 or
            less precise.
        percentiles: each from 0 to 100.

    Returns:
        A value for each percentile, in their order.

    Raises:
        InputError: there are no features, or a percentile is not between 0 and 100.
    """

    def ordered() -> Iterator[NDArray[np.uint32]]:
        """The activations as integers of the same order."""
        for block in blocks():
            bits = block.cpu().float().contiguous().numpy().view(np.uint32).ravel()
            yield np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))

    upper = np.zeros(1 << 16, np.int64)
    for bits in ordered():
        upper += np.bincount(bits >> 16, minlength=1 << 16)
    total, ends = int(upper.sum()), upper.cumsum()
    for percentile in percentiles:
        check_percentile(percentile, total)
    # A percentile lies at a place among the sorted activations, between two ranks.
    places = [percentile / 100 * (total - 1) for percentile in percentiles]
    ranks = {int(rank) for place in places for rank in (np.floor(place), np.ceil(place))}
    half = {rank: int(np.searchsorted(ends, rank, side="right")) for rank in ranks}
    lower = {each: np.zeros(1 << 16, np.int64) for each in half.values()}
    for bits in ordered():
        for each, counts in lower.items():
            counts += np.bincount(bits[bits >> 16 == each] & 0xFFFF, minlength=1 << 16)

    def value(rank: int) -> float:
        """The activation of a rank, put together from the two halves of its bits."""
        high = half[rank]
        before = int(ends[high - 1]) if high else 0
        low = int(np.searchsorted(lower[high].cumsum(), rank - before, side="right"))
        bits = np.uint32(high << 16 | low)
        return float((bits & np.uint32(0x7FFFFFFF) if bits >> 31 else ~bits).view(np.float32))

    found = []
    for place in places:
        low, high = value(int(np.floor(place))), value(int(np.ceil(place)))
        found.append(float(np.float32(low + (place % 1) * (high - low))))
    return found
