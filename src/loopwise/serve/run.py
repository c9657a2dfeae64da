"""The process: sockets, patience with clients, and a quiet end."""

import asyncio
import json
import signal
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from loopwise.errors import ConfigError
from loopwise.serve.errors import ApiError
from loopwise.serve.settings import ServeConfig


class PatientProtocol(H11Protocol):
    """HTTP/1.1 whose patience with slow clients ends, and whose refusals are envelopes like all others."""

    def __init__(self, settings: ServeConfig, **options: Any) -> None:
        super().__init__(**options)
        self._settings = settings
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come: it has so long for its headers."""
        super().connection_made(transport)
        if len(self.connections) > self._settings.connections:
            self._refuse(ApiError("too many connections; come back soon", status=503, type="server_error"))
            return
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """The client says something; headers that are complete have begun a cycle."""
        before = self.cycle
        if self._headers_due is None and (before is None or before.response_complete):
            self._expect_headers()
        super().data_received(data)
        if self.cycle is not before:
            self._stop("_headers_due")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop("_headers_due")
        self._stop("_reading_due")
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read: it has so long to go on."""
        super().pause_writing()
        self._reading_due = self.loop.call_later(self._settings.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._stop("_reading_due")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(ApiError("this is not a valid HTTP request"))
        else:  # half an answer has left already
            self.transport.close()

    def _expect_headers(self) -> None:
        self._headers_due = self.loop.call_later(self._settings.header_seconds, self.transport.close)

    def _stop(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.envelope).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=error.status, headers=headers)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            data = self.conn.send(event)
            if data:
                self.transport.write(data)
        self.transport.close()


class Server(uvicorn.Server):
    """Ends quietly at SIGTERM once answers are complete; a second signal ends it at once."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        if sig == signal.SIGINT:
            self._captured_signals.append(sig)


def make_server(app: FastAPI, settings: ServeConfig) -> Server:
    """A server for an application; give its `run` a bound socket."""

    def protocol(**options: Any) -> PatientProtocol:
        return PatientProtocol(settings, **options)

    config = uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=settings.headers,
        timeout_keep_alive=max(round(settings.idle_seconds), 1),
        timeout_graceful_shutdown=max(round(settings.drain_seconds), 1),
        backlog=min(settings.connections, 2048),
    )
    return Server(config)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
    listener: socket.socket | None = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        return listener
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; take another --host or --port") from None
