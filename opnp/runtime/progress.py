"""Progress of long work: a bar with rate and ETA on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
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

__all__ = ["counting", "track"]

T = TypeVar("T")

LINE_EVERY = 10.0  # seconds between plain lines


class Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.3g}/s")


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield ``items``, of which there are ``total``, and show the progress."""
    with counting(description, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def counting(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that reports the number of further finished items, out of ``total``."""
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
            yield partial(progress.advance, progress.add_task(description, total=total))
        return
    done, start, ended = 0, time.monotonic(), threading.Event()

    def advance(more: int) -> None:
        nonlocal done
        done += more

    def tell() -> None:
        # In its own thread: items may come hundreds at a time, and then none for a while.
        told, since, over = 0, start, False
        while not over:
            over = ended.wait(LINE_EVERY)
            now = time.monotonic()
            if done == told or now - start < 1:
                continue
            rate = done / (now - start) if over else (done - told) / (now - since)
            left = (total - done) / rate
            console.print(f"{description}: {done}/{total}, {rate:.3g}/s, {left:.0f} s left")
            told, since = done, now

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield advance
    finally:
        ended.set()
        teller.join()
