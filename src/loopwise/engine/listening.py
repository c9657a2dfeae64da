"""An engine that tells its news once per tick, and counts what a tick holds: for those who serve many from one place.

A server that waited for every ticket in a thread of its own would wake for every token; here one call after a tick
carries the tokens of all requests.
"""

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loopwise.engine.answer import Emission
from loopwise.engine.engine import Engine
from loopwise.engine.request import Request
from loopwise.engine.ticket import Ticket

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Upper bounds of the histogram of rows per tick."""


@dataclass(frozen=True, slots=True)
class News:
    """What a tick brought one request."""

    ticket: Ticket
    emissions: Sequence[Emission] = ()
    over: bool = False
    """Whether nothing follows."""


class ListeningEngine(Engine):
    """An engine with one listener. Arguments are those of `Engine`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.listener: Callable[[list[News]], None] | None = None
        """Called in the thread that ticks, after every tick that brought something; it must not block."""
        self.busy_seconds = 0.0
        """Time spent in ticks that had something to run."""
        self.rows_per_tick = [0] * (len(ROWS) + 1)
        """Ticks by their number of rows, at most each of `ROWS`, then more; the mean where one call ran several."""
        self._news: list[News] = []

    @property
    def rows_per_second(self) -> float | None:
        """Rows that run one loop in a second of work; None before any has."""
        return self._core.counts.rows / self.busy_seconds if self.busy_seconds else None

    def tick(self) -> bool:
        """As `Engine.tick`; the listener hears what it brought."""
        counts = self._core.counts
        ticks, rows, began = counts.ticks, counts.rows, time.perf_counter()
        try:
            busy = super().tick()
        except BaseException:
            self._news += [News(ticket, over=True) for ticket in list(self._tickets.values())]
            raise
        finally:
            if self._news:
                news, self._news = self._news, []
                if self.listener is not None:
                    self.listener(news)
        if busy:
            self.busy_seconds += time.perf_counter() - began
            ran = counts.ticks - ticks
            self.rows_per_tick[bisect.bisect_left(ROWS, (counts.rows - rows) / ran)] += ran
        return busy

    def _deliver(self, request: Request, emissions: list[Emission]) -> None:
        ticket, last = self._tickets.get(request.number), self._news[-1] if self._news else None
        if emissions and last is not None and last.ticket is ticket:
            self._news[-1] = News(last.ticket, [*last.emissions, *emissions])  # one call of several ticks
        elif emissions and ticket is not None:
            self._news.append(News(ticket, emissions))
        super()._deliver(request, emissions)

    def _close(self, request: Request) -> None:
        ticket, last = self._tickets.get(request.number), self._news[-1] if self._news else None
        if last is not None and last.ticket is ticket:
            self._news[-1] = News(last.ticket, last.emissions, over=True)
        elif ticket is not None:
            self._news.append(News(ticket, over=True))
        super()._close(request)
