"""The pipeline killed at random moments, and stopped by signals: what is made in the end has the
same bits, and no whole shard is made twice.

In a new clone of this repository ``python -m flows.pipeline`` runs on the digits in small shards to
its end. In another clone it is killed again and again (SIGKILL to it, its children and its own
Prefect server), each time when as many shards are there as were drawn, up to 20 ms later; every run
goes on from what the last has left. SIGINT and SIGTERM stop it in between, and the last run runs to
its end. Shards take so little time that runs overshoot: what is there beyond the number drawn for
the next run is removed before it. What is committed here is run, with this interpreter's packages.
Goals: the same bits, no whole shard made twice, and signals that end a run in one sentence. Where
one is missed the exit code is 1.

Run ``python -m benchmarks.faults [--kills N] [--seed N] [--json]``; a kill costs about 15 s.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from ruamel.yaml import YAML

from benchmarks import timing
from opnp.runtime.files import digest
from opnp.workspace import Workspace

__all__ = ["main"]

ROOT = Path(__file__).parents[1]

# Many shards of few images; a search and a comparison of seconds.
PARAMETERS: dict[str, dict[str, Any]] = {
    "features": {"shard_size": 16},
    "search": {
        "proxies": ["blobs", "phase"],
        "weights_low": [0],
        "weights_high": [0, 2],
        "neurons_low": [0, 10],
        "neurons_high": [0, 5],
        "bootstrap": 20,
    },
    "evaluate": {"detectors": ["energy", "opnp"], "budget": 2, "bootstrap": 20},
}
IN_CLONE = Workspace(Path())  # paths within a clone
RESULTS = (IN_CLONE.sensitivity, IN_CLONE.clips, IN_CLONE.mask, IN_CLONE.metrics)
SENTENCE = "interrupted: run again to go on"
LIMIT = 300.0  # seconds that a single run may take


def clone(folder: Path) -> None:
    """A new clone of the repository with the parameters above."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    path, yaml = folder / "params.yaml", YAML()
    document = yaml.load(path)
    for section, values in PARAMETERS.items():
        document[section].update(values)
    yaml.dump(document, path)


