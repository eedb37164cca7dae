"""The program `opnp`, put together from its commands."""

import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

from opnp.cli import detector, pipeline, registry
from opnp.cli.compare import compare
from opnp.cli.fit import fit
from opnp.cli.program import EXIT_CODES, Command, new_app, show_version
from opnp.runtime import malloc

__all__ = ["app", "main"]

IMAGES_CODES = f"{EXIT_CODES[:-1]}; 3, done, but some images could not be read."

app = new_app()


@app.callback(epilog=IMAGES_CODES)
def program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Out-of-distribution detection by optimal parameter and neuron pruning."""


pipeline.add_to(app)
for panel, codes, commands in (
    (pipeline.PANEL, EXIT_CODES, (compare,)),
    ("Detectors", EXIT_CODES, (fit, detector.show)),
    ("Detectors", IMAGES_CODES, (detector.score, detector.evaluate)),
    ("Detectors", EXIT_CODES, (detector.export,)),
    (
        "Registry",
        EXIT_CODES,
        (registry.register, registry.promote, registry.rollback, registry.serve),
    ),
):
    for command in commands:
        app.command(cls=Command, rich_help_panel=panel, epilog=codes)(command)


def main(words: Sequence[str] = (), called: str = "opnp") -> NoReturn:
    """Run the program, or one of its commands under another name.

    Args:
        words: the command to run, such as ``stage search``; none: the one that the arguments name.
        called: the name that help shows and remedies are worded for.

    Raises:
        SystemExit: always.
    """
    malloc.keep()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    command: Any = get_command(app)
    for word in words:
        command = command.commands[word]
    command.main(prog_name=called)
    raise AssertionError("a command ends with SystemExit")


def end(number: int, _: Any) -> NoReturn:
    """End at a signal as at an error, so that files that are half written are removed."""
    sys.exit(128 + number)
