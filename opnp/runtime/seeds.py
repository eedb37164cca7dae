"""Random numbers that depend only on a seed and a name."""

import zlib

import numpy as np

__all__ = ["generator"]


def generator(seed: int, name: str) -> np.random.Generator:
    """A random generator for one name under a seed, independent of those for other names."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
