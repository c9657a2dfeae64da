"""What one tick runs, as it is being decided."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from loopwise.engine.request import Chunk, Request, Row
from loopwise.memory.paged import BOUNDARY


@dataclass(slots=True)
class Plan:
    """What one tick runs."""

    rows: list[tuple[Request, Row]] = field(default_factory=list)
    chunks: list[tuple[Request, Chunk]] = field(default_factory=list)
    drafts: int = 0
    """How many of the rows were started from drafts."""

    @property
    def empty(self) -> bool:
        return not self.rows and not self.chunks

    @property
    def prompt_rows(self) -> int:
        return sum(chunk.rows for _, chunk in self.chunks) if self.chunks else 0

    @property
    def total(self) -> int:
        return len(self.rows) + self.prompt_rows if self.chunks else len(self.rows)

    def drop(self, request: Request) -> None:
        """Take out a request that had to step aside after it was planned."""
        self.rows = [(mine, row) for mine, row in self.rows if mine is not request]
        self.chunks = [(mine, chunk) for mine, chunk in self.chunks if mine is not request]


def columns_of(
    rows: Sequence[tuple[Request, Row]], chunks: Sequence[tuple[Request, Chunk]], *, boundary: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seat, loop and position of every row of a launch; the loop is the one about to run."""
    seats = [request.pages.seat for request, _ in rows if request.pages is not None]
    loops = [BOUNDARY if boundary else row.loop + 1 for _, row in rows]
    positions = [row.position for _, row in rows]
    columns = [np.array(seats, dtype=np.int64), np.array(loops, dtype=np.int64), np.array(positions, dtype=np.int64)]
    if not chunks:
        return columns[0], columns[1], columns[2]
    counts = [chunk.rows for _, chunk in chunks]
    owners = [-1 if request.pages is None else request.pages.seat for request, _ in chunks]
    depths = [BOUNDARY if boundary else chunk.loop + 1 for _, chunk in chunks]
    return (
        np.concatenate([columns[0], np.repeat(owners, counts)]),
        np.concatenate([columns[1], np.repeat(depths, counts)]),
        np.concatenate([columns[2], *(chunk.positions for _, chunk in chunks)]),
    )
