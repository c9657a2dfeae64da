"""Rules that count loops or read the model's own signal."""

import torch
from jaxtyping import Bool
from torch import Tensor

from loopwise.loops.exits._base import CountRule, Device, InstantRule, Observation, ThresholdRule, Tracker
from loopwise.loops.exits._registry import rule
from loopwise.loops.hazard import widen


@rule("fixed")
class Fixed(CountRule):
    """The same number of loops for every unit."""

    form = "fixed:R"
    formula = "i >= R"
    source = "every looped model's plain mode"
    example = "fixed:4"
    earliest = "R"
    needs = frozenset()

    def track(self, units: int, device: Device = None) -> Tracker:
        return _FixedTracker(self.count, units, device)


class _FixedTracker(Tracker):
    def __init__(self, count: int, units: int, device: Device) -> None:
        super().__init__(units, device)
        self._count = count

    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        return (observation.loop >= self._count) | torch.zeros_like(self.seen, dtype=torch.bool)


@rule("hazard")
class Hazard(ThresholdRule):
    """Q-exit: the first loop m whose cumulative exit probability CDF(m) = 1 - prod_{j<=m} (1 - hazard_j) reaches q.

    A threshold of 1 or more means never early, also when a hazard is exactly 1; `hazard:0` stops at loop 1. The
    survival product is carried in float64. A NaN hazard counts as 0 and its loop never stops the unit.
    """

    form = "hazard:q"
    formula = "1 - prod_{j<=i} (1 - hazard_j) >= q; q >= 1: never early"
    source = "Ouro, arXiv 2510.25741, eq. 3 and Q-exit; the default is ours (the released models ship 1.0)"
    default = example = "hazard:0.6"
    allowed = "0 or more (from 1 on: never early)"
    needs = frozenset({"signal"})

    @property
    def signal_kind(self) -> str:
        return "hazard"

    @staticmethod
    def permits(threshold: float) -> bool:
        return threshold >= 0

    def track(self, units: int, device: Device = None) -> Tracker:
        return _HazardTracker(self.threshold, units, device)


class _HazardTracker(Tracker):
    def __init__(self, threshold: float, units: int, device: Device) -> None:
        super().__init__(units, device)
        self._threshold = threshold if threshold < 1 else float("inf")
        self._survival = torch.ones(units, dtype=torch.float64, device=device)

    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        going_on = self._survival * (1 - observation.read("signal").double())
        # fmin passes over NaN, and no comparison with NaN holds.
        self._survival = torch.fmin(self._survival, going_on)
        return 1 - going_on >= self._threshold


@rule("halt")
class Halt(InstantRule):
    """The halting head says that the answer is right: halt_logit > x, that is probability above sigmoid(x)."""

    form = "halt:x"
    formula = "halt_logit_i > x"
    source = "TRM, arXiv 2510.04871 (halts in training when the logit is above 0)"
    default = example = "halt:0.0"
    needs = frozenset({"signal"})

    @property
    def signal_kind(self) -> str:
        return "halt_logit"

    def fires(self, observation: Observation) -> Bool[Tensor, " units"]:
        return widen(observation.read("signal")) > self.threshold
