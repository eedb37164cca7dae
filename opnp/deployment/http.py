"""Serving a detector over HTTP, in MLflow's protocol."""

from typing import TYPE_CHECKING, Any

from opnp.errors import InputError, first_line

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["serve"]


def serve(uri: str, host: str, port: int, max_bytes: int) -> None:
    """Answer MLflow's scoring protocol until stopped.

    Args:
        uri: URI of an MLflow model; see `opnp.deployment.mlflow_model`.
        host: address to listen on; 127.0.0.1 admits this machine only.
        port: port to listen on.
        max_bytes: size in bytes above which a request is refused.

    Raises:
        InputError: the model cannot be loaded.
    """
    import uvicorn
    from mlflow import pyfunc
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import scoring_server

    try:
        model = pyfunc.load_model(uri)
    except MlflowException as error:
        raise InputError(f"{uri} cannot be loaded ({first_line(error)}).") from None
    application: Any = limited(scoring_server.init(model), max_bytes)
    uvicorn.run(application, host=host, port=port)


def limited(application: "ASGIApp", max_bytes: int) -> "ASGIApp":
    """Wrap an application to refuse requests with a body of more than ``max_bytes`` (status 413).

    MLflow's server reads a body of any size into memory before the model sees it. Starlette's own
    limit raises an error inside the application, which MLflow's time limit turns into status 500,
    so the body is read here, before the application is called.
    """
    from starlette.datastructures import Headers
    from starlette.responses import JSONResponse

    message = f"A request may hold at most {max_bytes} bytes."
    refusal = JSONResponse(
        {"error_code": "BAD_REQUEST", "message": message}, 413, {"connection": "close"}
    )

    async def call(scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            return await application(scope, receive, send)
        stated = Headers(scope=scope).get("content-length", "0")
        if not stated.isdecimal() or int(stated) > max_bytes:
            return await refusal(scope, receive, send)
        parts: list[Message] = []
        size, more = 0, True
        while more:
            part = await receive()
            size += len(part.get("body", b""))
            if size > max_bytes:
                return await refusal(scope, receive, send)
            parts.append(part)
            more = part.get("more_body", False)

        async def again() -> "Message":
            return parts.pop(0) if parts else await receive()

        return await application(scope, again, send)

    return call
