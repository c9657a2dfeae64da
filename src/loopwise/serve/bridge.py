"""From the engine's thread to the event loop and back: a wake-up now and then, however many requests are open."""

import asyncio
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import perf_counter

from loopwise.engine.answer import Emission
from loopwise.engine.listening import ListeningEngine, News
from loopwise.engine.ticket import Ticket
from loopwise.serve.metrics import Meters
from loopwise.serve.voice import Voice

_BEAT = 0.005
"""Seconds between two looks at what ticks have brought: a tick of a small model takes less."""


@dataclass(slots=True)
class Part:
    """What has come for one of the answers that an inbox collects, since somebody took from it."""

    index: int
    emissions: list[Emission]
    over: bool


class Inbox:
    """Where the answers of one HTTP request arrive. Used on the event loop alone.

    Args:
        pace: seconds between two takings at least; the first one and the end of an answer do not wait. A stream is no
            worse for it, and what each event costs is paid less often. None waits for ends alone.
    """

    def __init__(self, pace: float | None) -> None:
        self._pace = pace
        self._parts: dict[int, Part] = {}
        self._failure: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._due = 0.0 if pace is not None else math.inf
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
            known.over = part.over
        if part.over or self._due <= self._loop.time():
            self._wake()
        elif self._timer is None and self._pace is not None:
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
        if self._pace is not None:
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
    drafts: bool
    """Whether some of its tokens may be provisional."""
    prompt: int
    """Row-loops of its prompt; 0 once its first token has come."""
    token: int
    """Row-loops that each token may take."""
    rest: int
    """Row-loops still promised, the prompt's included."""
    began: float
    heard: float = 0.0
    """When its newest token came; 0 before the first."""


@dataclass
class Bridge:
    """Sorts the engine's news into inboxes, and knows how much work is promised.

    `start` is called on the event loop, before the first `post`.
    """

    engine: ListeningEngine
    meters: Meters
    promised: int = 0
    """Row-loops that open requests may still take: their tokens times their loops, at most."""
    _posts: dict[Ticket, _Post] = field(default_factory=dict)
    _mail: deque[News] = field(default_factory=deque)
    """What ticks have brought and nobody has sorted yet."""
    _awake: bool = False
    """Whether the event loop will look into the mail."""
    _loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        loop = self._loop = asyncio.get_running_loop()

        def listener(news: list[News]) -> None:
            self._mail.extend(news)  # in one piece: the other thread takes from the other end
            # The loop is closed when a server was broken off while its engine's thread was in a tick.
            if not self._awake and not loop.is_closed():
                self._awake = True
                loop.call_soon_threadsafe(self._open_mail)

        self.engine.listener = listener

    def stop(self) -> None:
        self.engine.listener = None

    @property
    def open(self) -> int:
        """Answers that are being made or wait for it."""
        return len(self._posts)

    def post(self, ticket: Ticket, inbox: Inbox, voice: Voice, *, prompt: int) -> None:
        """Send a ticket's news to an inbox. To be called right after it was made, before the event loop goes on.

        Args:
            prompt: its tokens, those of the answer included that are continued.
        """
        loops = voice.knob.max_loops
        cost = (prompt + voice.rest) * loops
        # What continues an answer has no first token of its own.
        heard = perf_counter() if voice.tokens else 0.0
        self._posts[ticket] = _Post(
            inbox, voice.index, voice.drafts, prompt * loops, loops, cost, began=perf_counter(), heard=heard
        )
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

    def _open_mail(self) -> None:
        """Sort what has come; then look again after a beat, and sleep when nothing has."""
        if not self._mail:
            # A tick that ends just now sees either the mail that we shall find or that we are asleep.
            self._awake = False
            if not self._mail:
                return
            self._awake = True
        self._sort([self._mail.popleft() for _ in range(len(self._mail))])
        assert self._loop is not None
        self._loop.call_later(_BEAT, self._open_mail)

    def _sort(self, news: list[News]) -> None:
        now = perf_counter()
        for one in news:
            post = self._posts.get(one.ticket)
            if post is None:
                continue
            count = len(one.emissions)
            if post.drafts:
                count = sum(not emission.provisional for emission in one.emissions)
            if count and post.heard:
                self.meters.between.note((now - post.heard) / count, count)
            elif count:
                self.meters.first.note(now - post.began)
            if count:
                post.heard = now
            done = post.rest if one.over else post.prompt + post.token * count
            post.prompt = 0
            post.rest -= done
            self.promised -= done
            if one.over:
                del self._posts[one.ticket]
            post.inbox.put(Part(post.index, list(one.emissions), one.over))
