"""Wavefront self-speculation: when a position is started from an early readout of the one before it.

Row p is read after `draft_loop` loops, and at each later one if `redraft`; the token found starts row p + 1, always at
a smaller loop than p, so that the planes it reads are written. When p stops, its token is certain: if p + 1 was
started from another, everything behind p is dropped. Tokens, loops and log-probabilities are those of plain decoding.

How far to run ahead is a question of cost alone. With E loops per token, drafts that settle at loop s of the row before
and a window of w drafts, a request has n = min(w + 1, E / s) rows in flight and makes n / E tokens per tick; a tick
of B requests costs c(B n). The window with the least E c(B n) / n is taken, 0 among them, of those whose drafts are
nearly free.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loopwise.engine.costs import CostCurve
from loopwise.errors import CheckpointError, ConfigError
from loopwise.hub.tokenizer_files import read_json

MOST = 7
"""Drafts of one request in flight, at most."""
NEARLY_FREE = 1.15
"""A tick with drafts may take this much longer than without. The measured cost of a tick leaves out attention and what
the host does for each row, so where rows are dear a small predicted gain would be none."""
WORTHWHILE = 1.3
"""It may take longer where so many times the tokens are predicted to come of it."""
FILLING = 1.3
"""A window may grow beyond what drafts need on average while a tick takes at most this much longer for it."""

FASTER = 0.98
"""Drafts are kept while a token takes less than this part of the time that it takes without."""


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How drafts are made."""

    draft_loop: int = 1
    """The first loop after which a row is read for a draft."""
    redraft: bool = True
    """Whether later loops are read too, and the next position starts anew when they disagree."""
    window: int | None = None
    """Drafts ahead of the frontier; None weighs cost against gain in every tick."""

    def __post_init__(self) -> None:
        if self.draft_loop < 1 or (self.window is not None and not 0 <= self.window <= MOST):
            raise ConfigError(
                f"speculation draft_loop={self.draft_loop}, window={self.window}: allowed are 1 or more, and 0 to "
                f"{MOST} or None"
            )

    def reads(self, loop: int) -> bool:
        """Whether a row is read after this loop."""
        return loop == self.draft_loop or (self.redraft and loop > self.draft_loop)

    def __str__(self) -> str:
        return f"{self.draft_loop}" if self.redraft else f"{self.draft_loop}:once"


def saved_speculation(folder: Path | None) -> str | None:
    """What was measured to be best for the checkpoint in this folder, "off" or a text of `parse_speculation`.

    Raises:
        CheckpointError: its generation_config.json cannot be read.
    """
    own = {} if folder is None else read_json(folder / "generation_config.json").get("loopwise", {})
    kept = own.get("speculate") if isinstance(own, dict) else None
    if kept is not None and not isinstance(kept, str):
        raise CheckpointError(
            f'{folder}/generation_config.json: loopwise.speculate={kept!r}: allowed are texts such as "auto", "off", '
            '"2" and "2:once"; `loopwise bench drafts MODEL --keep` writes the best'
        )
    return kept


def parse_speculation(text: "str | Speculation | None") -> Speculation | None:
    """None for "off"; "auto"; "2" (drafts from loop 2, read again at later loops) or "2:once".

    Raises:
        ConfigError: for anything else.
    """
    if text is None or isinstance(text, Speculation):
        return text
    if text == "off":
        return None
    if text == "auto":
        return Speculation()
    loop, _, once = text.partition(":")
    if not loop.isdigit() or once not in ("", "once"):
        raise ConfigError(f'speculate={text!r}: allowed are "auto", "off", a draft loop such as "2", or "2:once"')
    return Speculation(draft_loop=int(loop), redraft=not once)


class Pace:
    """Whether drafts make one request faster, by the clock: the cost of ticks leaves out what the host does for rows,
    and of a small model that is most of it.

    Drafts run; after a while they rest for a few tokens, so that there is something to compare with. Where they are no
    faster they rest for long, and are tried again.
    """

    TRIAL = 48
    """Tokens of a try."""
    REST = 12
    """Tokens of a rest that is only to compare with."""
    LONG = 256
    """Tokens of what follows a comparison."""
    STRETCHES = 16
    """So many times drafts may be found to be faster before they rest again to be compared with."""

    def __init__(self) -> None:
        self.drafting = True
        self._until, self._tokens, self._seconds = self.TRIAL, 0, 0.0
        self._usual = 0.0
        self._plain = self._drafted = math.nan
        """Seconds per token."""
        self._stretches = 0

    def took(self, seconds: float, tokens: int) -> None:
        """A tick of one request alone made so many tokens."""
        # A tick that something else held up counts for some usual ones.
        seconds = min(seconds, 5 * self._usual) if self._usual else seconds
        self._usual += (seconds - self._usual) / 16
        self._seconds += seconds
        self._tokens += tokens
        if self._tokens < self._until:
            return
        pace = self._seconds / self._tokens
        self._tokens, self._seconds = 0, 0.0
        if self.drafting:
            self._drafted, self._stretches = pace, self._stretches + 1
            if math.isnan(self._plain) or self._stretches % self.STRETCHES == 0:
                self.drafting, self._until = False, self.REST
            else:
                self.drafting, self._until = self._drafted < FASTER * self._plain, self.LONG
        else:
            self._plain = pace
            again = self._until == self.LONG
            faster = self._drafted < FASTER * self._plain
            self.drafting, self._until = faster or again, self.TRIAL if again else self.LONG


