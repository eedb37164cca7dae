"""How errors are worded."""

import pickle

import pytest

from opnp.errors import InputError, MissingError, did_you_mean, first_line


def test_an_error_keeps_what_it_is_about_between_processes() -> None:
    error = pickle.loads(pickle.dumps(MissingError("x is missing.", "stage:train")))
    assert isinstance(error, MissingError)
    assert (str(error), error.about) == ("x is missing.", "stage:train")
    assert InputError("x is missing.").about is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n\n  one  \ntwo"), "one"),
        (ValueError("\x1b[1m\x1b[38;5;196mone\x1b[0m two"), "one two"),
        (ValueError("\x1b]8;;file:///a\x1b\\one\x1b]8;;\x07"), "one"),
        (ValueError(), "ValueError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_did_you_mean() -> None:
    known = ["msp", "mdp", "msr", "msq", "energy"]
    assert did_you_mean("enrgy", known) == "did you mean energy?"
    assert did_you_mean("msx", known) == "did you mean msr, msq or msp?"
    assert did_you_mean("m", ["mno", "energy"], "`timm:{}`") == "did you mean `timm:mno`?"
    assert did_you_mean("zzzzzz", known).count(",") == 0
