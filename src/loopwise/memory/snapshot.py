"""Exact copies of running sequences in host memory: how a request steps aside and comes back.

Running it again at another depth would change its numbers, so what was computed is kept, not recomputed.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from loopwise.memory.paged import BOUNDARY, PagedMemory, PageList


@dataclass(frozen=True)
class Snapshot:
    """An exact copy of a sequence's settled positions in host memory."""

    length: int
    table: np.ndarray
    """What readers find, (R + 1, length), as ordinal of the page in its pool's list, times page size, plus offset."""
    planes: dict[int, list[int]]
    """Ordinals instead of physical pages."""
    core: list[tuple[Tensor, Tensor]]
    boundary: list[tuple[Tensor, Tensor]]
    counts: tuple[int, int]
    """Pages of the core and of the boundary that the sequence needs to come back."""


def save_pages(memory: PagedMemory, pages: PageList, length: int, *, spoken: int) -> Snapshot:
    """Copy the first positions of every plane, and how readers find them; the pages are kept.

    Args:
        length: positions that have written every plane of the core.
        spoken: positions whose coda is final, at least `length`: rows that still fill planes write theirs no more.
    """
    size = memory.layout.page
    table = memory.table(pages, length).copy()
    planes: dict[int, list[int]] = {}
    contents: list[list[tuple[Tensor, Tensor]]] = []
    counts = []
    for core in (True, False):
        count = -(-(length if core else spoken) // size)
        mine = [plane for plane in pages.planes if (plane != BOUNDARY) == core]
        physical = sorted({page for plane in mine for page in pages.planes[plane][:count] if page >= 0})
        ordinal = {page: number for number, page in enumerate(physical)}
        for plane in mine:
            planes[plane] = [ordinal.get(page, -1) for page in pages.planes[plane][:count]]
        rows = slice(1, None) if core else slice(0, 1)
        if physical:
            lookup = np.zeros(max(physical) + 1, dtype=np.int64)
            lookup[physical] = np.arange(len(physical))
            # Entries of planes that no position has reached yet are not pages of ours; nobody reads them.
            inside = np.minimum(table[rows] // size, max(physical))
            table[rows] = lookup[inside] * size + table[rows] % size
        pool = memory.core if core else memory.boundary
        contents.append(pool.read(physical) if pool is not None and physical else [])
        counts.append(len(physical))
    return Snapshot(length, table, planes, contents[0], contents[1], (counts[0], counts[1]))


def restore_pages(memory: PagedMemory, pages: PageList, snapshot: Snapshot) -> None:
    """Put a snapshot into free pages; the caller has seen that there are enough."""
    size = memory.layout.page
    for core in (True, False):
        pool = memory.core if core else memory.boundary
        count = snapshot.counts[0 if core else 1]
        if pool is None or not count:
            continue
        physical = [pool.take() for _ in range(count)]
        pool.write(physical, snapshot.core if core else snapshot.boundary)
        for plane, ordinals in snapshot.planes.items():
            if (plane != BOUNDARY) == core:
                for index, ordinal in enumerate(ordinals):
                    if ordinal >= 0:
                        memory.place(pages, plane, index, physical[ordinal])
        if snapshot.length:
            memory.reach(snapshot.length - 1)
            rows = slice(1, None) if core else slice(0, 1)
            entries = np.asarray(physical)[snapshot.table[rows] // size] * size + snapshot.table[rows] % size
            memory.table(pages, snapshot.length)[rows] = entries
