"""Every exit rule as a number per loop and unit that crosses a threshold, so that one record replays all thresholds.

Replay tells what a rule would have done with what was recorded. For samples, and for tokens that fill their planes
after leaving (`per_loop`), that is exactly what it does; for tokens that stop for good (`last_exited`) later tokens
would read other planes, which only a run shows. `loopwise.loops.exits` holds the rules themselves; the tests compare
the two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from loopwise.errors import ConfigError
from loopwise.loops.exits import parse_rule
from loopwise.study.record import Record


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of rule on one record."""

    name: str
    """First word of the rule's text."""
    reads: bool
    """Whether a prediction is needed after every loop."""
    measure: Float[np.ndarray, "loops units"]
    """What is compared; NaN never stops a unit."""
    above: bool
    """True: fires when the measure reaches the threshold. False: when it is below."""
    strict: bool = False
    """True: fires only beyond the threshold (always so for those that fire below)."""
    whole: bool = False
    """Whether thresholds are whole numbers."""

    def fires(self, threshold: float) -> Bool[np.ndarray, "loops units"]:
        """After which loops the rule would stop each unit."""
        with np.errstate(invalid="ignore"):
            if not self.above:
                return np.asarray(self.measure < threshold)
            if self.strict:
                return np.asarray(self.measure > threshold)
            return np.asarray(self.measure >= threshold)

    def exits(self, threshold: float) -> Int[np.ndarray, " units"]:
        """The loop after which each unit stops; the last where the rule never fires."""
        return first_loop(self.fires(threshold))

    def rule(self, threshold: float) -> str:
        """The rule's canonical text."""
        return str(parse_rule(f"{self.name}:{int(threshold) if self.whole else repr(float(threshold))}"))

    def thresholds(self, count: int) -> list[float]:
        """At most `count` thresholds whose mean loops lie evenly between the fewest and the most that there are.

        Thresholds are among the values measured, by bisection: mean loops rise or fall with the threshold.
        """
        if self.whole:
            return [float(number) for number in range(1, len(self.measure) + 1)]
        values = self._within(np.unique(self.measure[~np.isnan(self.measure)]))
        if not values.size:
            return []
        tries = values if self.above else values[::-1]

        def mean(index: int) -> float:
            return float(self.exits(float(tries[index])).mean())

        least, most = mean(0), mean(len(tries) - 1)
        chosen = {0, len(tries) - 1}
        for wanted in np.linspace(least, most, count)[1:-1]:
            low, high = 0, len(tries) - 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if mean(middle) < wanted else (low, middle)
            chosen.add(high)
        return [float(tries[index]) for index in sorted(chosen)]

    def _permits(self, value: float) -> bool:
        try:
            self.rule(value)
        except ConfigError:
            return False
        return True

    def _within(self, values: Float[np.ndarray, " values"]) -> Float[np.ndarray, " kept"]:
        """Sorted values that the rule takes as a threshold; those it refuses stand at the ends."""
        low, high = 0, len(values)
        while low < high and not self._permits(float(values[low])):
            low += 1
        while high > low and not self._permits(float(values[high - 1])):
            high -= 1
        return values[low:high]


def first_loop(fires: Bool[np.ndarray, "loops units"]) -> Int[np.ndarray, " units"]:
    """The first loop at which each unit is told to stop, counted from 1; the last where it never is."""
    return np.where(fires.any(axis=0), fires.argmax(axis=0) + 1, len(fires))


def _previous(values: Float[np.ndarray, "loops units"]) -> Float[np.ndarray, "loops units"]:
    return np.concatenate([np.full_like(values[:1], np.nan), values[:-1]])


def _hazard(taken: Record, signals: Float[np.ndarray, "loops units"]) -> Family:
    survival = np.cumprod(1 - np.nan_to_num(signals), axis=0)
    # A threshold of 1 means never early, whatever the hazard.
    return Family(name="hazard", reads=False, measure=1 - survival, above=True)


_OF_SIGNAL: dict[str, Callable[[Record, Float[np.ndarray, "loops units"]], Family]] = {
    "hazard": _hazard,
    "halt_logit": lambda taken, signals: Family(name="halt", reads=False, measure=signals, above=True, strict=True),
    "certainty": lambda taken, signals: Family(name="certainty", reads=False, measure=signals, above=True),
}


def families(taken: Record) -> list[Family]:
    """Every kind of rule that this record can replay, the model's own signal first."""
    found: list[Family] = []
    if taken.signals is not None and taken.signal_kind in _OF_SIGNAL:
        found.append(_OF_SIGNAL[taken.signal_kind](taken, taken.signals))
    found.append(Family(name="delta", reads=False, measure=taken.change, above=False))
    both = np.maximum(taken.turn, _previous(taken.turn))
    found.append(Family(name="second-difference", reads=False, measure=both, above=False))
    found.append(Family(name="kl", reads=True, measure=taken.kl, above=False))
    found.append(Family(name="entropy", reads=True, measure=taken.entropy_change, above=False))
    found.append(Family(name="stable", reads=True, measure=taken.streak.astype(np.float64), above=True, whole=True))
    if taken.signal_kind != "certainty":
        found.append(Family(name="certainty", reads=True, measure=taken.certainty, above=True))
    return found


def family_of(taken: Record, rule: str) -> tuple[Family, float]:
    """The family and threshold of a rule's text.

    Raises:
        ConfigError: a rule that a record cannot replay (fixed, patience, budget), or that the model cannot serve.
    """
    parsed = parse_rule(rule).bind(taken.signal_kind)
    for family in families(taken):
        if family.name == parsed.name:
            return family, float(parsed.argument)
    allowed = ", ".join(family.name for family in families(taken))
    raise ConfigError(f"exit rule '{parsed}' cannot be replayed from a record; allowed are {allowed}")


def default_rule(taken: Record) -> str:
    """The rule of the model's own signal at its default threshold, else delta at its own."""
    return str(parse_rule(families(taken)[0].name))
