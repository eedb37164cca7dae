"""Keep freed memory in this process, for the next tensor of the same size."""

import ctypes
import os

__all__ = ["keep"]

# Parameters of glibc's mallopt(3), the environment variables that set the same in child processes,
# and the values that keep all memory in one heap that never shrinks.
SETTINGS = (
    (-8, "MALLOC_ARENA_MAX", 1),  # heaps of other threads always return large blocks
    (-4, "MALLOC_MMAP_MAX_", 0),
    (-1, "MALLOC_TRIM_THRESHOLD_", 2**31 - 1),
)


def keep() -> None:
    """Keep freed memory in this process and its children; call it before starting threads.

    By default, each large tensor gets newly mapped pages, which the system must clear. On a CPU,
    this can take twice as long as the forward pass that makes the tensors. Settings in the
    environment take precedence, and a C library other than glibc is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name in os.environ for _, name, _ in SETTINGS):
        return
    for parameter, name, value in SETTINGS:
        mallopt(parameter, value)
        os.environ[name] = str(value)
