"""Fetch the images of every source: ``python -m flows.fetch``."""

from flows.process import command
from flows.stages import fetch

__all__ = ["fetch"]

if __name__ == "__main__":
    command("fetch")
