"""The device of a worker: its own GPU if the machine has any, otherwise the CPU.

The device is used so that the same input gives the same bits.
"""

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from filelock import BaseFileLock, FileLock, Timeout

# cuBLAS is deterministic only with a workspace of fixed size, set before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__all__ = ["claim", "deterministic", "device"]

worker = threading.local()


def device() -> torch.device:
    """The device of this worker, a thread or a process; it never changes."""
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
    """Claim the first of the GPUs that are held by the fewest workers of this machine.

    Claims are file locks. They need no coordination between thread pools, process pools, Dask and
    dask-cuda (which shows each worker all GPUs, its own first), and they end with their holder,
    even if it is killed.

    Args:
        names: unique names of the visible GPUs, the same for all workers but in any order.
        folder: folder of the locks; by default a temporary folder of this user.

    Returns:
        The GPU's position in ``names``, and the lock, whose release ends the claim.
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
    """Run the block with deterministic algorithms and a fixed number of kernel threads.

    A kernel's order of summation depends on its number of threads, so results that must not depend
    on the machine's load or size need a fixed number. The number applies to the calling Python
    thread. The choice of algorithms applies to the process and stays, since tasks overlap in time.

    Args:
        threads: number of threads of each kernel.
    """
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.allow_tf32 = False  # has 10 bits of precision, float32 on the CPU 23
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
