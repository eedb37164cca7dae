"""Retraining and monitor on a real Prefect server that keeps the schedule; the page's commands."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows import monitor, prefect_server
from flows.process import command
from opnp.cli import app
from opnp.cli.pipeline import BEYOND
from opnp.data.sources import open_ood
from opnp.errors import InputError
from opnp.tracking import registry
from tests.conftest import new_workspace, run_program, set_parameters
from tests.flows.test_pipeline import SMALLEST
from tests.test_docs import commands, python

# Every command of the page: one more, or one less, and this module does not load.
(
    ONCE,
    BACK,
    SERVER,
    NAMED,
    SERVE,
    POOL,
    DEPLOY,
    WORKER,
    NOW,
    MONITOR,
    SERVE_MONITOR,
) = commands("retraining.md")
(BEING_TOLD,) = python("retraining.md")

LIMIT = 600.0  # seconds for whatever is waited for, on a machine that may be busy

# How often the server looks for runs to schedule, and the others for those that are due: in
# seconds, not in minutes.
HASTE = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
    "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
}


def every(words: Sequence[str], seconds: int) -> list[str]:
    """The command with a short interval in place of its schedule."""
    assert words[-2] == "--cron"
    return [*words[:-2], "--interval", str(seconds)]


def until(condition: Callable[[], Any], *logs: Path) -> None:
    late = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < late, "\n".join(log.read_text() for log in logs)
        time.sleep(0.2)


@contextmanager
def started(
    words: Sequence[str], cwd: Path, env: dict[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A command that stays, with those that it starts, for as long as the block lasts."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = str(Path(sys.executable).parent / words[0])
    with log.open("ab") as file:
        process = subprocess.Popen(
            [program, *words[1:]],
            cwd=cwd,
            env={**os.environ, "PATH": path, **env},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Prefect server of this module's own, its services on."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert NAMED == ["export", "PREFECT_API_URL=http://127.0.0.1:4200/api"]
    url = NAMED[1].removeprefix("PREFECT_API_URL=").replace("4200", str(port))
    env = {"PREFECT_HOME": str(home), "PREFECT_API_URL": url, **HASTE}
    log = home / "server.log"
    with started([*SERVER, "--port", str(port)], home, env, log) as process:
        until(lambda: process.poll() is not None or prefect_server.answers(url), log)
        assert process.poll() is None, log.read_text()
        yield env


def runs(env: dict[str, str], deployment: str, *states: str) -> list[Any]:
    """Its runs that have come to one of these states, or been completed."""
    chosen = {
        "deployments": {"name": {"any_": [deployment]}},
        "flow_runs": {"state": {"type": {"any_": states or ["COMPLETED"]}}},
    }
    answer = httpx.post(f"{env['PREFECT_API_URL']}/flow_runs/filter", json=chosen, timeout=60)
    return list(answer.raise_for_status().json())


def aliases(folder: Path) -> dict[str, str]:
    from mlflow import MlflowClient

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    return registry.aliases_of(MlflowClient(uri, registry_uri=uri), "opnp")


@pytest.fixture(scope="module")
def place(scheduler: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which a schedule has made a first champion, and run once more."""
    folder = new_workspace(tmp_path_factory.mktemp("place"), {**SMALLEST, "train.epochs": 1})
    log = folder / "served.txt"
    with started(every(SERVE, 5), folder, scheduler, log) as served:
        until(lambda: served.poll() is not None or len(runs(scheduler, "retrain")) > 1, log)
        served.terminate()
        assert served.wait(LIMIT) == 128 + signal.SIGTERM, log.read_text()
    return folder


@pytest.mark.slow
def test_a_schedule_makes_a_champion_and_then_nothing_more(
    place: Path, scheduler: dict[str, str]
) -> None:
    printed = (place / "served.txt").read_text()
    assert printed.startswith("retrain is served and runs every 5 s; `prefect deployment run ")
    assert printed.endswith("interrupted: run again to go on\n")
    assert printed.count("retrain: version 1 promoted") == 1
    assert "retrain: version 1 has been judged before" in printed
    assert "Traceback" not in printed
    assert not runs(scheduler, "retrain", "FAILED", "CRASHED", "PENDING", "RUNNING")
    done = run_program(*ONCE, cwd=place, env=scheduler)
    assert done.returncode == 0, done.stderr
    assert "retrain: version 1 has been judged before" in done.stdout
    assert aliases(place)["champion"] == "1"


