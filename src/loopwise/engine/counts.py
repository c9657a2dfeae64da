"""What an engine has done."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """What an engine has done so far."""

    ticks: int = 0
    rows: int = 0
    """Rows that ran one loop, prompt rows included."""
    draft_rows: int = 0
    """Those of them that were started from drafts and not yet confirmed."""
    prompt_rows: int = 0
    tokens: int = 0
    """Tokens emitted."""
    loops: Counter[int] = field(default_factory=Counter)
    """Emitted tokens by the loops of the row that emitted them."""

    def add(self, *, ticks: int, rows: int, draft_rows: int, prompt_rows: int = 0) -> None:
        """Launches that have run."""
        self.ticks += ticks
        self.rows += rows
        self.draft_rows += draft_rows
        self.prompt_rows += prompt_rows
