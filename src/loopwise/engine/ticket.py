"""One request, seen from outside."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from loopwise.engine.answer import Completion, Emission
from loopwise.engine.request import Request


@runtime_checkable
class Driven(Protocol):
    """What a ticket needs to know of its engine."""

    @property
    def driven(self) -> bool:
        """Whether a thread of the engine's own drives it."""
        ...

    def tick(self) -> bool: ...

    def leave(self, request: Request) -> None:
        """End a request that nobody waits for any more."""
        ...

    def raise_failure(self) -> None: ...


class Ticket:
    """One request, seen from outside. Iterate over it for its tokens as they become certain.

    Who breaks off may go on later; a request whose ticket nobody holds any more is ended.
    """

    def __init__(self, engine: Driven, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._queue: queue.SimpleQueue[Emission | None] = queue.SimpleQueue()
        self._began = time.perf_counter()
        self._first: float | None = None
        self._last: float | None = None
        self._over = threading.Event()

    @property
    def prompt(self) -> tuple[int, ...]:
        return self._request.prompt

    @property
    def over(self) -> bool:
        """Whether the answer has ended."""
        return self._over.is_set()

    def __iter__(self) -> Iterator[Emission]:
        """Tokens from the first that was not taken yet. Without a thread of the engine's own, this drives it."""
        while True:
            while self._queue.empty() and not self.over and not self._engine.driven:
                self._engine.tick()
            emission = self._queue.get()
            if emission is None:
                self._queue.put(None)  # whoever iterates again sees the end too
                self._engine.raise_failure()
                return
            yield emission

    def wait(self) -> Completion:
        """The whole answer, once it has ended."""
        while not self.over and not self._engine.driven:
            self._engine.tick()
        self._over.wait()
        self._engine.raise_failure()
        return self.completion

    @property
    def completion(self) -> Completion:
        """What there is so far."""
        last = time.perf_counter() if self._last is None else self._last
        first = last if self._first is None else self._first
        return self._request.answer.completion(seconds=last - self._began, prompt_seconds=first - self._began)

    def rest(self, first: int) -> list[Emission]:
        """The tokens from the one at `first` on, held ones included; for whoever has broken off."""
        return self._request.answer.rest(first)

    def deliver(self, emissions: Sequence[Emission]) -> None:
        """Called by the engine with tokens that are certain."""
        if self._first is None:
            self._first = time.perf_counter()
        for emission in emissions:
            self._queue.put(emission)

    def __del__(self) -> None:
        if not self.over:
            self._engine.leave(self._request)

    def close(self) -> None:
        """Called by the engine when the request is over."""
        self._last = time.perf_counter()
        self._over.set()
        self._queue.put(None)
