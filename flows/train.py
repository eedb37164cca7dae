"""Train the backbone, or load its weights: ``python -m flows.train``."""

from flows.process import command
from flows.stages import train

__all__ = ["train"]

if __name__ == "__main__":
    command("train")