@pytest.mark.slow
def test_a_worker_runs_what_is_deployed_at_once_and_when_it_is_time(
    place: Path, scheduler: dict[str, str]
) -> None:
    def done(*words: str) -> None:
        found = run_program(*words, cwd=place, env={**scheduler, "PWD": str(place)})
        assert found.returncode == 0, found.stdout + found.stderr

    def completed(scheduled: bool) -> list[Any]:
        found = runs(scheduler, "retrain")
        return [
            run for run in found if run["work_pool_name"] and run["auto_scheduled"] == scheduled
        ]

    done(*POOL)
    done(*DEPLOY)
    log = place / "worker.txt"
    with started(WORKER, place, scheduler, log):
        done(*NOW)
        until(lambda: completed(scheduled=False), log)
        path = place / "prefect.yaml"
        nightly = 'cron: "0 2 * * *"\n        timezone: UTC\n'
        assert nightly in path.read_text()
        path.write_text(path.read_text().replace(nightly, "interval: 10\n"))
        done(*DEPLOY)
        until(lambda: completed(scheduled=True), log)
    assert "retrain: version 1 has been judged before" in log.read_text()
    assert not runs(scheduler, "retrain", "FAILED")


@contextmanager
def listening(told: list[str]) -> Iterator[int]:
    """A port of loopback, and what is posted there."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield listener.server_port
        finally:
            listener.shutdown()
            thread.join()


def put_noise(folder: Path, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    for row, (image, _) in zip(range(30), open_ood("noise", 8, seed), strict=False):
        image.save(folder / f"{seed}-{row}.png")


@pytest.mark.slow
def test_the_monitor_has_a_better_champion_made_which_one_command_takes_back(
    place: Path, scheduler: dict[str, str]
) -> None:
    set_parameters(
        place, {"train.epochs": 15, "retrain.min_images": 20, "retrain.max_flagged": 0.0}
    )
    put_noise(place / "recent", 0)
    log, watched, told = place / "again.txt", place / "watched.txt", list[str]()
    with (
        started(SERVE, place, scheduler, log),
        started(every(SERVE_MONITOR, 5), place, scheduler, watched),
        listening(told) as port,
    ):
        code = BEING_TOLD.replace("9000", str(port))
        assert code != BEING_TOLD
        done = run_program("python", "-c", code, cwd=place, env=scheduler)
        assert done.returncode == 0, done.stderr
        until(lambda: "is asked for" in watched.read_text(), watched, log)
        until(lambda: "retrain: version 2 promoted" in log.read_text(), watched, log)
        until(lambda: told, log)
        assert told == ["opnp.detector.opnp.2"]
        (asked,) = re.findall(r"monitor: retraining (\S+) is asked for", watched.read_text())
        until(lambda: asked in [run["name"] for run in runs(scheduler, "retrain")], log)
    assert aliases(place)["champion"] == "2"
    assert "monitor: 0 new images" in watched.read_text()

    put_noise(place / "recent", 1)
    done = run_program(*MONITOR, cwd=place, env=scheduler)
    assert done.returncode == BEYOND, done.stdout + done.stderr
    assert "is asked for" in done.stdout
    done = run_program(*MONITOR, cwd=place, env=scheduler)
    assert done.returncode == 0, done.stderr
    assert "0 new images" in done.stdout

    done = run_program(*BACK, cwd=place)
    assert done.returncode == 0, done.stderr
    assert aliases(place)["champion"] == "1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--serve"], "--serve needs either --cron or --interval"),
        (["--cron", "0 2 * * *"], "--cron and --interval need --serve"),
        (["--serve", "--cron", "0 2 * * *", "--interval", "5"], "either --cron or --interval"),
        (["--serve", "--interval", "0"], "--interval takes a number of seconds above 0"),
        (["--serve", "--interval", "5"], "--serve needs a Prefect server: name it"),
    ],
)
@pytest.mark.parametrize("flow", ["retrain", "monitor"])
def test_options_that_do_not_go_together(
    flow: str,
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prefect_server, "named", lambda: None)
    folder = ["recent"] if flow == "monitor" else []
    monkeypatch.setattr(sys, "argv", ["command", *folder, *words])
    with pytest.raises(SystemExit) as stop:
        command(flow)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_what_is_no_schedule(
    prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(new_workspace(tmp_path))
    monkeypatch.setattr(sys, "argv", ["opnp", "retrain", "--serve", "--cron", "at two"])
    with pytest.raises(SystemExit, match="error: --cron is not a schedule: 'at two'"):
        app.main()


def test_a_run_that_was_due_tells_why_it_fails(
    prefect_api: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(new_workspace(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(InputError, match="There is no champion"):
        monitor.monitor(Path("recent"))
    assert "error: There is no champion to score with: run" in capsys.readouterr().err
