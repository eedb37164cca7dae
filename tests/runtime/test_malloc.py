"""What is freed is used again, in every thread of a program."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, threading
import numpy as np
{first}

def work():
    for _ in range(2):  # the second time, all pages are there
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            np.ones(100_000_000, np.uint8)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults = []
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
    thread.join()
print(max(faults[1::2]))
"""


@pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the C library is not glibc"
)
def test_freed_memory_is_not_mapped_again() -> None:
    def faults(first: str) -> int:
        env = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
        words = [sys.executable, "-c", FAULTS.format(first=first)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("import flows") < 100
    assert faults("from opnp.runtime import malloc; malloc.keep()") < 100
    assert faults("") > 1000
    assert faults("import os; os.environ['MALLOC_ARENA_MAX'] = '9'; import flows") > 1000
