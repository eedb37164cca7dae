"""What `opnp serve` asks of clients: requests that are whole in time, and hold what can be scored.

MLflow's server reads a body of any size, waits for clients without an end, and takes several
mistakes of clients for its own (status 500). So a request is read and checked here before MLflow's
application is called.
"""

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["BODY", "CONNECTIONS", "HEADERS", "SILENCE", "VALUES", "Guarded", "Timed", "fault"]

CONNECTIONS = 256  # at once
HEADERS = 10.0  # seconds in which the headers of a request must come
SILENCE = 10.0  # seconds that a client may pause within a body
BODY = 30.0  # seconds in which a body must come
VALUES = 20_000  # commas and brackets in a body: more would be no images and take much memory

JSON, CSV = "application/json", "text/csv"


class Timed(H11Protocol):
    """uvicorn's protocol, which closes connections that send no whole headers, and surplus ones."""

    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self.close(b"503 Service Unavailable")
        else:
            self.wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self.stop_waiting()
        elif self.waiting is None:  # the beginning of one more request
            self.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        super().connection_lost(exc)

    def wait(self) -> None:
        self.waiting = self.loop.call_later(HEADERS, self.close, b"408 Request Timeout")

    def stop_waiting(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def close(self, status: bytes) -> None:
        head = b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        if not self.transport.is_closing():
            self.transport.write(head)
            self.transport.close()


class Guarded:
    """An application that sees only requests that it can answer.

    Args:
        application: MLflow's; may be replaced at any time.
        max_bytes: size in bytes above which a body is refused (status 413).
        version: what is served, which every answer states in the header ``opnp-version``.
    """

    def __init__(self, application: "ASGIApp", max_bytes: int, version: str | None = None) -> None:
        self.served = application, version
        self.max_bytes = max_bytes

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        application, version = self.served
        if scope["type"] != "http":
            return await application(scope, receive, send)

        async def stating(message: "Message") -> None:
            if message["type"] == "http.response.start" and version is not None:
                own = (b"opnp-version", version.encode())
                message = {**message, "headers": [*message.get("headers", []), own]}
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        stated = headers.get(b"content-length", "0")
        if not stated.isdecimal() or len(stated) > 15 or int(stated) > self.max_bytes:
            return await self.too_large(receive, stating)
        try:
            body = await self.read(receive)
        except TimeoutError:
            return await refuse(stating, 408, "The request did not come in time.")
        if body is None:
            return await self.too_large(receive, stating)
        if scope["method"] == "POST" and scope["path"] == "/invocations":
            kind = headers.get(b"content-type", "")
            if refusal := await asyncio.to_thread(fault, body, kind):
                return await refuse(stating, *refusal)
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        del body

        async def again() -> "Message":
            return whole.pop() if whole else await receive()

        return await application(scope, again, stating)

    async def read(self, receive: "Receive") -> bytes | None:
        """The whole body; None if it is too large.

        Raises:
            TimeoutError: it does not come in time.
        """
        body = bytearray()
        async with asyncio.timeout(BODY):
            async for part in parts(receive):
                body += part
                if len(body) > self.max_bytes:
                    return None
        return bytes(body)

    async def too_large(self, receive: "Receive", send: "Send") -> None:
        """Refuse a body, and take what still comes: most clients read only when they have sent."""

        async def drain() -> None:
            async for _ in parts(receive):
                pass

        message = f"A request may hold at most {self.max_bytes} bytes."
        await refuse(send, 413, message, drain)


async def parts(receive: "Receive") -> "Any":
    """The parts of a body.

    Raises:
        TimeoutError: the client pauses for too long.
    """
    more = True
    while more:
        async with asyncio.timeout(SILENCE):
            message = await receive()
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def refuse(
    send: "Send", status: int, message: str, before_closing: Callable[[], Any] | None = None
) -> None:
    """Answer as MLflow does of a client's mistake, and close the connection."""
    body = json.dumps({"error_code": "BAD_REQUEST", "message": message}).encode()
    headers = {"content-type": JSON, "content-length": str(len(body)), "connection": "close"}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if before_closing:
        try:
            async with asyncio.timeout(BODY):
                await before_closing()
        except TimeoutError:
            pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def fault(body: bytes, content_type: str) -> tuple[int, str] | None:
    """Status and sentence for a request that is the client's mistake; None if it may be right.

    Args:
        body: of the request.
        content_type: its header, empty if there is none.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in (JSON, CSV):
        told = f"it is {content_type[:60]!r}" if content_type else "it is missing"
        return 415, f"The content type must be {JSON} or {CSV}: {told}."
    marks = b",[{" if kind == JSON else b",\n"
    if sum(map(body.count, marks)) > VALUES:
        return 400, f"The request holds more than {VALUES} values: send images as base64."
    if kind == CSV:
        return None
    try:
        asked = json.loads(body)
    except RecursionError:
        return 400, "The request is nested too deeply."
    except ValueError as error:  # also of numbers of thousands of digits
        return 400, f"The request is not valid JSON ({error})."
    for image in texts(asked):
        try:
            base64.b64decode(image, validate=True)
        except ValueError:
            return 400, f"The request holds text that is not base64: {image[:20]!r}."
    return None


def texts(asked: Any) -> Iterator[str]:
    """All texts that stand for values, in a request of any of MLflow's forms."""
    if not isinstance(asked, dict):
        return
    split = asked.get("dataframe_split")
    waiting = [asked.get(name) for name in ("dataframe_records", "inputs", "instances")]
    waiting.append(split.get("data") if isinstance(split, dict) else None)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
