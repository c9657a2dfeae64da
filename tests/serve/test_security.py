"""Who gets in, and what gets in: keys, hosts, origins, sizes, depth; on every route."""

import json
import socket
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.cli.serve import hosts_of
from loopwise.errors import ConfigError
from loopwise.models.looped_lm import LoopedLM
from loopwise.serve.security import check_bind, check_keys, is_loopback, too_deep

from .conftest import Live, serving

KEYS = ("first-key-0", "second-key-1")
BODY: dict[str, Any] = {"model": "talker", "prompt": "Hi", "max_tokens": 2}


def raw(live: Live, request: bytes, *, seconds: float = 10.0) -> bytes:
    """What the server says to these bytes until it closes."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=seconds) as connection:
        connection.sendall(request)
        said = b""
        while part := connection.recv(65536):
            said += part
        return said


class TestKeys:
    def test_every_route_wants_one_of_them(self, model: LoopedLM) -> None:
        with serving(model, keys=KEYS) as live, live.http() as http:
            routes = [
                ("GET", "/v1/models"),
                ("GET", "/v1/models/talker"),
                ("GET", "/health"),
                ("GET", "/metrics"),
                ("GET", "/openapi.json"),
                ("GET", "/nowhere"),
                ("POST", "/v1/completions"),
                ("POST", "/v1/chat/completions"),
            ]
            for method, path in routes:
                for header in ("", "Bearer wrong-key-99", f"Basic {KEYS[0]}", "Bearer", f"Bearer {KEYS[0]}x"):
                    got = http.request(method, path, headers={"authorization": header} if header else {})
                    assert got.status_code == 401, (method, path, header)
                    assert got.json()["error"]["code"] == "invalid_api_key"
                    assert got.headers["www-authenticate"] == "Bearer"
            for key in KEYS:
                assert http.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200
            with live.client(KEYS[1]) as client:
                assert client.completions.create(**BODY).choices[0].text is not None
            with live.client("wrong-key-99") as client, pytest.raises(openai.AuthenticationError):
                client.models.list()

    @pytest.mark.parametrize("key", ["short", "with space in it", "ümlaut-key"])
    def test_keys_that_cannot_be_sent(self, key: str) -> None:
        with pytest.raises(ConfigError, match="8 or more printable ASCII"):
            check_keys([key])

    def test_no_bind_beyond_loopback_without_a_key_unless_told_so(self) -> None:
        for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1"):
            assert is_loopback(host)
            check_bind(host, (), without_key=False)
        for host in ("0.0.0.0", "::", "192.168.1.2", "my.machine"):
            with pytest.raises(ConfigError, match="LOOPWISE_API_KEY"):
                check_bind(host, (), without_key=False)
            check_bind(host, KEYS, without_key=False)
            check_bind(host, (), without_key=True)


class TestHostAndOrigin:
    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({}, 200),
            ({"host": "localhost:1234"}, 200),
            ({"host": "LOCALHOST"}, 200),
            ({"host": "[::1]:80"}, 200),
            ({"host": "evil.example"}, 403),
            ({"host": "localhost.evil.example"}, 403),
            ({"host": "user@localhost"}, 403),
            ({"host": "localhost:x"}, 403),
            ({"host": ""}, 403),
            ({"origin": "http://localhost:3000"}, 200),
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"origin": "http://[bad"}, 403),
        ],
    )
    def test_only_our_own(self, live: Live, headers: dict[str, str], status: int) -> None:
        with live.http() as http:
            got = http.get("/v1/models", headers=headers)
        assert got.status_code == status
        assert "access-control-allow-origin" not in got.headers

    def test_another_host_may_be_named(self, model: LoopedLM) -> None:
        with serving(model, hosts=("my.machine",)) as live, live.http() as http:
            assert http.get("/health", headers={"host": "my.machine"}).status_code == 200
            assert http.get("/health", headers={"host": "other.machine"}).status_code == 403

    def test_who_listens_everywhere_has_any_name_but_no_foreign_pages(self, model: LoopedLM) -> None:
        with serving(model, hosts=hosts_of("0.0.0.0"), keys=KEYS) as live, live.http() as http:
            known = {"authorization": f"Bearer {KEYS[0]}"}
            assert http.get("/health", headers=known | {"host": "any.name"}).status_code == 200
            foreign = known | {"host": "any.name", "origin": "https://evil.example"}
            assert http.get("/health", headers=foreign).status_code == 403
            assert http.get("/health", headers={"host": "any.name"}).status_code == 401

    def test_two_hosts_are_none(self, live: Live) -> None:
        said = raw(live, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert said.startswith((b"HTTP/1.1 400", b"HTTP/1.1 403"))


class TestBodies:
    def test_only_json(self, live: Live) -> None:
        with live.http() as http:
            for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
                got = http.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": kind})
                assert got.status_code == 415
            got = http.post(
                "/v1/completions", content=json.dumps(BODY), headers={"content-type": "application/json; charset=utf-8"}
            )
            assert got.status_code == 200

    def test_none_that_is_too_large(self, live: Live) -> None:
        large = json.dumps(BODY | {"prompt": "x" * (1 << 20)}).encode()
        headers = {"content-type": "application/json"}

        def parts() -> Any:
            yield from (large[i : i + 65536] for i in range(0, len(large), 65536))

        with live.http() as http:
            for content in (large, parts()):  # with a length, and chunked
                try:
                    got = http.post("/v1/completions", content=content, headers=headers)
                except (httpx.WriteError, httpx.ReadError):
                    continue  # closed while it was still being sent, which is as good
                assert got.status_code == 413
                assert "larger than" in got.json()["error"]["message"]
        live.settle()

    def test_none_that_is_too_deep(self, live: Live) -> None:
        with live.http() as http:
            for content in (b'{"model":' + b"[" * 200_000, b'{"a":' * 50 + b"1" + b"}" * 50):
                got = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
                assert got.status_code == 400
                assert "nested more than 32 deep" in got.json()["error"]["message"]

    def test_a_length_and_chunks_are_one_too_many(self, live: Live) -> None:
        said = raw(
            live,
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        )
        assert said.startswith(b"HTTP/1.1 400")
        assert said.count(b"HTTP/1.1") == 1  # what follows is not taken for a request

    def test_headers_that_never_end(self, live: Live) -> None:
        for size in (17_000, 1_000_000):
            try:
                said = raw(live, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * size + b"\r\n\r\n")
            except ConnectionError:
                continue  # closed while they were still being sent, which is as good
            assert said.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))


json_values = st.recursive(
    st.none() | st.text(alphabet='[]{}"\\ab') | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='[{"\\'), inner, max_size=3),
    max_leaves=20,
)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(json_values, st.integers(0, 6))
def test_depth_is_that_of_the_parsed_json(value: Any, most: int) -> None:
    assert too_deep(json.dumps(value).encode(), most) == (depth(value) > most)
