"""Measure the sensitivity of the head: ``python -m flows.sensitivity``."""

from flows.process import command
from flows.stages import sensitivity

__all__ = ["sensitivity"]

if __name__ == "__main__":
    command("sensitivity")
