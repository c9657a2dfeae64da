"""The mean loss over loops: each loop learns to answer, which makes depth a dial."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from loopwise.objectives.base import LoopPlan, Objective


@dataclass(frozen=True, kw_only=True)
class EveryLoop(Objective):
    """For each token the plain mean of its losses over the loops that count, averaged over tokens.

    With `first_loop` a token is asked for an answer only from that loop on (a question of k hops from loop k on),
    and weighs as much as any other however few loops that leaves.
    """

    name: ClassVar[str] = "every"
    reads: ClassVar[Literal["last", "all"]] = "all"

    backprop: int | None = None
    """The last so many loops carry gradient; none: all of them."""

    def plan(self, *, seed: int, step: int, micro: int) -> LoopPlan:
        return LoopPlan(loops=self.loops, backprop=self.backprop, read=self.reads)
