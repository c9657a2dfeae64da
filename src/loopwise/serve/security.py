"""What a request passes before any route sees it: host, origin, key, size, time and shape of its body.

One layer for every route, so that none can be forgotten.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loopwise.errors import ConfigError
from loopwise.serve.errors import ApiError
from loopwise.serve.settings import ServeConfig

LOCAL = ("localhost", "127.0.0.1", "::1")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)


def is_loopback(host: str) -> bool:
    """Whether an address to bind is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, keys: Sequence[str], *, without_key: bool) -> None:
    """Refuse to be reachable from elsewhere without a key, unless told so.

    Raises:
        ConfigError: the address is not loopback, and there is no key.
    """
    if is_loopback(host) or keys or without_key:
        return
    raise ConfigError(
        f"host={host} lets other machines in, and there is no API key; set LOOPWISE_API_KEY, or type "
        "--without-key if everybody who reaches it may use it"
    )


def check_keys(keys: Sequence[str]) -> tuple[str, ...]:
    """Keys that can be sent in a header.

    Raises:
        ConfigError: one is too short or cannot be sent.
    """
    for key in keys:
        if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError("an API key is 8 or more printable ASCII characters without spaces; take another")
    return tuple(keys)


class Guard:
    """The outermost layer.

    Args:
        keys: API keys of which a request must carry one; none lets everybody in.
        hosts: names that a Host or Origin header may carry; "*" allows any Host (but no foreign Origin).
    """

    def __init__(self, app: ASGIApp, *, settings: ServeConfig, keys: Collection[str], hosts: Collection[str]) -> None:
        self.app = app
        self._settings = settings
        self._keys = [_digest(key) for key in keys]
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._measure(scope)
            self._check(headers)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = _Replay(await self._body(headers, receive), receive)
        except ApiError as error:
            error.headers.setdefault("connection", "close")
            await error.response(scope, receive, send)
            return
        except _Hangup:
            return
        await self.app(scope, receive, send)

    def _measure(self, scope: Scope) -> None:
        # The parser below refuses headers that are too long only while they are incomplete.
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self._settings.headers:
            raise ApiError(f"the headers are larger than {self._settings.headers} bytes", status=431)

    def _check(self, headers: Headers) -> None:
        named = headers.getlist("host")
        if len(named) != 1 or not self._is_ours(hostname(f"//{named[0]}"), anyone="*" in self._hosts):
            raise ApiError("the Host header names another host; start the server with hosts=[...]", status=403)
        origin = headers.get("origin")
        if origin is not None and not self._is_ours(hostname(origin), anyone=False):
            raise ApiError("a page of another origin may not ask here", status=403)
        if self._keys and not self._knows(headers.get("authorization", "")):
            raise ApiError(
                "a valid API key is needed: Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if "transfer-encoding" in headers and "content-length" in headers:
            raise ApiError("a body has a length or is chunked, not both")

    def _is_ours(self, host: str | None, *, anyone: bool) -> bool:
        return host is not None and (anyone or host in self._hosts)

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        # Every key is compared, in constant time: how long it takes tells nothing.
        return sum(hmac.compare_digest(given, known) for known in self._keys) > 0

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        most = self._settings.body
        large = ApiError(f"the body is larger than {most} bytes", status=413)
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError("the body must be JSON: Content-Type: application/json", status=415)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Hangup
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError("the body took too long to come", status=408) from None
        body = b"".join(parts)
        if too_deep(body, self._settings.depth):
            raise ApiError(f"the body's JSON is nested more than {self._settings.depth} deep")
        return body


class _Hangup(Exception):
    """The client left before its request was complete."""


class _Replay:
    """A body that has been read, given once more; then whatever else comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message or await self._receive()


def too_deep(body: bytes, most: int) -> bool:
    """Whether JSON is nested more than `most` deep. Reads brackets outside strings, in one pass, without recursion."""
    if body.count(b"[") + body.count(b"{") <= most:
        return False
    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", _STRING.sub(b"", body)):
        depth += 1 if bracket in b"[{" else -1
        if depth > most:
            return True
    return False


def hostname(url: str) -> str | None:
    """The host that a URL or `//HOST:PORT` names, in lower case; None when it is none."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises for a port that is none)
        return None if parts.username is not None else parts.hostname
    except ValueError:
        return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
