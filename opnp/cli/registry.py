"""`opnp register`, `promote`, `rollback` and `serve`: detectors in MLflow's registry."""

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
) -> None:
    """Serve a registered detector over HTTP with MLflow's protocol.

    \b
    Example:
      opnp serve --port 5000
    """
    from opnp.deployment import http
    from opnp.tracking import registry

    http.serve(registry.uri(here(), alias), host, port, max_bytes)
