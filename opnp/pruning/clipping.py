"""Thresholds at which features are clipped before the head sees them, as ReAct clips them."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opnp.errors import InputError

__all__ = ["clip_threshold", "clip_thresholds"]


def clip_threshold(features: Tensor, percentile: float) -> float:
    """The value below which ``percentile`` % of all activations of training features (N, L) lie.

    Source: Sun et al., "ReAct: Out-of-distribution Detection With Rectified Activations",
    NeurIPS 2021, arXiv 2111.12797, section 3.

    Raises:
        InputError: there are no features, or the percentile is not between 0 and 100.
    """
    check_percentile(percentile, features.numel())
    return float(np.percentile(features.cpu().numpy(), percentile))


def check_percentile(percentile: float, count: int) -> None:
    if count == 0 or not 0 <= percentile <= 100:
        raise InputError(
            f"The {percentile:g} % percentile of {count} activations is undefined: give one "
            "between 0 and 100, and samples."
        )


def clip_thresholds(
    blocks: Callable[[], Iterable[Tensor]], percentiles: Sequence[float]
) -> list[float]:
    """`clip_threshold` at some percentiles of float32 features that need not fit in memory.

    Exact, with linear interpolation. float32 numbers are ordered as their bits are (those of
    negative ones inverted), so that one pass over the features counts the upper halves of these
    bits, and a second one the lower halves where the upper half is that of a number sought.

    Args:
        blocks: gives the features (N, L), up to float32, part by part, anew at each call.
        percentiles: between 0 and 100.

    Raises:
        InputError: there are no features, or a percentile is not between 0 and 100.
    """

    def ordered() -> Iterator[NDArray[np.uint32]]:
        for block in blocks():
            bits = block.cpu().float().contiguous().numpy().view(np.uint32).ravel()
            yield np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))

    upper = np.zeros(1 << 16, np.int64)
    for bits in ordered():
        upper += np.bincount(bits >> 16, minlength=1 << 16)
    total, ends = int(upper.sum()), upper.cumsum()
    for percentile in percentiles:
        check_percentile(percentile, total)
    places = [percentile / 100 * (total - 1) for percentile in percentiles]
    ranks = {int(rank) for place in places for rank in (np.floor(place), np.ceil(place))}
    half = {rank: int(np.searchsorted(ends, rank, side="right")) for rank in ranks}
    lower = {each: np.zeros(1 << 16, np.int64) for each in half.values()}
    for bits in ordered():
        for each, counts in lower.items():
            counts += np.bincount(bits[bits >> 16 == each] & 0xFFFF, minlength=1 << 16)

    def value(rank: int) -> float:
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
