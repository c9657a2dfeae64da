"""Who runs in the next tick, and who has room in memory.

A row (position p, loop r) may run when every earlier position of its request has stopped, or has finished r loops, or
does loop r in the same launch: then the planes it reads are written. Without this check a row budget breaks answers.
"""

from collections import deque
from collections.abc import Callable, Set

import numpy as np

from loopwise.engine.plan import Plan
from loopwise.engine.request import Chunk, Request, Row, Stage
from loopwise.memory.paged import BOUNDARY, PagedMemory, PageList, take_pages
from loopwise.memory.prefix import Beginning, PrefixCache
from loopwise.memory.snapshot import restore_pages, save_pages


class Scheduler:
    """Waiting and running requests, in order of arrival.

    Args:
        seats: requests that may run at once.
        chunk: prompt rows of one tick, at most.
        rows: all rows of one tick, at most.
        drop: tells the engine to forget rows of a request from an index of its flight on.
    """

    def __init__(
        self,
        memory: PagedMemory,
        prefix: PrefixCache | None,
        *,
        seats: int,
        chunk: int,
        rows: int,
        identity: Callable[[Request], object],
        drop: Callable[[Request, int], None],
    ) -> None:
        self.memory = memory
        self.prefix = prefix
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self._seats = seats
        self._chunk = chunk
        self._rows = rows
        self._identity = identity
        self._drop = drop
        self._fills = memory.policy.fills
        self._turn = 0
        self._refused: tuple[int, ...] = ()
        """What was known when the first of those who wait did not fit."""

    # Coming and going

    def admit(self) -> None:
        """Let waiting requests in, oldest first, while there are seats and pages for their prompts."""
        while self.waiting and len(self.running) < self._seats and self._let_in(self.waiting[0]):
            self.waiting.popleft()

    def _let_in(self, request: Request) -> bool:
        """Let a request begin, or come back, if it fits beside those that run; the cache gives way."""
        if self._room(request) == self._refused:
            return False  # nothing has changed since it was looked at
        pages, found = self.memory.open(), Beginning(0, ())
        if request.snapshot is None and self.prefix is not None:
            # Before room is made: what it will share needs none, and held by it, the cache does not give it up.
            request.identity = self._identity(request)
            planes = self.memory.stores(request.max_loops, generated=False)
            # The last token is computed in any case: its prediction is the answer's first token.
            found = self.prefix.find(pages, request.identity, request.prompt[:-1], planes)
        if not self._has_room(request, found.length):
            self.memory.close(pages)
            self._refused = self._room(request)
            return False
        if request.snapshot is not None:
            restore_pages(self.memory, pages, request.snapshot)
            request.snapshot = None
        elif self.prefix is not None:
            self.prefix.count(asked=len(request.prompt) - 1, found=found.length)
            self._begin_after(request, pages, found)
        request.stage, request.pages = Stage.RUNNING, pages
        self.running.append(request)
        self.running.sort(key=lambda one: one.number)
        return True

    def _room(self, request: Request) -> tuple[int, ...]:
        """What decides whether a request fits."""
        pools = [pool.free for pool in (self.memory.core, self.memory.boundary) if pool is not None]
        return (request.number, len(self.running), *pools)

    def _begin_after(self, request: Request, pages: PageList, found: Beginning) -> None:
        """Go on after the positions whose pages another request has left."""
        length, first = found.length, 0 if self.memory.boundary is not None else 1
        request.cursor, request.left = length, [*found.left] or [request.max_loops] * length
        if not length:
            return
        if not found.left or self.memory.policy.fills:
            for loop in range(first, request.max_loops + 1):
                self.memory.write_at(pages, loop, 0, length - 1, generated=False)
            return
        size, left = self.memory.layout.page, np.array(found.left)
        for start in range(0, length, size):
            for loop in range(first, int(left[start : start + size].max()) + 1):
                self.memory.write_at(pages, loop, start, start + size - 1, generated=False)
        for loop in range(1, request.max_loops + 1):
            self.memory.settle_many(pages, np.flatnonzero(left == loop), loop)

    def _has_room(self, request: Request, found: int) -> bool:
        """Whether there are pages for a request whose first `found` positions it shares, without driving out others."""
        size = self.memory.layout.page
        core = len(self.memory.policy.stored(request.max_loops, generated=False))
        kept_core, kept_boundary, begun = 0, 0, found
        if request.snapshot is not None:
            kept_core, kept_boundary = request.snapshot.counts
            begun = request.cursor
        rest = max(0, -(-len(request.prompt) // size) - -(-begun // size))
        # Everyone who runs, and the newcomer, will soon want one page more; without that room they would only
        # take turns at stepping aside.
        growth = 1 + len(self.running) if self.running else 0
        fits = self._free_up(1, kept_core + (rest + growth) * core)
        return fits and (self.memory.boundary is None or self._free_up(BOUNDARY, kept_boundary + rest + growth))

    def _free_up(self, plane: int, pages: int) -> bool:
        """Whether a pool has this many free pages, after the cache gave way if need be."""
        pool = self.memory.pool(plane)
        if pool.free < pages and self.prefix is not None:
            self.prefix.shrink(plane, pages - pool.free)
        return pool.free >= pages

    def leave(self, request: Request) -> None:
        """A request is over: give back its pages."""
        if request.pages is not None:
            self.running.remove(request)
            self.memory.close(request.pages)
            request.pages = None
        elif request in self.waiting:
            self.waiting.remove(request)
        request.snapshot = request.chunk = None
        request.stage = Stage.DONE

    def step_aside(self, request: Request) -> None:
        """Copy what is settled to host memory and give everything back; what was in flight starts its position anew."""
        assert request.pages is not None
        settled = request.settled
        spoken = max(settled, len(request.left))
        request.snapshot = save_pages(self.memory, request.pages, settled, spoken=spoken) if settled else None
        # Rows that have answered keep the loop they left at: they only have planes to fill.
        again = [Row(row.position, row.token, left=row.left) for row in request.flight[: request.frontier + 1]]
        self._drop(request, 0)
        request.flight = again
        request.chunk = None
        self.running.remove(request)
        self.memory.close(request.pages)
        request.pages = None
        request.stage = Stage.WAITING
        self.waiting.appendleft(request)
        self.waiting = deque(sorted(self.waiting, key=lambda one: one.number))
        self.preemptions += 1

    # Planning

    def plan(self, window: Callable[[int], int]) -> Plan:
        """The rows and chunks of the next tick, with pages for what they write.

        Args:
            window: how many drafts ahead of its frontier a request may run, given the number of other rows.
        """
        plan = Plan()
        turns = self._turns()
        # What has begun goes on in lock-step, so it has its places before anything new is given any.
        plan.chunks = [(request, request.chunk) for request in turns if request.chunk is not None]
        for request in turns:
            if request.flight:
                self._plan_flight(plan, request, 0, request.frontier + 1, request.max_loops, patient=False)
            if request.cursor < len(request.prompt) and request.chunk is None:
                self._begin_chunk(plan, request)
        base = plan.total
        ahead = window(base)
        if ahead:
            planned = {id(row) for _, row in plan.rows}
            for request in turns:
                if request.drafts and request.flight:
                    self._plan_drafts(plan, request, ahead, planned)
            plan.drafts = plan.total - base
        return plan

    def _turns(self) -> list[Request]:
        """Running requests; whose turn is first changes, so that a small budget starves nobody."""
        if len(self.running) < 2:
            return self.running.copy()
        self._turn = (self._turn + 1) % len(self.running)
        return self.running[self._turn :] + self.running[: self._turn]

    def _plan_drafts(self, plan: Plan, request: Request, ahead: int, planned: Set[int]) -> None:
        """The drafts behind the frontier; `planned` are the ids of the rows that run in any case."""
        first = request.frontier + 1
        if first < len(request.flight):
            row = request.flight[first - 1]
            # No row before the frontier has fewer loops behind it.
            finished = request.max_loops if self._rests(request, row) else row.loop + (id(row) in planned)
            self._plan_flight(plan, request, first, first + ahead, finished, patient=True)

    def _plan_flight(
        self, plan: Plan, request: Request, first: int, last: int, finished: int, *, patient: bool
    ) -> None:
        """Rows of a flight from one index to before another.

        Args:
            finished: loops that the position before has finished once this launch is over.
        """
        if request.stage is not Stage.RUNNING:
            return  # it had to step aside while others were planned
        for row in request.flight[first:last]:
            if self._rests(request, row):
                continue
            done = row.loop
            if done < finished and plan.total < self._rows:
                if not self._give_pages(plan, request, row, patient=patient):
                    return
                plan.rows.append((request, row))
                done += 1
            finished = min(finished, done)

    def _rests(self, request: Request, row: Row) -> bool:
        """Whether a row has no loop left to run."""
        return row.loop == request.max_loops or (row.left > 0 and not self._fills)

    def _begin_chunk(self, plan: Plan, request: Request) -> None:
        if request.stage is not Stage.RUNNING:
            return
        remaining = len(request.prompt) - request.cursor
        room = min(self._chunk - plan.prompt_rows, self._rows - plan.total)
        size = {"chunks": min(remaining, room), "lockstep": remaining, "per_position": 1}[self.memory.policy.prefill]
        # A prompt that may not be cut has to run even if it is longer than the budget: then no other runs beside it.
        if size < 1 or (size > room and plan.chunks):
            return
        # Room that comes free bit by bit, where prompt rows stop, would cut prompts into ever smaller pieces.
        if plan.chunks and size < min(remaining, self._chunk // 4):
            return
        chunk = Chunk(request.cursor, request.cursor + size - 1)
        if self._give_chunk_pages(plan, request, chunk):
            request.chunk = chunk
            plan.chunks.append((request, chunk))

    # Pages

    def _give_pages(self, plan: Plan, request: Request, row: Row, *, patient: bool) -> bool:
        """Pages for what a row writes next, and its table entries. A patient row never drives others out."""
        assert request.pages is not None
        memory, generated = self.memory, row.position >= len(request.prompt)
        writes = () if row.started or memory.boundary is None else (BOUNDARY,)
        for target in (*writes, row.loop + 1):
            if memory.point(request.pages, target, row.position, generated=generated):
                continue
            plane = target if target == BOUNDARY else memory.policy.store(target, memory.planes, generated=generated)
            room = self._maker(plan, request, plane, patient=patient)
            lacks = memory.lacks(request.pages, plane, row.position)
            if lacks and not take_pages(memory, request.pages, plane, row.position, row.position, make_room=room):
                return False
            memory.write_at(request.pages, target, row.position, row.position, generated=generated)
        return True

    def _give_chunk_pages(self, plan: Plan, request: Request, chunk: Chunk) -> bool:
        assert request.pages is not None
        for plane in self.memory.stores(request.max_loops, generated=False):
            room = self._maker(plan, request, plane, patient=False)
            if not take_pages(self.memory, request.pages, plane, chunk.first, chunk.last, make_room=room):
                return False
        for loop in range(0 if self.memory.boundary is not None else 1, request.max_loops + 1):
            self.memory.write_at(request.pages, loop, chunk.first, chunk.last, generated=False)
        return True

    def _maker(self, plan: Plan, request: Request, plane: int, *, patient: bool) -> Callable[[int], bool]:
        """How this request gets pages of a plane's pool: from the cache, from drafts, from younger requests."""

        def make_room(count: int) -> bool:
            pool = self.memory.pool(plane)
            target = pool.free + count
            if patient:
                return False
            if self.prefix is not None and self.prefix.shrink(plane, count):
                return True
            # Its own drafts too: they must not keep from it what its frontier needs.
            for other in reversed(self.running):
                if len(other.flight) > other.frontier + 1:
                    self._drop(other, other.frontier + 1)
                    plan.rows = [(mine, row) for mine, row in plan.rows if mine is not other or row in other.flight]
                    if pool.free >= target:
                        return True
            while pool.free < target and self.running[-1].number > request.number:
                victim = self.running[-1]
                plan.drop(victim)
                self.step_aside(victim)
                if self.prefix is not None:
                    self.prefix.shrink(plane, target - pool.free)
            return pool.free >= target

        return make_room
