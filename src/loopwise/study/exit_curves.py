"""What is an exit rule worth? Every rule of one model against knowing everything and against knowing nothing.

The *oracle* knows what each loop will answer and spends its loops where they pay; no rule does better. *Random mixing*
sends each unit to one of the two neighbouring fixed depths by chance; a rule that does worse knows less than nothing.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from loopwise.study.record import Record
from loopwise.study.rules import Family, families
from loopwise.study.statistics import Interval, clustered_error


@dataclass(frozen=True, kw_only=True)
class RuleCurve:
    """One kind of rule at every threshold, by replay. Ordered by mean loops."""

    name: str
    rules: tuple[str, ...]
    """Text of the rule at each threshold."""
    reads: bool
    """Whether it pays a readout after every loop."""
    mean_loops: Float[np.ndarray, " thresholds"]
    accuracy: Float[np.ndarray, " thresholds"]
    loss: Float[np.ndarray, " thresholds"]
    flops: Float[np.ndarray, " thresholds"]
    """Operations per unit when units that stop are removed, readouts of rules that need them included."""
    kv_bytes: Float[np.ndarray, " thresholds"]
    """Bytes of keys and values per unit when units that stop keep no further planes."""
    gain: Float[np.ndarray, " thresholds"]
    """Nats below random mixing at the same mean loops; negative is worse than chance."""
    saved_right: Float[np.ndarray, " thresholds"]
    """Share of units that are right at their exit and wrong at full depth."""
    saved_wrong: Float[np.ndarray, " thresholds"]
    """Share of units that are wrong at their exit and right at full depth."""


@dataclass(frozen=True, kw_only=True)
class ExitCurves:
    """Every rule on one record; full depth is the most loops that were trained."""

    model: str
    units: int
    loops: Int[np.ndarray, " loops"]
    """Fixed depths, 1 to R."""
    fixed_accuracy: Float[np.ndarray, " loops"]
    fixed_loss: Float[np.ndarray, " loops"]
    fixed_flops: Float[np.ndarray, " loops"]
    fixed_kv_bytes: Float[np.ndarray, " loops"]
    oracle_loops: Float[np.ndarray, " points"]
    """Mean loops of the oracle that looks at whether answers are right."""
    oracle_accuracy: Float[np.ndarray, " points"]
    oracle_loss_loops: Float[np.ndarray, " ends"]
    """Mean loops of the oracle that looks at losses."""
    oracle_loss: Float[np.ndarray, " ends"]
    curves: tuple[RuleCurve, ...]

    def mixed_loss(self, mean_loops: float) -> float:
        """Loss of random mixing at a mean: the chord between the two neighbouring depths."""
        return float(np.interp(mean_loops, self.loops, self.fixed_loss))

    def mixed_accuracy(self, mean_loops: float) -> float:
        """Accuracy of random mixing at a mean."""
        return float(np.interp(mean_loops, self.loops, self.fixed_accuracy))


def exits(taken: Record, *, points: int = 24, max_loops: int | None = None) -> ExitCurves:
    """Every rule that can be replayed, at about `points` thresholds each.

    Args:
        max_loops: R, where every unit stops at the latest; None means the most loops trained (or recorded, if fewer).
    """
    most = min(max_loops or taken.trained_loops[1], taken.loops)
    right, losses = taken.right[:most], taken.losses[:most]
    loops = taken.depths[:most]
    oracle_loops, oracle_accuracy = oracle(right.astype(np.float64))
    oracle_loss_loops, oracle_gain = oracle(-losses)
    costs = taken.costs
    return ExitCurves(
        model=taken.model,
        units=taken.units,
        loops=loops,
        fixed_accuracy=right.mean(axis=1),
        fixed_loss=losses.mean(axis=1),
        fixed_flops=costs.flops(loops),
        fixed_kv_bytes=costs.kv_bytes(loops) + 0.0,
        oracle_loops=oracle_loops,
        oracle_accuracy=oracle_accuracy,
        oracle_loss_loops=oracle_loss_loops,
        oracle_loss=-oracle_gain,
        curves=tuple(_curve(taken, family, most, points) for family in families(taken)),
    )


def _curve(taken: Record, family: Family, most: int, points: int) -> RuleCurve:
    here = Family(**{**vars(family), "measure": family.measure[:most]})
    thresholds = [threshold for threshold in here.thresholds(points) if not (here.name == "hazard" and threshold >= 1)]
    chosen = [here.exits(threshold) for threshold in thresholds]
    # Never early, which no threshold among the values need be.
    names = [*map(here.rule, thresholds), f"fixed:{most}"]
    chosen.append(np.full(taken.units, most))
    order = np.argsort([used.mean() for used in chosen], kind="stable")
    units = np.arange(taken.units)
    used = np.stack([chosen[index] for index in order])
    mean = used.mean(axis=1)
    right = taken.right[used - 1, units]
    full = taken.right[most - 1]
    loss = taken.losses[used - 1, units].mean(axis=1)
    return RuleCurve(
        name=family.name,
        rules=tuple(names[index] for index in order),
        reads=family.reads,
        mean_loops=mean,
        accuracy=right.mean(axis=1),
        loss=loss,
        flops=taken.costs.flops(mean, reads=family.reads),
        kv_bytes=taken.costs.kv_bytes(mean) + 0.0,
        gain=np.interp(mean, taken.depths[:most], taken.losses[:most].mean(axis=1)) - loss,
        saved_right=(right & ~full).mean(axis=1),
        saved_wrong=(~right & full).mean(axis=1),
    )


def oracle(
    worth: Float[np.ndarray, "loops units"], *, points: int = 64
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Mean loops and mean worth of the best choice of a loop for every unit, from loop 1 on.

    At each price per loop every unit takes the loop of the greatest worth less price, the earliest of equals. What
    comes out is optimal for its mean; between two points lies their chord (Everett 1963). Prices are all those at
    which some unit changes its mind, thinned to `points`.
    """
    loops = np.arange(1, len(worth) + 1)
    pairs = [(late - early, worth[late] - worth[early]) for late in range(len(worth)) for early in range(late)]
    prices = np.unique(np.concatenate([[0.0], *(gain[gain > 0] / steps for steps, gain in pairs)]))
    if len(prices) > points:
        prices = np.quantile(prices, np.linspace(0, 1, points))
    # Just above the dearest price nobody goes on.
    prices = np.append(prices, prices[-1] * 2 + 1.0)
    means, values = [], []
    for price in prices[::-1]:
        choice = (worth - price * loops[:, None]).argmax(axis=0)
        means.append(float(loops[choice].mean()))
        values.append(float(worth[choice, np.arange(worth.shape[1])].mean()))
    keep = [index for index in range(len(means)) if index == 0 or means[index] > means[index - 1]]
    return np.array(means)[keep], np.array(values)[keep]


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The least compute of one rule within a tolerance of full depth."""

    rule: str
    mean_loops: float
    accuracy: float
    full_accuracy: float
    drop: Interval
    """Accuracy of full depth less that of the rule, with its interval over problems."""
    flops_saved: float
    """Share of the operations of full depth."""


def saving(taken: Record, family: Family, *, tolerance: float = 0.01, max_loops: int | None = None) -> Saving:
    """How much one kind of rule saves while its accuracy stays within `tolerance` of full depth, by replay.

    The threshold is chosen on the units it is told of, so the saving is a little hopeful: try the rule on other units
    before relying on it.
    """
    most = min(max_loops or taken.trained_loops[1], taken.loops)
    here = Family(**{**vars(family), "measure": family.measure[:most]})
    units = np.arange(taken.units)
    full = taken.right[most - 1]
    best: tuple[float, str, np.ndarray] = (float(most), f"fixed:{most}", np.full(taken.units, most))
    for threshold in here.thresholds(64):
        used = here.exits(threshold)
        if full.mean() - taken.right[used - 1, units].mean() <= tolerance and used.mean() < best[0]:
            best = (float(used.mean()), here.rule(float(f"{threshold:.4g}")), used)
    mean, rule, used = best
    right = taken.right[used - 1, units]
    lost = full.astype(np.float64) - right
    error = 1.96 * float(clustered_error(lost, taken.problem))
    value = float(lost.mean())
    whole = float(taken.costs.flops(most))
    return Saving(
        rule=rule,
        mean_loops=mean,
        accuracy=float(right.mean()),
        full_accuracy=float(full.mean()),
        drop=Interval(value=value, low=value - error, high=value + error),
        flops_saved=1 - float(taken.costs.flops(mean, reads=family.reads)) / whole if whole else float("nan"),
    )
