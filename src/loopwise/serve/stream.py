"""Answers as they leave: whole, or as server-sent events."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loopwise.serve.errors import ApiError, ClientGone, server_error
from loopwise.serve.service import Answering

_log = logging.getLogger("loopwise.serve")
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class Chunks:
    """JSON of a stream's events, which all begin alike.

    Args:
        head: what every event carries beside its choice.
    """

    def __init__(self, head: dict[str, Any]) -> None:
        self._head = head
        self._start = f'{_dumps(head)[:-1]},"choices":['

    def choice(self, choice: dict[str, Any]) -> str:
        """An event with a part of one choice."""
        return f"{self._start}{_dumps(choice)}]}}"

    def other(self, **fields: Any) -> str:
        """An event with other fields too."""
        return _dumps(self._head | fields)


class EventStream(Response):
    """Texts of an iterator, each as one event; `[DONE]` at the end, an envelope where it fails.

    Args:
        events: JSON to send.
        answering: what the events come from; freed when the last has left or the client is gone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], answering: Answering) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Whoever has gone needs no answer, and it is no error of ours.
        with contextlib.suppress(ClientGone):
            await self._send(receive, send)

    async def _send(self, receive: Receive, send: Send) -> None:
        async with self._answering:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with watching(receive, self._answering.leave):
                try:
                    async for event in self._events:
                        await send(_body(f"data: {event}\n\n"))
                    last = "data: [DONE]\n\n"
                except ClientGone:
                    raise
                except ApiError as error:
                    last = f"data: {_dumps(error.envelope)}\n\n"
                except Exception:
                    _log.exception("a stream failed")
                    last = f"data: {_dumps(server_error().envelope)}\n\n"
                await send(_body(last))
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(text: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": True}


@contextlib.asynccontextmanager
async def watching(receive: Receive, gone: Callable[[], None]) -> AsyncIterator[None]:
    """Within: `gone` is called as soon as the client hangs up."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone()

    task = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        task.cancel()


async def whole(request: Request, answering: Answering, make: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
    """The answer once it is complete, unless the client hangs up before."""
    async with answering, watching(request.receive, answering.leave):
        return json_response(await make())


def json_response(content: dict[str, Any]) -> Response:
    """A JSON body; a lone surrogate, which JSON may hold and UTF-8 may not, shows as "?"."""
    return Response(_dumps(content).encode("utf-8", "replace"), media_type="application/json")
