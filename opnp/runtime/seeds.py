"""Random numbers that depend on a seed and a name, and on nothing else."""

import zlib

import numpy as np

__all__ = ["generator"]


def generator(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for each named thing under one seed."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
