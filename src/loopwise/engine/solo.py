"""One request alone: many ticks in one call (`run_alone` in `nn/kernels/launch.cpp`).

What the host does around a launch of few rows takes a third as long as the launch, mostly because the weights that
stream past leave nothing of it in a cache. Where a request has the engine to itself, runs every loop, and all that is
told are its tokens, nothing needs the host between ticks: the call plans, launches, reads and confirms by itself until
some tokens are certain. Ticks one by one (`core.py`) are the reference: the same launches, tokens and counts.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any

from loopwise.engine.judge import planned_exit
from loopwise.engine.request import Request, Row
from loopwise.engine.runner import Runner
from loopwise.engine.speculation import Speculation
from loopwise.memory.paged import take_pages
from loopwise.nn.kernels.launch import FLYING, SAID, SoloShape
from loopwise.nn.kernels.linear import FEW_ROWS

MOST = 16
"""Tokens of one call, at most: what the host does for one is cheaper when it does it for several."""
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
        self._said = ctypes.create_string_buffer(MOST * _SAID.size)
        self._seats = (ctypes.c_int64 * (2 * _PLACES))()
        self._shape = SoloShape(seconds=SECONDS, most=MOST)
        for name in ("flight", "said", "seats"):
            setattr(self._shape, name, ctypes.addressof(getattr(self, f"_{name}")))

    def serves(self, request: Request) -> bool:
        """Whether this request's rows can run so, now that it is alone."""
        if request.solo is None:
            request.solo = self._is_simple(request)
        flight = request.flight
        return request.solo and 0 < len(flight) <= FEW_ROWS and flight[0].position == len(request.left)

    def _is_simple(self, request: Request) -> bool:
        few, sampling = self._runner.few, request.sampling
        if few is None or not (few.begins and few.says and self._memory.policy.speculates):
            return False
        if request.signals or request.provisional or request.replay is not None:
            return False
        every = planned_exit(request, len(request.prompt)) == request.max_loops
        return every and sampling.plain and sampling.start is None

    def run(self, request: Request, window: int, settings: Speculation | None) -> Stretch | None:
        """Run it until tokens are certain; None where memory has no room for what it might write meanwhile.

        Args:
            window: how many drafts ahead of its frontier it may run.
            settings: how drafts are made.
        """
        few, flight, pages = self._runner.few, request.flight, request.pages
        assert few is not None
        assert pages is not None
        last = min(flight[0].position + MOST + window, request.last_row)
        if not self._reserve(request, flight[0].position, last):
            return None
        seats = self._runner.seats
        free = [seats.take() for _ in range(window + 2)]
        for number, seat in enumerate(free):
            self._seats[number] = seat
        for number, row in enumerate(flight):
            _FLYING.pack_into(
                *(self._flight, number * _FLYING.size, row.position, row.token, row.loop, row.seat, row.asked)
            )
        shape, sampling, answer = self._shape, request.sampling, request.answer
        ends = (ctypes.c_int64 * len(answer.ends))(*answer.ends)
        shape.sequence, shape.loops, shape.last_row = pages.seat, request.max_loops, request.last_row
        shape.window = window
        if settings is not None:
            shape.draft_loop, shape.redraft = settings.draft_loop, settings.redraft
        shape.key, shape.sample, shape.temperature = sampling.key, answer.sample, sampling.temperature
        shape.ends, shape.end_count = ctypes.addressof(ends), len(ends)
        shape.flying, shape.free = len(flight), len(free)
        shape.tokens = shape.ticks = shape.rows = shape.started = 0
        few.run_alone(shape, self._runner.rotary_to(last))
        for seat in self._seats[: shape.free]:
            seats.give(seat)
        request.flight = [
            Row(position, token, seat, loop > 0, loop, asked=asked > 0)
            for position, token, loop, seat, asked in _unpack(_FLYING, self._flight, shape.flying)
        ]
        written = [row.position for row in request.flight if row.started]
        self._memory.trim(pages, max(written, default=request.flight[0].position - 1) + 1, last)
        said = [
            Said(token, settled, asked > 0, logprob)
            for token, settled, asked, logprob in _unpack(_SAID, self._said, shape.tokens)
        ]
        return Stretch(said, shape.ticks, shape.rows, shape.started)

    def _reserve(self, request: Request, first: int, last: int) -> bool:
        """Pages and table entries for every loop of some positions."""
        memory, pages = self._memory, request.pages
        assert pages is not None
        planes = range(1, request.max_loops + 1)
        lacking = sum(len(memory.missing(pages, plane, first, last)) for plane in planes)
        if lacking > memory.core.free:
            return False
        if lacking:
            for plane in planes:
                take_pages(memory, pages, plane, first, last, make_room=lambda count: False)
        memory.write_every(pages, request.max_loops, first, last)
        return True


def _unpack(record: Struct, buffer: ctypes.Array[ctypes.c_char], count: int) -> list[tuple[Any, ...]]:
    """The first records of a buffer."""
    return [record.unpack_from(buffer, number * record.size) for number in range(count)]
