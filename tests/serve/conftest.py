"""Servers on a loopback port, in this process, and the official client before them."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import loopwise
from loopwise.engine.listening import ListeningEngine
from loopwise.engine.speculation import Speculation
from loopwise.models.looped_lm import LoopedLM
from loopwise.serve.app import build_app
from loopwise.serve.engine import build_engine
from loopwise.serve.run import bind, make_server
from loopwise.serve.service import Service
from loopwise.serve.settings import ServeConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def talker() -> LoopedLM:
    """One layer of Ouro's golden weights with raw bytes and a template: 512 tokens of context, 4 loops, a gate."""
    golden = loopwise.load(GOLDEN / "ouro-tiny")
    model = LoopedLM(replace(golden.config, core_layers=1))
    model.load_state_dict(golden.state_dict(), strict=False)
    model.tokenizer = loopwise.Tokenizer.bytes()
    model.tokenizer.chat_template = TEMPLATE
    return model.eval()


@dataclass
class Live:
    """A server that answers."""

    url: str
    service: Service

    @property
    def engine(self) -> ListeningEngine:
        return self.service.engine

    @property
    def model(self) -> LoopedLM:
        return self.service.engine.model

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, key: str = "none needed") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def settle(self, seconds: float = 10.0) -> None:
        """Wait until nothing is promised any more and nothing is held, which a leak would be for ever."""
        deadline = time.monotonic() + seconds
        while self.service.bridge.open and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.service.bridge.open == 0
        assert self.service.bridge.promised == 0
        while True:  # the engine's thread may just be giving back what the last answers held
            try:
                return self.engine.check_idle()
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


@contextlib.contextmanager
def serving(
    model: LoopedLM,
    *,
    keys: tuple[str, ...] = (),
    policy: str = "last_exited",
    hosts: tuple[str, ...] = (),
    send_buffer: int | None = None,
    speculate: str | Speculation = "off",
    **settings: Any,
) -> Iterator[Live]:
    """A server in a thread of its own."""
    config = ServeConfig(**settings)
    engine = build_engine(model, config, memory="16MiB", policy=policy, speculate=speculate)
    service = Service(engine, config, name="talker")
    listener = bind("127.0.0.1", 0)
    if send_buffer is not None:  # what accepted connections inherit
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = make_server(build_app(service, keys=keys, hosts=hosts), config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def model() -> LoopedLM:
    return talker()


@pytest.fixture(scope="session")
def live(model: LoopedLM) -> Iterator[Live]:
    """A server without a key."""
    with serving(model, max_loops=6) as server:
        yield server


@pytest.fixture(scope="session")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with live.client() as client:
        yield client


@pytest.fixture
def serve() -> Callable[..., contextlib.AbstractContextManager[Live]]:
    return serving
