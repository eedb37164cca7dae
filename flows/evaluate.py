"""Compare the detectors on the test sets: ``python -m flows.evaluate``."""

from flows.process import command
from flows.stages import evaluate

__all__ = ["evaluate"]

if __name__ == "__main__":
    command("evaluate")
