"""Progress of long work: a bar with rate and ETA on a terminal, plain lines otherwise."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["track"]

T = TypeVar("T")

LINE_EVERY = 10.0  # seconds between plain lines


class Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.3g}/s")


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield ``items``, ``total`` of them, showing how far the work has come."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            yield from progress.track(items, total, description=description)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_EVERY or (done == total and now - start >= 1):
            rate = done / (now - start)
            left = (total - done) / rate
            console.print(f"{description}: {done}/{total}, {rate:.3g}/s, {left:.0f} s left")
            last = now
