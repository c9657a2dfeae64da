"""How fast one way of generating is beside another: in one process, taking turns, medians and ratios.

The engine writes one answer after the other, and no position is started from a draft: loops that are saved are all that
differs. In a crowd of answers by a model so small that the host's work outweighs it, full depth has an advantage: all
of them are then read out in the same tick, while exits spread readouts over every tick.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loopwise.engine.engine import Engine
from loopwise.engine.sampling import Sampling
from loopwise.models.looped_lm import LoopedLM


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One side of a comparison."""

    rates: tuple[float, ...]
    """Generated tokens over wall time in each round; reading the prompt is included."""
    mean_loops: float
    """Loops per generated token."""

    @property
    def tokens_per_second(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rates)


@dataclass(frozen=True, kw_only=True)
class SpeedUp:
    """Writing with an exit rule beside writing at full depth."""

    rule: str
    full: Speed
    exit: Speed

    @property
    def ratios(self) -> list[float]:
        """Times as fast, round by round, least first."""
        return sorted(fast / slow for fast, slow in zip(self.exit.rates, self.full.rates, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.ratios)


def compare_speed(
    model: LoopedLM, prompts: Sequence[Sequence[int]], sides: Mapping[str, Sampling], *, rounds: int = 3
) -> dict[str, Speed]:
    """Answer the prompts with each side in turn, `rounds` times over after one round that does not count."""
    engine = _engine(model)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    loops: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, sampling in sides.items():
            began = time.perf_counter()
            done = engine.generate(prompts, sampling)
            seconds = time.perf_counter() - began
            used = [count for completion in done for count in completion.loops]
            loops[name] = sum(used) / len(used)
            if turn:
                rates[name].append(len(used) / seconds)
    return {name: Speed(rates=tuple(rates[name]), mean_loops=loops[name]) for name in sides}


def measure_speed(
    model: LoopedLM, prompts: Sequence[Sequence[int]], sampling: Sampling, *, mean_loops: float, rounds: int = 3
) -> SpeedUp:
    """Write with the hazard rule whose mean on these prompts is nearest to `mean_loops`, and at full depth.

    What a model writes is not what it has read, so a threshold that has this mean on a text has another one here.
    """
    engine = _engine(model)
    low, high, nearest = 0.0, 1.0, (float("inf"), "")
    for _ in range(9):
        middle = (low + high) / 2
        rule = f"hazard:{round(middle, 4)!r}"
        done = engine.generate(prompts, replace(sampling, exit=rule))
        used = [count for completion in done for count in completion.loops]
        mean = sum(used) / len(used)
        nearest = min(nearest, (abs(mean - mean_loops), rule))
        low, high = (middle, high) if mean < mean_loops else (low, middle)
    rule = nearest[1]
    sides = {"full": replace(sampling, exit=None), "exit": replace(sampling, exit=rule)}
    return SpeedUp(rule=rule, **compare_speed(model, prompts, sides, rounds=rounds))


def _engine(model: LoopedLM) -> Engine:
    # A prompt that is found again would make later rounds faster than the first.
    return Engine(model, "last_exited", speculate="off", prefix_cache=False, seats=1)
