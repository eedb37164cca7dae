"""The one program: its help, its exit codes, and what each command needs."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import opnp
from flows.pipeline import STAGES
from opnp.cli import app
from tests.conftest import new_workspace, run_program


def every_command(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for name, each in getattr(command, "commands", {}).items():
        yield from every_command(each, (*words, name))


COMMANDS = list(every_command(get_command(app.app)))


def called(
    patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int | str | None, str]:
    """The exit code, or the sentence, and what is printed."""
    patch.setattr(sys, "argv", ["opnp", *words])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return stop.value.code, capsys.readouterr().out


def test_the_commands() -> None:
    assert {words[0] for words in COMMANDS if words} == {
        "run", "stage", "retrain", "monitor", "compare",
        "fit", "score", "evaluate", "show", "export",
        "register", "promote", "rollback", "serve",
    }  # fmt: skip
    assert [words[1] for words in COMMANDS if words[:1] == ("stage",) and words[1:]] == [*STAGES]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_fits_a_terminal(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text = called(monkeypatch, capsys, *words, "--help")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("Exit codes:") == (words != ("stage",))


def test_help_shows_whole_summaries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, text = called(monkeypatch, capsys, "--help")
    whole = " ".join(text.split())
    group: Any = get_command(app.app)
    for name, command in group.commands.items():
        assert f"{name} {' '.join(command.help.partition(chr(10) * 2)[0].split())} " in whole


def test_help_marks_what_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, count in ((("score",), 3), (("evaluate",), 3), (("monitor",), 1), (("show",), 1)):
        _, text = called(monkeypatch, capsys, *words, "--help")
        assert text.count("[required]") == count, words


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, capsys, "--version") == (0, f"opnp {opnp.__version__}\n")


def test_help_and_version_need_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys; from opnp.cli.app import app;"
        f"[app([*words, '--help'], standalone_mode=False) for words in {COMMANDS}];"
        "heavy = {'torch', 'mlflow', 'prefect', 'dvc', 'pyarrow', 'numpy', 'flows'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = run_program("python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lacking", ["prefect", "dvc"])
@pytest.mark.parametrize("words", [("run",), ("stage", "train"), ("retrain",), ("monitor", ".")])
def test_without_the_pipeline_it_says_how_to_install_it(
    words: tuple[str, ...], lacking: str, tmp_path: Path
) -> None:
    code = (
        f"import sys; sys.modules[{lacking!r}] = None;"
        f"sys.argv = {['opnp', *words]}; from opnp.cli.app import main; main()"
    )
    done = run_program("python", "-c", code, cwd=tmp_path)
    assert done.returncode == 1
    said = f"error: `opnp {words[0]}` needs the pipeline: pip install 'opnp[pipeline]'.\n"
    assert done.stderr == said


@pytest.mark.parametrize("words", [("shw",), ("show",), ("show", ".", "--jsn"), ("stage", "serch")])
def test_wrong_options_exit_with_2(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, capsys, *words)[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("opnp", "stage", "search"), "run `opnp stage train`.\n"),
        (("python", "-m", "flows.search"), "run `python -m flows.train`.\n"),
    ],
)
def test_remedies_are_in_the_words_of_the_program(
    words: tuple[str, ...], said: str, tmp_path: Path, prefect_api: str
) -> None:
    """In a workspace where nothing is made yet."""
    done = run_program(*words, cwd=new_workspace(tmp_path), env={"PREFECT_API_URL": prefect_api})
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_broken_pipe_ends_quietly(tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "opnp"
    with subprocess.Popen(
        [program, "fit", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    code = (
        "import sys; from opnp.cli import app, detector; detector.describe = lambda of: 'x';"
        "sys.argv = ['opnp', 'show', '.']; detector.loaded = lambda *_: type('D', (), "
        "{'describe': lambda _: {}})(); app.main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_the_exit_code_and_leaves_no_litter(
    number: signal.Signals, tmp_path: Path
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from opnp.cli import app, detector;"
        "from opnp.runtime.files import atomic\n"
        "def slow(*_):\n"
        "    with atomic(Path('made')) as temporary:\n"
        "        temporary.write_text('half')\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(600)\n"
        "detector.loaded = slow; sys.argv = ['opnp', 'show', '.']; app.main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert told == b""
    assert not list(tmp_path.iterdir())
