"""Compute the penultimate features: ``python -m flows.features``."""

from flows.process import command
from flows.stages import features

__all__ = ["features"]

if __name__ == "__main__":
    command("features")
