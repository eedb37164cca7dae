"""Draw the report: ``python -m flows.report``."""

from flows.process import command
from flows.stages import report

__all__ = ["report"]

if __name__ == "__main__":
    command("report")
