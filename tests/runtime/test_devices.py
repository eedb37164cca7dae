"""Which GPU a worker takes: locks decide, and go with their holder, however that ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opnp.runtime.devices import claim

GPUS = ["GPU-a", "GPU-b"]


def test_two_workers_take_two_gpus_and_a_third_shares(tmp_path: Path) -> None:
    claims = [claim(GPUS, tmp_path) for _ in range(3)]
    assert [index for index, _ in claims] == [0, 1, 0]
    assert len({lock.lock_file for _, lock in claims}) == 3


def test_the_fourth_takes_the_one_that_fewest_hold(tmp_path: Path) -> None:
    held = [claim(GPUS, tmp_path) for _ in range(4)]
    assert [index for index, _ in held] == [0, 1, 0, 1]


def test_a_gpu_that_was_given_back_is_taken_again(tmp_path: Path) -> None:
    (_, first), second = claim(GPUS, tmp_path), claim(GPUS, tmp_path)
    first.release()
    assert claim(GPUS, tmp_path)[0] == 0
    assert second[1].is_locked


def test_names_in_another_order_are_the_same_gpus(tmp_path: Path) -> None:
    """As dask-cuda shows them: to each worker its own first."""
    first = claim(GPUS, tmp_path)
    second = claim(GPUS[::-1], tmp_path)
    assert (first[0], second[0]) == (0, 0)
    assert Path(first[1].lock_file).name != Path(second[1].lock_file).name


def test_a_gpu_of_another_process_is_free_when_that_is_killed(tmp_path: Path) -> None:
    words = (
        "import sys; from pathlib import Path; from opnp.runtime.devices import claim; "
        "held = claim(sys.argv[2:], Path(sys.argv[1])); "
        "print(held[0], flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", words, tmp_path, *GPUS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout
    assert other.stdout.readline() == b"0\n"
    mine = claim(GPUS, tmp_path)
    assert mine[0] == 1
    other.kill()
    other.wait()
    assert claim(GPUS, tmp_path)[0] == 0


def test_locks_lie_in_a_folder_of_the_user_even_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under any number."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 123456789)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    _, lock = claim(GPUS)
    assert Path(lock.lock_file) == tmp_path / "opnp-123456789" / "GPU-a.0.lock"
