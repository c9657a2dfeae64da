"""From the engine's thread to the event loop and back: one wake-up per tick, however many requests are open."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import perf_counter

from loopwise.engine.answer import Emission
from loopwise.engine.listening import ListeningEngine, News
from loopwise.engine.ticket import Ticket


@dataclass(slots=True)
class Part:
    """What has come for one of the answers that an inbox collects, since somebody took from it."""

    index: int
    emissions: list[Emission]
    over: bool
    at: float
    """When the newest of it reached the event loop, by `perf_counter`."""


class Inbox:
    """Where the answers of one HTTP request arrive. Used on the event loop alone.

    Args:
        pace: seconds between two takings at least; the first one and the end of an answer do not wait. A stream is no
            worse for it, and what each event costs is paid less often.
    """

    def __init__(self, pace: float) -> None:
        self._pace = pace
        self._parts: dict[int, Part] = {}
        self._failure: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._ready = False

    def put(self, part: Part) -> None:
        """Add what has come."""
        known = self._parts.get(part.index)
        if known is None:
            self._parts[part.index] = part
        else:
            known.emissions += part.emissions
            known.over, known.at = part.over, part.at
        if part.over or self._due <= self._loop.time():
            self._wake()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._due, self._wake)

    def fail(self, error: Exception) -> None:
        """Whoever takes next gets this instead."""
        self._failure = self._failure or error
        self._wake()

    async def take(self) -> Iterable[Part]:
        """Everything that has come, as soon as there is something and it is time."""
        while not self._ready:
            self._waiting = self._loop.create_future()
            await self._waiting
        if self._failure is not None:
            raise self._failure
        parts, self._parts, self._ready = self._parts, {}, False
        self._due = self._loop.time() + self._pace
        return parts.values()

    def _wake(self) -> None:
        self._ready = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
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
            post.inbox.put(Part(post.index, list(one.emissions), one.over, now))