def shards(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every shard and every sum of one, which are there whole or not at all: inode and time."""
    found = {}
    for stage in ("features", "sensitivity"):
        for path in (folder / "artifacts" / stage).glob("**/[0-9]*.[as]*"):
            with suppress(FileNotFoundError):  # one that was just removed
                status = path.stat()
                found[path.relative_to(folder)] = (status.st_ino, status.st_mtime_ns)
    return found


@contextmanager
def pipeline(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """The program in a group of its own, which is killed with the block, its server included."""
    named = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if name not in named}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    with open(folder / "output.txt", "w") as output, open(folder / "errors.txt", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.pipeline"],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for each in family(process):
                each.kill()
            process.wait()


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """A process that lives and all it has started, in whatever group."""
    if process.poll() is not None:
        return []
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def wait_until(done: Callable[[], Any]) -> None:
    """Look every few milliseconds.

    Raises:
        SystemExit: it takes longer than any run may.
    """
    deadline = time.monotonic() + LIMIT
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit(f"a run took longer than {LIMIT:g} s")
        time.sleep(0.002)


def finish(folder: Path) -> float:
    """Run to the end; the wall time in seconds.

    Raises:
        SystemExit: the run failed.
    """
    start = time.perf_counter()
    with pipeline(folder) as process:
        wait_until(lambda: process.poll() is not None)
    if process.returncode:
        raise SystemExit(f"flows.pipeline failed:\n{(folder / 'errors.txt').read_text()}")
    return time.perf_counter() - start


def digests(folder: Path) -> dict[Path, str]:
    return {path: digest(folder / path) for path in (*shards(folder), *RESULTS)}


class Interrupted:
    """What runs in a folder that were ended early have left behind, and have done wrong."""

    def __init__(self, folder: Path, drawn: random.Random) -> None:
        self.folder, self.drawn = folder, drawn
        self.kept = shards(folder)
        self.twice: set[Path] = set()
        self.moments: Counter[str] = Counter()
        self.seconds: list[float] = []

    def end(self, aim: int, number: signal.Signals) -> tuple[int, str, int]:
        """Start a run and end it when it has made more than ``aim`` shards, or shortly after.

        Returns:
            Its exit code, its last words, and how many processes it has left behind.
        """
        start = time.perf_counter()
        with pipeline(self.folder) as process:
            wait_until(lambda: len(shards(self.folder)) > aim or process.poll() is not None)
            time.sleep(self.drawn.uniform(0, 0.02))
            if process.poll() is not None:
                raise SystemExit("a run ended before it could be ended: draw with another --seed")
            members = family(process)
            if number == signal.SIGKILL:
                for each in members:
                    each.kill()
            else:
                process.send_signal(number)
            process.wait(LIMIT)
            _, left = psutil.wait_procs(members[1:], timeout=15)
        self.seconds.append(time.perf_counter() - start)
        self.look()
        lines = (self.folder / "errors.txt").read_text().splitlines()
        return process.returncode, lines[-1] if lines else "", len(left)

    def make_room(self, aim: int) -> None:
        """Remove the last shards, where a run has made more than ``aim`` before it was ended."""
        by_stage = sorted(self.kept, key=lambda path: (path.suffix == ".safetensors", path))
        for path in by_stage[aim:]:
            (self.folder / path).unlink()
            del self.kept[path]

    def look(self) -> None:
        """Note which shards were made again since the last look."""
        found = shards(self.folder)
        self.twice |= {path for path in self.kept if found.get(path) != self.kept[path]}
        sums = [path for path in found if path.is_relative_to(IN_CLONE.sensitivity.parent)]
        self.moments["sensitivity" if sums else "features"] += 1
        self.kept = found


def measured(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill and stop the pipeline in a clone, and compare with an undisturbed one."""
    drawn, calm, rough = random.Random(seed), folder / "calm", folder / "rough"
    clone(calm)
    undisturbed = finish(calm)
    expected = digests(calm)
    total = len(shards(calm))

    clone(rough)
    runs = Interrupted(rough, drawn)
    ends = [signal.SIGKILL] * kills + [signal.SIGINT, signal.SIGTERM]
    drawn.shuffle(ends)
    # Two moments of three in features, of which there are more; none so late that all are there.
    first = total - len([*calm.glob("artifacts/sensitivity/shards/*")])
    late = len(ends) // 3
    aims = drawn.sample(range(first - 4), len(ends) - late)
    aims += drawn.sample(range(first, total - 6), late)
    told: dict[signal.Signals, tuple[int, str, int]] = {}
    for aim, number in zip(sorted(aims), ends, strict=True):
        runs.make_room(aim)
        told[number] = runs.end(aim, number)
        begun = f"{number.name} at {len(runs.kept)} of {total} shards, in {runs.seconds[-1]:.0f} s"
        print(f"{begun}; made twice so far: {len(runs.twice)}", file=sys.stderr, flush=True)
    last = finish(rough)
    runs.look()
    assert not [*rough.glob("artifacts/**/*.part")]
    found = digests(rough)
    differ = [path for path in expected if found.get(path) != expected[path]]
    stopped = [
        told[number] == (128 + number, SENTENCE, 0) for number in (signal.SIGINT, signal.SIGTERM)
    ]
    return {
        "shards": total,
        "killed": kills,
        "ended_after_shards_of": [{"stage": s, "runs": n} for s, n in runs.moments.items()],
        "seconds_undisturbed": undisturbed,
        "seconds_of_an_interrupted_run": median(runs.seconds),
        "seconds_of_the_last_run": last,
        "signals": [
            {"signal": number.name, "exit code": code, "last words": words, "left behind": left}
            for number, (code, words, left) in told.items()
            if number != signal.SIGKILL
        ],
        "goals": [
            timing.goal("no whole shard is made twice", len(runs.twice), not runs.twice),
            timing.goal(
                "files that differ from those of an undisturbed run: none", len(differ), not differ
            ),
            timing.goal(
                "SIGINT and SIGTERM end with codes 130 and 143, one sentence, and no process left",
                sum(stopped),
                all(stopped),
            ),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a command in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # else its runs ignore it too
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder), arguments.kills, arguments.seed)
    timing.show(result, arguments.json, "faults")
    if not all(goal["met"] for goal in result["goals"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
