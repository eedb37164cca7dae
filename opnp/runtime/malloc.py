"""Memory that this process has freed stays with it, for the next tensor of that size."""

import ctypes
import os

__all__ = ["keep"]

# Parameters of glibc's mallopt(3), the environment variables that say the same to processes which
# this one starts, and what keeps all memory in one heap that is never cut back.
SETTINGS = (
    (-8, "MALLOC_ARENA_MAX", 1),  # a thread's own heap gives large blocks back whatever else is set
    (-4, "MALLOC_MMAP_MAX_", 0),
    (-1, "MALLOC_TRIM_THRESHOLD_", 2**31 - 1),
)


def keep() -> None:
    """Keep freed memory, in this process and those that it starts; to be called before threads are.

    By default every large tensor is mapped anew, and the system clears its pages again: on a CPU
    this takes up to twice as long as the forward pass that the tensors are of. What is set in the
    environment wins, and where the C library is not glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name in os.environ for _, name, _ in SETTINGS):
        return
    for parameter, name, value in SETTINGS:
        mallopt(parameter, value)
        os.environ[name] = str(value)
