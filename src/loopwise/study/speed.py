"""How fast one way of generating is beside another: in one process, taking turns, medians and ratios."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.models.looped_lm import LoopedLM


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One side of a comparison."""

    tokens_per_second: float
    """Generated tokens over wall time, the median of the rounds; reading the prompt is included."""
    mean_loops: float
    """Loops per generated token."""


def compare_speed(
    model: LoopedLM, prompts: Sequence[Sequence[int]], sides: Mapping[str, Sampling], *, rounds: int = 3
) -> dict[str, Speed]:
    """Generate with each side in turn, `rounds` times over after one round that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    loops: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, sampling in sides.items():
            began = time.perf_counter()
            done = generate(model, prompts, sampling)
            seconds = time.perf_counter() - began
            used = [count for completion in done for count in completion.loops]
            loops[name] = sum(used) / len(used)
            if turn:
                rates[name].append(len(used) / seconds)
    return {name: Speed(tokens_per_second=statistics.median(rates[name]), mean_loops=loops[name]) for name in sides}
