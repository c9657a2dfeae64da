"""What one tick runs, as it is being decided."""

from dataclasses import dataclass, field

from loopwise.engine.request import Chunk, Request, Row


@dataclass
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
        return len(self.rows) + self.prompt_rows

    def drop(self, request: Request) -> None:
        """Take out a request that had to step aside after it was planned."""
        self.rows = [(mine, row) for mine, row in self.rows if mine is not request]
        self.chunks = [(mine, chunk) for mine, chunk in self.chunks if mine is not request]
