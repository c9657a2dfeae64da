"""What an engine is doing, and what it has done, as numbers. May be asked from any thread while it runs."""

from dataclasses import dataclass

from loopwise.engine.engine import Engine
from loopwise.memory.pages import PagePool
from loopwise.memory.prefix import PrefixCache


@dataclass(frozen=True, kw_only=True)
class PageFigures:
    """Pages of one pool, by state; together they are all there are."""

    held: int
    """By requests that run."""
    cached: int
    """By the prefix cache alone."""
    free: int

    @property
    def used_share(self) -> float:
        """Share of pages that requests hold; the cache gives way, so its pages count as free."""
        return self.held / max(self.held + self.cached + self.free, 1)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """An engine at one moment. Numbers that only rise are counted from its making."""

    running: int
    waiting: int
    rows_at_loop: dict[int, int]
    """Rows of answers in flight by the loops they have run: 0 to the most an engine has planes for."""
    ticks: int
    rows: int
    """Rows that ran one loop, prompt rows included."""
    draft_rows: int
    tokens: int
    loops: dict[int, int]
    """Emitted tokens by the loops of the row that emitted them."""
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    drafts_started: int
    drafts_confirmed: int
    """Tokens whose row was already running when they became certain."""
    drafts_possible: int
    """Tokens that became certain while drafts were possible."""
    pages: dict[str, PageFigures]
    """Of the core's pool, and of prelude and coda's ("boundary") where there is one."""


def figures(engine: Engine) -> Figures:
    """The engine's numbers now. Each is right by itself; between two of them a tick may have passed."""
    core = engine._core
    scheduler, counts, memory = core.scheduler, core.counts, core.runner.memory
    running = list(scheduler.running)
    at_loop = dict.fromkeys(range(engine.max_loops + 1), 0)
    for request in running:
        for row in list(request.flight):
            at_loop[row.loop] += 1
    prefix, speculator = core.prefix, core.speculator
    pools = {"core": memory.core} | ({} if memory.boundary is None else {"boundary": memory.boundary})
    return Figures(
        running=len(running),
        waiting=len(scheduler.waiting),
        rows_at_loop=at_loop,
        ticks=counts.ticks,
        rows=counts.rows,
        draft_rows=counts.draft_rows,
        tokens=counts.tokens,
        loops=dict(counts.loops),
        preemptions=scheduler.preemptions,
        prefix_queries=0 if prefix is None else prefix.queries,
        prefix_hits=0 if prefix is None else prefix.hits,
        drafts_started=0 if speculator is None else speculator.started,
        drafts_confirmed=0 if speculator is None else speculator.confirmed,
        drafts_possible=0 if speculator is None else speculator.tokens,
        pages={name: _pages(pool, prefix) for name, pool in pools.items()},
    )


def _pages(pool: PagePool, prefix: PrefixCache | None) -> PageFigures:
    alone = 0
    if prefix is not None:
        # Copies, because a tick may change them meanwhile.
        for entry in list(prefix._entries.values()):
            for plane, page in list(entry.planes.items()):
                alone += prefix._memory.pool(plane) is pool and pool.holders(page) == 1
    free = pool.free
    return PageFigures(held=max(pool.pages - free - alone, 0), cached=alone, free=free)
