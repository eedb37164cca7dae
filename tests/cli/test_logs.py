"""Programs show what the library logs."""

import io
import logging

import pytest

from opnp.cli import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_records_are_plain_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        logs.show()
    logging.getLogger("opnp.data.x").warning("%s is [red] left out", "y")
    logging.getLogger("opnp.data.x").debug("details")
    assert capsys.readouterr() == ("", "y is [red] left out\n")


def test_a_terminal_shows_the_level_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    logs.show()
    logging.getLogger("opnp.data.x").warning("y is left out")
    assert "WARNING" in terminal.getvalue()
    assert "y is left out" in terminal.getvalue()


def test_without_a_program_the_library_adds_no_handler() -> None:
    assert not logging.getLogger("opnp").handlers
