"""One line that says how a run is doing: on a terminal it stays in place, in a log file it is printed now and then."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

SHOWN_LOOPS = 6


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the line shows; a field that is None is left out."""

    step: int
    """Optimiser steps completed."""
    steps: int
    """Steps of the whole run."""
    losses: Sequence[float]
    """Loss in nats by loop."""
    loops: Sequence[int] | None = None
    """The loops that the losses were read at, rising; None: 1..R. Others are shown with their number."""
    mean_exit: float | None = None
    """Mean exit loop under the gate."""
    tokens_per_second: float | None = None
    """Training tokens per second."""
    peak_share: float | None = None
    """Executed FLOP/s as a share of the measured matrix-multiply peak."""
    learning_rate: float | None = None
    """Rate of the last step."""
    skipped: int = 0
    """Steps skipped so far for gradients that were not finite."""
    stage: str | None = None
    """Name of the present stage of a recipe."""


def render(status: Status, seconds_left: float | None) -> str:
    """The line, without colour: `step 1,200/5,000 · loss 3.31 3.12 3.05 3.01 · exit 2.4 · 12.3k tok/s · ...`."""
    parts = [f"step {status.step:,}/{status.steps:,}", f"loss {compact_losses(status.losses, status.loops)}"]
    if status.stage is not None:
        parts.insert(0, status.stage)
    if status.mean_exit is not None:
        parts.append(f"exit {status.mean_exit:.2f}")
    if status.tokens_per_second is not None:
        parts.append(f"{compact_count(status.tokens_per_second)} tok/s")
    if status.peak_share is not None:
        parts.append(f"{status.peak_share:.0%} of peak")
    if status.learning_rate is not None:
        parts.append(f"lr {status.learning_rate:.1e}")
    if status.skipped:
        parts.append(f"skipped {status.skipped}")
    if seconds_left is not None:
        parts.append(f"{compact_time(seconds_left)} left")
    return " · ".join(parts)


def compact_losses(losses: Sequence[float], loops: Sequence[int] | None = None) -> str:
    """Losses by loop; of many loops only the first ones and the last are shown. `3:2.115` is loop 3 of a few."""
    shown = [f"{loss:.3f}" for loss in losses]
    if loops is not None and list(loops) != list(range(1, len(losses) + 1)):
        shown = [f"{loop}:{loss}" for loop, loss in zip(loops, shown, strict=True)]
    if len(shown) > SHOWN_LOOPS:
        shown = [*shown[: SHOWN_LOOPS - 2], "…", shown[-1]]
    return " ".join(shown)


def compact_count(value: float) -> str:
    """1234567 as 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # Rounding may carry 999,960 over to the next unit.
        if value >= 0.99995 * size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def compact_time(seconds: float) -> str:
    """Seconds as `42s`, `4m10s`, `3h05m` or `2d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Progress:
    """Shows a `Status` again and again. Use it as a context manager; `note` prints a lasting line above it.

    On a terminal the line is redrawn in place at most ten times a second. Elsewhere a plain line without control
    characters is printed every `every` seconds and at the end.
    """

    def __init__(
        self,
        *,
        console: Console | None = None,
        every: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._every = every
        self._clock = clock
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._shown_at: float | None = None
        self._first: tuple[float, int] | None = None
        self._unshown: str | None = None

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        if self._live is not None:
            self._live.stop()

    def update(self, status: Status) -> None:
        """Takes the present status; draws it if enough time has passed."""
        now = self._clock()
        if self._first is None:
            self._first = (now, status.step)
        started, first = self._first
        done = status.step - first
        left = (now - started) / done * (status.steps - status.step) if done > 0 else None
        self._unshown = render(status, left)
        interval = 0.1 if self._live is not None else self._every
        if self._shown_at is None or now - self._shown_at >= interval or status.step >= status.steps:
            self._shown_at = now
            self._flush()

    def note(self, text: str) -> None:
        """Prints a line that stays: a warning, a validation result, a saved checkpoint."""
        self._console.print(Text(text), soft_wrap=True)

    def _flush(self) -> None:
        if self._unshown is None:
            return
        if self._live is not None:
            self._live.update(Text(self._unshown, overflow="ellipsis", no_wrap=True), refresh=True)
        else:
            self._console.print(Text(self._unshown), soft_wrap=True)
        self._unshown = None
