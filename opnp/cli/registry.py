"""`opnp register`, `promote`, `rollback` and `serve`: detectors in MLflow's registry."""

from functools import partial
from typing import Annotated

import typer

from opnp.cli.options import Detector, Trust
from opnp.cli.words import find_own_code, here

__all__ = ["promote", "register", "rollback", "serve"]


def register(
    detector: Detector,
    alias: Annotated[str, typer.Option(help="Alias of the new version.")] = "challenger",
    trust: Trust = None,
) -> None:
    """Log a detector as an MLflow model and register it.

    \b
    Example:
      opnp register --detector detector
    """
    from opnp.tracking import registry

    if trust is not None:
        find_own_code()
    print(f"version {registry.register(here(), detector, alias, trust=trust)} is {alias}")


def promote(
    version: Annotated[
        str | None,
        typer.Argument(help="Registered version.", show_default="the challenger"),
    ] = None,
) -> None:
    """Make a registered version the champion.

    The champion before it is remembered for `opnp rollback`.

    \b
    Example:
      opnp promote
    """
    from opnp.tracking import registry

    print(f"version {registry.promote(here(), version)} is champion")


def rollback() -> None:
    """Bring back the champion before the present one.

    \b
    Example:
      opnp rollback
    """
    from opnp.tracking import registry

    print(f"version {registry.rollback(here())} is champion")


def serve(
    alias: Annotated[str, typer.Option(help="Alias of the version to serve.")] = "champion",
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 accepts other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 5000,
    max_bytes: Annotated[int, typer.Option(help="Largest request in bytes.", min=1)] = 50_000_000,
    follow: Annotated[
        str | None,
        typer.Option(
            metavar="ALIAS",
            help="Serve the version with this alias, and within seconds of each promotion the new "
            "one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a registered detector over HTTP with MLflow's protocol.

    Each answer names the version that gave it in the header opnp-version.

    \b
    Example:
      opnp serve --port 5000
    """
    from opnp.deployment import http
    from opnp.tracking import registry

    latest = partial(registry.served, here(), follow or alias)
    http.serve(latest, host, port, max_bytes, follow is not None)
