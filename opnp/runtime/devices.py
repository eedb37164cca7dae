"""The device of a worker (a GPU of its own where there are any, else the CPU), used so that the
same input gives the same bits."""

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from filelock import BaseFileLock, FileLock, Timeout

# cuBLAS is deterministic only with a workspace of fixed size, stated before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__all__ = ["claim", "deterministic", "device"]

worker = threading.local()


def device() -> torch.device:
    """The device of this worker, be it a thread or a process; the same for as long as it lives."""
    if not hasattr(worker, "device"):
        names = [
            str(torch.cuda.get_device_properties(index).uuid)
            for index in range(torch.cuda.device_count())
        ]
        worker.device = torch.device("cpu")
        if names:
            index, worker.claim = claim(names)
            worker.device = torch.device("cuda", index)
    return worker.device


def claim(names: Sequence[str], folder: Path | None = None) -> tuple[int, BaseFileLock]:
    """Take the first of several GPUs that fewest workers of this machine hold.

    Locks of files do it, since they need no agreement between thread pools, process pools, Dask and
    dask-cuda (which shows each worker all GPUs, its own first), and end with their holder, even if
    it is killed.

    Args:
        names: of the visible GPUs, the same for all workers of the machine, in any order.
        folder: where the locks lie; by default a temporary one of this user.

    Returns:
        The position of the GPU among ``names``, and the lock: the claim ends when it is released.
    """
    if folder is None:
        folder = Path(tempfile.gettempdir()) / f"opnp-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for share in count():
        for index, name in enumerate(names):
            lock = FileLock(folder / f"{name}.{share}.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                continue
            return index, lock
    raise AssertionError("unreachable")


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Run with deterministic algorithms and a fixed number of threads of this thread's kernels.

    The order in which a kernel sums depends on how many threads share it, so bits that should not
    depend on the machine's load or size need a fixed number. That number is each Python thread's
    own; the choice of algorithms is the process's, and stays, since tasks overlap in time.
    """
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.allow_tf32 = False  # of 10 bits, where the CPU's float32 has 23
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
