"""From the engine's thread to the event loop and back: one wake-up per tick, however many requests are open."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from loopwise.engine.answer import Emission
from loopwise.engine.listening import ListeningEngine, News
from loopwise.engine.ticket import Ticket


@dataclass(frozen=True, slots=True)
class Part:
    """What came for one of the answers that an inbox collects."""

    index: int
    emissions: Sequence[Emission]
    over: bool
    at: float
    """When it reached the event loop, by `perf_counter`."""


class Inbox:
    """Where the answers of one HTTP request arrive. Used on the event loop alone."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._failure: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None

    def put(self, part: Part) -> None:
        self._parts.append(part)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Whoever takes next gets this instead."""
        self._failure = self._failure or error
        self._wake()

    async def take(self) -> list[Part]:
        """Everything that has come, as soon as there is something."""
        while self._failure is None and not self._parts:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        if self._failure is not None:
            raise self._failure
        parts, self._parts = self._parts, []
        return parts

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


@dataclass
class _Post:
    """Where a ticket's news goes, and what it still may cost."""

    inbox: Inbox
    index: int
    prompt: int
    """Row-loops of its prompt; 0 once its first token has come."""
    token: int
    """Row-loops that each token may take."""
    rest: int
    """Row-loops still promised, the prompt's included."""


@dataclass
class Bridge:
    """Sorts the engine's news into inboxes, and knows how much work is promised.

    `start` is called on the event loop, before the first `post`.
    """

    engine: ListeningEngine
    promised: int = 0
    """Row-loops that open requests may still take: their tokens times their loops, at most."""
    _posts: dict[Ticket, _Post] = field(default_factory=dict)

    def start(self) -> None:
        loop = asyncio.get_running_loop()

        def listener(news: list[News]) -> None:
            # The loop is closed when a server was broken off while its engine's thread was in a tick.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._sort, news)

        self.engine.listener = listener

    def stop(self) -> None:
        self.engine.listener = None

    @property
    def open(self) -> int:
        """Answers that are being made or wait for it."""
        return len(self._posts)

    def post(self, ticket: Ticket, inbox: Inbox, index: int, *, prompt: int, tokens: int, loops: int) -> None:
        """Send a ticket's news to an inbox. To be called right after it was made, before the event loop goes on."""
        cost = (prompt + tokens) * loops
        self._posts[ticket] = _Post(inbox, index, prompt * loops, loops, cost)
        self.promised += cost
        if ticket.over:  # the engine has failed meanwhile, and told those whom it knew
            self._sort([News(ticket, over=True)])

    def drop(self, tickets: Iterable[Ticket]) -> None:
        """Nobody wants these any more: their rows are freed at once, and what they still say goes nowhere."""
        for ticket in tickets:
            post = self._posts.pop(ticket, None)
            if post is not None:
                self.promised -= post.rest
                self.engine.abort(ticket)

    def _sort(self, news: list[News]) -> None:
        now = perf_counter()
        for one in news:
            post = self._posts.get(one.ticket)
            if post is None:
                continue
            if one.over:
                del self._posts[one.ticket]
                done = post.rest
            else:
                done = post.prompt + post.token * sum(not emission.provisional for emission in one.emissions)
            post.prompt = 0
            post.rest -= done
            self.promised -= done
            post.inbox.put(Part(post.index, one.emissions, one.over, now))
