"""Are loops spent on what is hard? Rank correlation of loops used with true difficulty, with its interval.

It is not to be assumed: in the CTM the tick chosen on an addition task follows difficulty only weakly.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from loopwise.study.record import Record
from loopwise.study.rules import default_rule, family_of
from loopwise.study.statistics import Interval, bootstrap, clustered_error, rank_correlation


@dataclass(frozen=True, kw_only=True)
class Adaptivity:
    """K difficulties."""

    model: str
    units: int
    rule: str
    correlation: Interval
    """Spearman, loops used with difficulty; percentile bootstrap over whole problems."""
    correlation_right: Interval
    """The same among units that are right at their exit."""
    correlation_needed: Interval
    """Difficulty with the first loop from which on the answer is right and stays so: what there is to adapt to. Among
    units that are right at the last loop."""
    difficulty: Float[np.ndarray, " difficulties"]
    """The values that occur; where there are more than 20, centres of 10 bins of equal mass."""
    count: Int[np.ndarray, " difficulties"]
    mean_loops: Float[np.ndarray, " difficulties"]
    """Loops used."""
    error: Float[np.ndarray, " difficulties"]
    """Standard error of that mean."""
    needed: Float[np.ndarray, " difficulties"]
    """Mean loops needed, of those right at the last loop; NaN without any."""
    accuracy: Float[np.ndarray, " difficulties"]
    """At the exit."""
    used: Int[np.ndarray, " units"]
    """Loops of each unit."""
    hardness: Float[np.ndarray, " units"]
    """Difficulty of each unit."""


def adaptivity(
    taken: Record, *, rule: str | None = None, max_loops: int | None = None, samples: int = 1000, seed: int = 0
) -> Adaptivity:
    """Loops that `rule` spends (default: the model's own signal at its default), by difficulty.

    Raises:
        InputError: nobody knows the difficulty of these units.
    """
    hard = taken.need_difficulty()
    rule = rule or default_rule(taken)
    family, threshold = family_of(taken, rule)
    most = min(max_loops or taken.trained_loops[1], taken.loops)
    used = np.minimum(family.exits(threshold), most)
    right = taken.right[used - 1, np.arange(taken.units)]
    needed = loops_needed(taken)
    solved = taken.right[-1]

    def interval(first: np.ndarray, chosen: np.ndarray) -> Interval:
        one, two = first[chosen], hard[chosen]
        if not chosen.any():
            return Interval(value=float("nan"), low=float("nan"), high=float("nan"))
        return bootstrap(
            lambda drawn: rank_correlation(one[drawn], two[drawn]), taken.problem[chosen], samples=samples, seed=seed
        )

    place, centres = _bins(hard)
    kinds = range(len(centres))
    return Adaptivity(
        model=taken.model,
        units=taken.units,
        rule=family.rule(threshold),
        correlation=interval(used, np.ones(taken.units, dtype=bool)),
        correlation_right=interval(used, right),
        correlation_needed=interval(needed, solved),
        difficulty=centres,
        count=np.bincount(place, minlength=len(centres)),
        mean_loops=np.array([used[place == kind].mean() for kind in kinds]),
        error=np.array([float(_error(used[place == kind], taken.problem[place == kind])) for kind in kinds]),
        needed=np.array([_mean(needed[(place == kind) & solved]) for kind in kinds]),
        accuracy=np.array([right[place == kind].mean() for kind in kinds]),
        used=used,
        hardness=hard,
    )


def loops_needed(taken: Record) -> Int[np.ndarray, " units"]:
    """The first loop from which on each unit's answer is right up to the last loop; R where it is not right there."""
    stays = np.flip(np.cumprod(np.flip(taken.right, 0), axis=0), 0).astype(bool)
    return np.where(stays.any(axis=0), stays.argmax(axis=0) + 1, taken.loops)


def _bins(values: Float[np.ndarray, " units"]) -> tuple[Int[np.ndarray, " units"], Float[np.ndarray, " bins"]]:
    kinds, place = np.unique(values, return_inverse=True)
    if len(kinds) <= 20:
        return place, kinds
    edges = np.unique(np.quantile(values, np.linspace(0, 1, 11)))
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    held = np.unique(place)
    return np.searchsorted(held, place), np.array([values[place == kind].mean() for kind in held])


def _error(values: Int[np.ndarray, " units"], groups: Int[np.ndarray, " units"]) -> Float[np.ndarray, ""]:
    return clustered_error(values.astype(np.float64), groups)


def _mean(values: Int[np.ndarray, " units"]) -> float:
    return float(values.mean()) if values.size else float("nan")
