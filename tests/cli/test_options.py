"""Options made from settings: what is given, what is told, and what is refused."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field, model_validator
from typer.testing import CliRunner

from opnp.cli.options import parsed, settings_of, takes, written
from opnp.deployment.settings import FitSettings
from opnp.errors import InputError
from opnp.runtime.settings import Settings, Several


class Kinds(Settings):
    """A field of each kind."""

    shares: Annotated[Several[Annotated[float, Field(ge=0)] | None], Field(min_length=1)] = Field(
        default=(None, 0.5, 20), description="Shares; null: none."
    )
    names: Several[Literal["left", "right"]] = Field(default=("left",), description="Names.")
    side: Literal["left", "right"] = Field(default="right", description="A side.")
    count: Annotated[int, Field(gt=0)] = Field(default=3, description="A count.")
    most: float | None = Field(default=None, description="The most.")
    title: str | None = Field(default=None, description="A title.")
    fast: bool = Field(default=False, description="Whether to hurry.")

    @model_validator(mode="after")
    def consistent(self) -> "Kinds":
        if self.most is not None and self.count > self.most:
            raise ValueError(f"`count` {self.count} exceeds `most` {self.most:g}")
        return self


@pytest.fixture
def run() -> Callable[..., Any]:
    """Run a command that takes `Kinds` beside an option of its own, and get what it was given."""
    app, seen = typer.Typer(rich_markup_mode=None), []

    @app.command()
    @takes(Kinds)
    def command(
        out: Annotated[str, typer.Option(help="Where.")], *, settings: Kinds, quiet: bool = False
    ) -> None:
        seen.append((out, settings, quiet))

    def call(*words: str) -> Any:
        seen.clear()
        done = CliRunner().invoke(app, [*words], env={"COLUMNS": "200", "TERM": "dumb"})
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return seen[0] if seen else done.output

    return call


def test_without_options_the_defaults_hold(run: Callable[..., Any]) -> None:
    out, settings, quiet = run("--out", "here")
    assert (out, quiet) == ("here", False)
    assert settings == Kinds()
    assert settings.model_fields_set == set()


def test_what_is_given_arrives_with_its_type(run: Callable[..., Any]) -> None:
    _, settings, quiet = run(
        *("--out", "here", "--quiet", "--shares", "none, 1,2.5", "--names", "left,right"),
        *("--side", "left", "--count", "7", "--most", "9", "--title", "5", "--fast"),
    )
    assert quiet
    assert settings == Kinds(
        shares=[None, 1.0, 2.5],
        names=["left", "right"],
        side="left",
        count=7,
        most=9.0,
        title="5",
        fast=True,
    )
    assert settings.model_fields_set == set(Kinds.model_fields)
    assert run("--out", "here", "--most", "none", "--no-fast")[1] == Kinds()


def test_help_tells_meaning_and_default(run: Callable[..., Any]) -> None:
    text = " ".join(run("--help").split())
    for told in (
        "--shares NUMBER,… Shares; none: none. [default: none,0.5,20]",
        "--names NAME,… Names. [default: left]",
        "--side left|right A side. [default: right]",
        "--count NUMBER A count. [default: 3]",
        "--most NUMBER The most. [default: none]",
        "--title NAME A title. [default: none]",
        "--fast / --no-fast Whether to hurry. [default: off]",
    ):
        assert told in text
    assert "settings" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shares", "1,-2"), "--shares: input should be greater than or equal to 0 (it is -2)."),
        (("--shares", "1,x"), "--shares: input should be a valid number (it is 'x')."),
        (("--shares", ""), "--shares: input should be a valid number (it is '')."),
        (("--shares", "nan"), "--shares: input should be a finite number (it is nan)."),
        (("--names", "up"), "--names: input should be 'left' or 'right' (it is 'up')."),
        (("--count", "2.5"), "--count: input should be a valid integer (it is 2.5)."),
        (("--count", "9" * 5000), "--count: input should be a valid integer (it is inf)."),
        (("--count", "none"), "--count: input should be a valid integer (it is 'none')."),
        (("--count", "5", "--most", "4"), "--count 5 exceeds --most 4."),
    ],
)
def test_mistakes_name_the_option(
    words: tuple[str, ...], said: str, run: Callable[..., Any]
) -> None:
    with pytest.raises(InputError) as stop:
        run("--out", "here", *words)
    assert str(stop.value) == said


def test_every_default_is_what_its_option_would_give() -> None:
    """So the default that help shows can be typed."""
    for name, field in FitSettings.model_fields.items():
        default = field.get_default()
        shown = written(default)
        assert getattr(settings_of(FitSettings, {name: shown}), name) == default, name


def test_a_word_that_is_no_text_is_left_alone() -> None:
    assert parsed(True, bool) is True
    assert parsed("0010", int) == 10
    assert parsed("1e3", float) == 1000
