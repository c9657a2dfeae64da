"""Too much, too slow, gone, and not HTTP at all: nobody else notices, and nothing leaks."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.models.looped_lm import LoopedLM

from .conftest import Live, serving

LONG: dict[str, Any] = {"model": "talker", "prompt": "Hello", "max_tokens": 480, "ignore_eos": True, "seed": 1}


def head(body: bytes, *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % size
    )


def connect(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout=20)


def read_all(connection: socket.socket) -> bytes:
    said = b""
    try:
        while part := connection.recv(65536):
            said += part
    except ConnectionError:
        pass
    return said


class TestAdmission:
    def test_a_full_server_says_so_and_when_to_come_back(self, model: LoopedLM) -> None:
        with serving(model, backlog=2000, requests=8) as live, live.http() as http:
            with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as first:
                lines = first.iter_lines()
                next(lines)
                assert 1000 < live.service.bridge.promised <= (480 + 5) * 4
                refused = http.post("/v1/completions", json=LONG)
                assert refused.status_code == 429
                assert refused.json()["error"]["code"] == "rate_limit_exceeded"
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                # What fits is let in beside it.
                small = http.post("/v1/completions", json=LONG | {"max_tokens": 5, "loop": {"max": 1}})
                assert small.status_code == 200
            live.settle()
            # Alone even one that is larger than the whole backlog is served.
            with http.stream("POST", "/v1/completions", json=LONG | {"n": 3, "stream": True}) as large:
                assert large.status_code == 200
            live.settle()
            assert http.post("/v1/completions", json=LONG | {"n": 9, "max_tokens": 1}).status_code == 429
            assert live.service.meters.refused == 2
            live.settle()

    def test_promises_are_given_back_token_by_token(self, model: LoopedLM) -> None:
        with serving(model) as live, live.http() as http:
            with http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "logprobs": 1}) as got:
                lines = got.iter_lines()
                for _ in range(40):
                    next(lines)
                assert 0 < live.service.bridge.promised < (480 - 10) * 4
            live.settle()


class TestVanishing:
    @pytest.mark.parametrize("stream", [True, False])
    def test_who_hangs_up_frees_the_rows_at_once(self, live: Live, stream: bool) -> None:
        vanished = live.service.meters.vanished
        connections = [connect(live) for _ in range(5)]
        for seed, connection in enumerate(connections):
            body = json.dumps(LONG | {"stream": stream, "n": 2, "temperature": 1, "seed": seed}).encode()
            connection.sendall(head(body) + body)
        deadline = time.monotonic() + 10
        while len(live.engine._core.scheduler.running) < 10 and time.monotonic() < deadline:
            time.sleep(0.005)
        tokens = live.engine._core.counts.tokens
        for connection in connections:
            connection.close()
        live.settle()
        assert live.service.meters.vanished == vanished + 5
        assert live.engine._core.counts.tokens - tokens < 10 * 400  # they were not made to the end

    def test_who_leaves_while_still_asking(self, live: Live) -> None:
        body = json.dumps(LONG).encode()
        for sent in (head(body)[:30], head(body), head(body) + body[:20]):
            with connect(live) as connection:
                connection.sendall(sent)
        live.settle()


class TestPatience:
    def test_it_ends(self, model: LoopedLM) -> None:
        patience = {"header_seconds": 0.3, "body_seconds": 0.3, "request_seconds": 0.6, "idle_seconds": 1.0}
        with serving(model, **patience) as live:
            body = json.dumps(LONG).encode()
            began = time.monotonic()
            with connect(live) as silent, connect(live) as half, connect(live) as slow:
                half.sendall(b"GET /health HTTP/1.1\r\nHost: local")
                slow.sendall(head(body) + body[:10])
                assert read_all(silent) == b""
                assert read_all(half) == b""
                assert read_all(slow).startswith(b"HTTP/1.1 408")
            assert time.monotonic() - began < 5
            with live.http() as http:
                whole = http.post("/v1/completions", json=LONG | {"n": 8})
                assert whole.status_code == 504
                assert whole.json()["error"]["code"] == "timeout"
                with http.stream("POST", "/v1/completions", json=LONG | {"n": 8, "stream": True}) as got:
                    lines = [line for line in got.iter_lines() if line]
            assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
            live.settle()

    def test_who_does_not_read_is_cut_off(self, model: LoopedLM) -> None:
        with serving(model, stall_seconds=0.3, send_buffer=8192) as live:
            with socket.socket() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect(("127.0.0.1", live.port))
                body = json.dumps(LONG | {"n": 32, "stream": True, "logprobs": 20, "loop": {"max": 1}}).encode()
                connection.sendall(head(body) + body)
                deadline = time.monotonic() + 20
                while live.service.meters.vanished == 0 and time.monotonic() < deadline:
                    time.sleep(0.02)
            assert live.service.meters.vanished == 1
            live.settle()

    def test_connections_are_counted(self, model: LoopedLM) -> None:
        with serving(model, connections=3) as live:
            held = [connect(live) for _ in range(3)]
            time.sleep(0.1)
            with connect(live) as one_more:
                said = read_all(one_more)
            assert said.startswith(b"HTTP/1.1 503")
            assert b'"error"' in said
            for connection in held:
                connection.close()
            time.sleep(0.1)
            with live.http() as http:
                assert http.get("/health").status_code == 200


@settings(max_examples=settings().max_examples * 2 // 5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200)
    | st.builds(
        lambda start, rest: start + rest,
        st.sampled_from(
            [
                b"GET /health HTTP/1.1\r\n",
                b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
                b"Content-Type: application/json\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n",
                b"GET http://x/ HTTP/9.9\r\n\r\n",
            ]
        ),
        st.binary(max_size=60),
    )
)
def test_bytes_that_are_not_http(live: Live, sent: bytes) -> None:
    with connect(live) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        said = read_all(connection)
    assert b"HTTP/1.1 5" not in said[:12]


def test_no_other_clients_answer_changes(live: Live) -> None:
    """A few ask properly while others hang up, send rubbish or ask for what is refused."""
    work = [
        (f"Question {number}", Sampling(max_tokens=16, temperature=0.8, seed=number, exit=rule, max_loops=loops))
        for number, (rule, loops) in enumerate([("hazard:0.3", 4), (None, 1), (None, 4), ("hazard:0.6", 3)] * 2)
    ]
    wanted = [generate(live.model, [text], sampling, policy="last_exited")[0].text for text, sampling in work]
    stop = threading.Event()

    def disturb(number: int) -> None:
        body = json.dumps(LONG | {"stream": number % 2 == 0, "seed": number}).encode()
        while not stop.is_set():
            with connect(live) as connection:
                connection.sendall([head(body) + body, b"\x16\x03\x01rubbish\r\n\r\n", head(body), b""][number % 4])
                time.sleep(0.02)
            with live.http() as http:
                assert http.post("/v1/completions", json={"model": "talker", "prompt": [-1]}).status_code == 400

    def ask(client: openai.OpenAI, text: str, sampling: Sampling) -> str:
        rule = sampling.exit or "off"
        chunks = client.completions.create(
            model="talker",
            prompt=text,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            stream=True,
            extra_body={"loop": {"rule": rule, "max": sampling.max_loops}},
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(4) as rude, ThreadPoolExecutor(8) as polite, live.client() as client:
        nuisances = [rude.submit(disturb, number) for number in range(4)]
        try:
            got = list(polite.map(lambda one: ask(client, *one), work))
        finally:
            stop.set()
        for nuisance in nuisances:
            nuisance.result()
    assert got == wanted
    live.settle()


def test_a_broken_engine_is_told(model: LoopedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model) as live, live.http() as http:
        assert http.get("/health").status_code == 200

        def fail() -> bool:
            raise ZeroDivisionError("oops")

        with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as open_stream:
            lines = open_stream.iter_lines()
            next(lines)
            monkeypatch.setattr(live.engine._core, "tick", fail)
            *_, last = [line for line in lines if line]
        assert "engine has stopped" in json.loads(last.removeprefix("data: "))["error"]["message"]
        for stream in (False, True):
            got = http.post("/v1/completions", json=LONG | {"stream": stream})
            assert got.status_code == 503
            assert "engine has stopped" in got.json()["error"]["message"]
        assert http.get("/health").status_code == 503
        assert live.service.bridge.open == 0


def test_a_server_with_nobody_left_ends_quietly(model: LoopedLM) -> None:
    with serving(model, drain_seconds=1.0) as live:
        client = httpx.Client(base_url=live.url)
        got = client.send(client.build_request("POST", "/v1/completions", json=LONG | {"stream": True}), stream=True)
        lines = got.iter_lines()
        next(lines)
    # The server ended while this stream was open: it was drained or broken off, and the engine is idle again.
    live.engine.check_idle()
    got.close()
    client.close()
