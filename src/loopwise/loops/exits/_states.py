"""Rules that measure how far the state moved. Norms run over everything but the unit axis, in float32 or wider."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopwise.loops.exits._base import Device, InstantRule, Observation, ThresholdRule, Tracker, features
from loopwise.loops.exits._registry import rule


@rule("delta")
class Delta(InstantRule):
    """Relative change of the state; a state that did not move has change 0, also when its norm is 0.

    For a unit with positions inside (a sample), the norm runs over all of them, where Huginn's code averages the
    ratio over positions; for tokens the two are the same.
    """

    form = "delta:x"
    formula = "||s_i - s_{i-1}|| / ||s_i|| < x"
    source = "Huginn, arXiv 2502.05171, `latent-diff` of its code; default 0.03 there and in arXiv 2510.14961"
    default = example = "delta:0.03"
    allowed = "a number above 0"
    needs = frozenset({"state"})

    @staticmethod
    def permits(threshold: float) -> bool:
        return threshold > 0

    def fires(self, observation: Observation) -> Bool[Tensor, " units"]:
        state, previous = features(observation.read("state")), features(observation.read("previous"))
        change = torch.linalg.vector_norm(state - previous, dim=1)
        relative = torch.where(change == 0, 0.0, change / torch.linalg.vector_norm(state, dim=1))
        return relative < self.threshold


@rule("second-difference")
class SecondDifference(ThresholdRule):
    """The step no longer changes: two loops in a row whose step differs from the one before by less than tau.

    The first step is s_1 - s_0, so the first second difference is known after loop 2 and the rule can fire after
    loop 3. The norm is absolute: tau has the units of the state.
    """

    form = "second-difference:tau"
    formula = "||d_k - d_{k-1}|| < tau for k = i and k = i - 1, where d_k = s_k - s_{k-1}"
    source = "Pappone et al., arXiv 2509.23314, eq. 5 and algorithm 1; the default is ours, inside their 1e-5 to 1e-2"
    default = example = "second-difference:0.001"
    allowed = "a number above 0"
    earliest = "3"
    needs = frozenset({"state"})

    @staticmethod
    def permits(threshold: float) -> bool:
        return threshold > 0

    def track(self, units: int, device: Device = None) -> Tracker:
        return _SecondDifferenceTracker(self.threshold, units, device)


class _SecondDifferenceTracker(Tracker):
    def __init__(self, threshold: float, units: int, device: Device) -> None:
        super().__init__(units, device)
        self._threshold = threshold
        self._step: Float[Tensor, " units features"] | None = None
        self._streak = torch.zeros(units, dtype=torch.long, device=device)

    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        step = features(observation.read("state")) - features(observation.read("previous"))
        if self._step is not None:
            turn = torch.linalg.vector_norm(step - self._step, dim=1)
            self._streak = torch.where((turn < self._threshold) & (self.seen > 0), self._streak + 1, 0)
        self._step = step
        return self._streak >= 2
