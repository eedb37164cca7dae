"""Search for the best mask: ``python -m flows.search``."""

from flows.process import command
from flows.stages import search

__all__ = ["search"]

if __name__ == "__main__":
    command("search")