class Speculator:
    """Decides how far to run ahead, and remembers how drafts fared.

    Args:
        measure: measures the cost of ticks; called when the first decision needs it.
        loops: loops per token to expect before any was seen.
    """

    def __init__(self, settings: Speculation, measure: Callable[[], CostCurve], loops: int) -> None:
        self.settings = settings
        self.started = 0
        """Positions that were started from a draft, started-anew ones included."""
        self.confirmed = 0
        """Tokens whose row was already running when they became certain."""
        self.tokens = 0
        """Tokens that became certain while speculation was possible."""
        self.settled: Counter[int] = Counter()
        """Tokens by the loops after which their right draft ran; of rows that were read in time."""
        self._measure = measure
        self._costs: CostCurve | None = None
        self._windows: dict[int, int] = {}
        """Decisions by rows, kept while what was seen of drafts changes little."""
        self._flight = 0.0
        self.pace = Pace()
        self._loops = float(loops)
        # Hoped for until seen: the draft settles halfway.
        self._settles = max(float(settings.draft_loop), loops / 2)

    @property
    def costs(self) -> CostCurve:
        if self._costs is None:
            self._costs = self._measure()
        return self._costs

    @property
    def settles(self) -> float:
        """Loops of the row before after which the right draft runs, as seen lately."""
        return self._settles

    @property
    def mean_settling(self) -> float:
        """The same over all that was seen; NaN before the first."""
        count = self.settled.total()
        return sum(loops * tokens for loops, tokens in self.settled.items()) / count if count else float("nan")

    @property
    def flight(self) -> float:
        """Rows that a request has in flight when nothing holds it back."""
        return max(1.0, self._loops / max(self._settles, 1.0))

    def window(self, rows: int) -> int:
        """Drafts ahead of the frontier that pay, when `rows` rows run in any case."""
        if self.settings.window is not None:
            return self.settings.window
        if rows == 0 or (rows == 1 and not self.pace.drafting):
            return 0
        if rows not in self._windows:
            self._windows[rows] = self._weigh(rows)
        return self._windows[rows]

    def _weigh(self, rows: int) -> int:
        most = self.flight
        best, best_cost = 0, self.costs(rows)
        for window in range(1, MOST + 1):
            flight = min(window + 1.0, most)
            cost = self.costs(rows * flight) / flight
            dear = self.costs(rows * flight) > NEARLY_FREE * self.costs(rows)
            # One request alone may pay for drafts that bring much; in a crowd the host's work for rows adds up.
            dear = dear and (rows > 1 or WORTHWHILE * cost > self.costs(rows))
            # A gain within the noise of the measurement is none.
            if cost < 0.97 * best_cost and not dear:
                best, best_cost = window, cost
            if flight == most:
                break
        # Means hide that settled tokens come in runs: where a fuller window costs little, it may be full.
        deepest = min(MOST, round(self._loops) - 1)
        allowed = NEARLY_FREE * self.costs(rows)
        if rows == 1:
            allowed = max(allowed, FILLING * self.costs(min(best + 1.0, most)))
        while 0 < best < deepest and self.costs(rows * (best + 2)) <= allowed:
            best += 1
        return best

    def learn(self, *, loops: int, settled: int, asked: bool) -> None:
        """One token became certain after `loops` loops; its successor had been started after `settled` of them.

        Args:
            asked: whether its row was read from the first draft loop on. Where the window held that back, when its
                successor began says nothing of when its draft settled.
        """
        self.tokens += 1
        self.confirmed += settled < loops
        if not asked:
            return
        self.settled[settled] += 1
        self._loops += 0.05 * (loops - self._loops)
        self._settles += 0.05 * (settled - self._settles)
        flight = self.flight
        if abs(flight - self._flight) > 0.02 * self._flight:
            self._flight = flight
            self._windows.clear()

    @property
    def acceptance(self) -> float:
        """Share of tokens whose row was running before they were certain; NaN before the first."""
        return self.confirmed / self.tokens if self.tokens else float("nan")
