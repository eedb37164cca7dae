"""Progress where there is no terminal: plain lines, at most one in a while."""

import re
from types import SimpleNamespace

import pytest

from opnp.runtime import progress


def test_lines_say_how_far_the_work_has_come(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    times = iter([0.0, *(10.0 * each for each in range(1, 1000))])
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr("opnp.runtime.progress.time", clock)
    with progress.counting("images", 500) as advance:
        said = ""
        advance(100)
        while not said:
            said += capsys.readouterr().err
        advance(400)
    lines = (said + capsys.readouterr().err).splitlines()
    found = [re.fullmatch(r"images: (\d+)/500, ([\d.]+)/s, (\d+) s left", line) for line in lines]
    assert all(found), lines
    assert [each[1] for each in found if each] == ["100", "500"]
    assert found[-1] is not None
    assert found[-1][3] == "0"


def test_short_work_and_no_work_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track("abc", "letters", 3)) == ["a", "b", "c"]
    assert list(progress.track("", "letters", 0)) == []
    assert capsys.readouterr().err == ""


def test_what_ends_the_work_ends_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="no"), progress.counting("images", 500):
        raise OSError("no")
    assert capsys.readouterr().err == ""
