"""How every command runs, tells errors and prints its help."""

import inspect
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import opnp
from opnp.cli import logs
from opnp.cli.remedies import called_as, tell
from opnp.errors import InputError

__all__ = ["EXIT_CODES", "Command", "Group", "new_app"]

EXIT_CODES = "Exit codes: 0, done; 1, the input is at fault; 2, wrong options."


HYPHEN = "\N{NON-BREAKING HYPHEN}"


class Formatter(typer.Context.formatter_class):  # type: ignore[misc, valid-type]
    """Help whose lines do not break within ``--an-option``."""

    def write(self, string: str) -> None:
        super().write(string.replace(HYPHEN, "-"))

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", HYPHEN))

    def write_dl(self, rows: Any, *sizes: int, **named: int) -> None:
        kept = [(first, second.replace("-", HYPHEN)) for first, second in rows]
        super().write_dl(kept, *sizes, **named)


class Context(typer.Context):
    formatter_class = Formatter


class Command(TyperCommand):
    """A command that tells what is wrong with its input in one sentence."""

    context_class = Context

    def invoke(self, ctx: Any) -> Any:
        logs.show()
        with called_as(ctx.command_path):
            try:
                result = super().invoke(ctx)
                sys.stdout.flush()  # a broken pipe ends quietly here, but not when Python exits
            except InputError as error:
                sys.exit(f"error: {tell(error)}")
        return result


class Group(TyperGroup):
    """Commands whose summaries are shown whole, under the names of their panels."""

    context_class = Context

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            summary = " ".join(inspect.cleandoc(command.help).partition("\n\n")[0].split())
            panels.setdefault(command.rich_help_panel or "Commands", []).append((name, summary))
        width = max(len(name) for rows in panels.values() for name, _ in rows)
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl([(name.ljust(width), summary) for name, summary in rows])


def new_app(**settings: Any) -> typer.Typer:
    """An application of such commands, with plain help."""
    return typer.Typer(
        cls=Group,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        **settings,
    )


def show_version(asked: bool) -> None:
    if asked:
        print(f"opnp {opnp.__version__}")
        raise typer.Exit
