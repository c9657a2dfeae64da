"""The loss of the last loop alone: what a plain, deep network is trained with."""

from dataclasses import dataclass
from typing import ClassVar

from loopwise.objectives.base import LoopPlan, Objective


@dataclass(frozen=True, kw_only=True)
class LastLoop(Objective):
    """Cross-entropy after the last loop, averaged over tokens."""

    name: ClassVar[str] = "last"

    backprop: int | None = None
    """The last so many loops carry gradient; none: all of them."""

    def plan(self, *, seed: int, step: int, micro: int) -> LoopPlan:
        return LoopPlan(loops=self.loops, backprop=self.backprop, read=self.reads)
