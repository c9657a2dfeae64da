"""One request alone: many ticks in one call (`run_alone` in `nn/kernels/launch.cpp`).

What the host does around a launch of few rows takes a third as long as the launch, mostly because the weights that
stream past leave nothing of it in a cache. Where a request has the engine to itself and all that is told are its
tokens, nothing needs the host between ticks: the call plans, launches, judges, reads and confirms by itself until some
tokens are certain. Rows run every loop, or, where who stops does no more work, leave after a fixed number of them or by
their hazards. Ticks one by one (`core.py`) are the reference: the same launches, tokens and counts.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any

from loopwise.engine.judge import planned_exit
from loopwise.engine.request import Choice, Request, Row
from loopwise.engine.runner import Runner
from loopwise.engine.speculation import Speculation
from loopwise.loops.exits import Hazard
from loopwise.memory.paged import PageList, take_pages
from loopwise.nn.kernels.launch import FLYING, SAID, SoloShape
from loopwise.nn.kernels.linear import FEW_ROWS

MOST = 16
"""A call ends once so many tokens are certain: what the host does for one is cheaper when it does it for several."""
SECONDS = 0.005
"""A call ends with the first certain token after this time: others may want to be let in, or an answer to end."""

_PLACES = 2 * FEW_ROWS
_FLYING, _SAID = Struct(FLYING), Struct(SAID)


@dataclass(frozen=True, slots=True)
class Said:
    """A token that has become certain."""

    token: int
    settled: int
    """Loops of its row after which the next one ran from it; all loops where that one had to begin anew."""
    asked: bool
    """Whether its row was read from the first draft loop on."""
    loops: int
    """Loops of its row."""
    logprob: float


@dataclass(frozen=True, slots=True)
class Stretch:
    """What one call did."""

    said: Sequence[Said]
    ticks: int
    rows: int
    """Rows that ran one loop."""
    started: int
    """Drafts that were started."""


class Solo:
    """Runs one request alone, where that can be had."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._memory = runner.memory
        self._flight = ctypes.create_string_buffer(_PLACES * _FLYING.size)
        self._said = ctypes.create_string_buffer((MOST + FEW_ROWS) * _SAID.size)
        self._deepest = (ctypes.c_int64 * (MOST + FEW_ROWS))()
        self._seats = (ctypes.c_int64 * (2 * _PLACES))()
        self._shape = SoloShape(seconds=SECONDS, most=MOST, page=runner.memory.layout.page)
        self._shape.aliases = not runner.memory.policy.fills
        for name in ("flight", "said", "seats", "deepest"):
            setattr(self._shape, name, ctypes.addressof(getattr(self, f"_{name}")))

    def serves(self, request: Request) -> bool:
        """Whether this request's rows can run so, now that it is alone."""
        if request.solo is None:
            request.solo = self._is_simple(request)
        flight = request.flight
        if not request.solo or not 0 < len(flight) <= FEW_ROWS or flight[0].position != len(request.left):
            return False
        return all(row.spare is not None for row in flight if row.left)

    def _is_simple(self, request: Request) -> bool:
        few, sampling = self._runner.few, request.sampling
        if few is None or not (few.begins and few.says and self._memory.policy.speculates):
            return False
        if request.signals or request.provisional or request.replay is not None:
            return False
        planned = planned_exit(request, len(request.prompt))
        if self._memory.policy.fills and planned != request.max_loops:
            return False  # who stops runs on
        known = planned is not None or isinstance(request.rule, Hazard)
        return known and sampling.plain and sampling.start is None

    def run(self, request: Request, window: int, settings: Speculation | None) -> Stretch | None:
        """Run it until tokens are certain; None where memory has no room for what it might write meanwhile.

        Args:
            window: how many drafts ahead of its frontier it may run.
            settings: how drafts are made.
        """
        few, flight, pages, shape = self._runner.few, request.flight, request.pages, self._shape
        assert few is not None
        assert pages is not None
        first = flight[0].position
        last = min(first + MOST + window, request.last_row)
        taken = self._reserve(request, first, last)
        if taken is None:
            return None
        # Rows that begin anew find their own slots in it, whoever stopped early there before.
        own = self._memory.table(pages, last + 1)[1 : request.max_loops + 1, first:].copy()
        shape.own, shape.first, shape.span = own.ctypes.data, first, last + 1 - first
        ends = (ctypes.c_int64 * len(request.answer.ends))(*request.answer.ends)
        shape.ends, shape.end_count = ctypes.addressof(ends), len(ends)
        self._describe(request, window, settings)
        self._put_flight(request, last)
        seats = self._runner.seats
        shape.free = window + 2
        for number in range(shape.free):
            self._seats[number] = seats.take()
        shape.tokens = shape.ticks = shape.rows = shape.started = 0
        few.run_alone(shape, self._runner.rotary_to(last))
        for seat in self._seats[: shape.free]:
            seats.give(seat)
        request.flight = [_row(*numbers) for numbers in _unpack(_FLYING, self._flight, shape.flying)]
        written = [row.position for row in request.flight if row.started]
        self._memory.trim(pages, max(written, default=request.flight[0].position - 1) + 1, last)
        if shape.planned != request.max_loops:
            self._give_back(pages, taken, first)
        said = [
            Said(token, settled, asked > 0, loops, logprob)
            for token, settled, asked, loops, logprob in _unpack(_SAID, self._said, shape.tokens)
        ]
        return Stretch(said, shape.ticks, shape.rows, shape.started)

    def _describe(self, request: Request, window: int, settings: Speculation | None) -> None:
        """How its rows run, stop, draft and choose."""
        shape, sampling, pages = self._shape, request.sampling, request.pages
        assert pages is not None
        shape.sequence, shape.loops, shape.last_row = pages.seat, request.max_loops, request.last_row
        shape.planned = planned_exit(request, request.flight[0].position) or 0
        if isinstance(request.rule, Hazard):
            shape.threshold, shape.min_loops = request.rule.threshold, sampling.min_loops
        shape.window = window
        if settings is not None:
            shape.draft_loop, shape.redraft = settings.draft_loop, settings.redraft
        shape.key, shape.sample, shape.temperature = sampling.key, request.answer.sample, sampling.temperature

    def _put_flight(self, request: Request, last: int) -> None:
        """Its rows as the call has them, which notes the planes of positions up to `last`."""
        shape, pages = self._shape, request.pages
        assert pages is not None
        ctypes.memset(self._deepest, 0, ctypes.sizeof(self._deepest))
        shape.flying = len(request.flight)
        for number, row in enumerate(request.flight):
            spare, chance = (-1, 0.0) if row.spare is None else (row.spare.token, row.spare.logprob)
            _FLYING.pack_into(
                *(self._flight, number * _FLYING.size, row.position, row.token, row.loop, row.seat, row.asked),
                *(row.left, spare, row.survival, chance),
            )
            if row.position <= last:
                self._deepest[row.position - shape.first] = row.loop
            if row.left and shape.aliases:
                self._memory.settle(pages, row.position, row.left, generated=True)

    def _give_back(self, pages: PageList, taken: Sequence[tuple[int, int]], first: int) -> None:
        """Pages that were taken for what rows might write, of planes that none of them has reached."""
        size = self._memory.layout.page
        deepest = self._deepest[:]
        for plane, index in taken:
            begin = max(index * size - first, 0)
            if max(deepest[begin : (index + 1) * size - first], default=0) < plane:
                self._memory.give_back(pages, plane, index)

    def _reserve(self, request: Request, first: int, last: int) -> list[tuple[int, int]] | None:
        """Pages and table entries for every loop of some positions: planes and indices of pages that are new.

        None, and nothing is taken, where there is no room.
        """
        memory, pages = self._memory, request.pages
        assert pages is not None
        planes = range(1, request.max_loops + 1)
        lacking = [(plane, index) for plane in planes for index in memory.missing(pages, plane, first, last)]
        if len(lacking) > memory.core.free:
            return None
        if lacking:
            for plane in planes:
                take_pages(memory, pages, plane, first, last, make_room=lambda count: False)
        memory.write_every(pages, request.max_loops, first, last)
        return lacking


def _row(
    position: int, token: int, loop: int, seat: int, asked: int, left: int, spare: int, survival: float, chance: float
) -> Row:
    """One `Flying` as the engine has it."""
    row = Row(position, token, seat, loop > 0, loop, left, asked=asked > 0, survival=survival)
    row.spare = Choice(spare, chance) if left else None
    return row


def _unpack(record: Struct, buffer: ctypes.Array[ctypes.c_char], count: int) -> list[tuple[Any, ...]]:
    """The first records of a buffer."""
    return [record.unpack_from(buffer, number * record.size) for number in range(count)]
