"""Where a program shows what the library logs."""

import logging
import sys

__all__ = ["show"]


class Lines(logging.Handler):
    """Each record as a plain line on stderr, whatever stderr is by then."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def show() -> None:
    """Show the library's log on stderr: with rich on a terminal, else as plain lines."""
    logger = logging.getLogger("opnp")
    if logger.handlers:
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = Console(stderr=True, soft_wrap=True)
        logger.addHandler(RichHandler(console=console, show_time=False, show_path=False))
    else:
        logger.addHandler(Lines())
    logger.setLevel(logging.INFO)
    logger.propagate = False  # Prefect's handler of the root logger would show it once more
