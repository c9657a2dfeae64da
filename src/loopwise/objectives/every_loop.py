"""The mean loss over loops: each loop learns to answer, which makes depth a dial."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.objectives.base import LoopPlan, Objective, ObjectiveInputs
from loopwise.objectives.calibration import calibration_loss, continuation_labels


@dataclass(frozen=True, kw_only=True)
class EveryLoop(Objective):
    """For each token the plain mean of its losses over the loops that count, averaged over tokens.

    With `first_loop` a token is asked for an answer only from that loop on (a question of k hops from loop k on),
    and weighs as much as any other however few loops that leaves.

    With `gate` the exit gate learns beside, by the labels `best-later` of `calibrate`. Unlike stage II this teaches the
    states too: they come to say whether the answer is there, where a gate on frozen states has to take what it finds.
    """

    name: ClassVar[str] = "every"
    reads: ClassVar[Literal["last", "all"]] = "all"

    backprop: int | None = None
    """The last so many loops carry gradient; none: all of them."""
    gate: float = 0.0
    """Weight of the gate's cross-entropy; 0: the gate is not taught."""
    gamma: float = 0.1
    """Nats that going on must gain to be worth it. Larger than stage II's 0.005: where an answer comes all at once, a
    loop that gains nothing should teach the gate to stop, not to toss a coin."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gate >= 0:
            raise ConfigError(f"gate={self.gate}; a weight of 0 or more, for example gate=0.1")
        if self.gate and self.loops < 2:
            raise ConfigError("every with gate and loops=1 has no gate to judge; give loops=2 or more")

    @property
    def needs_hazards(self) -> bool:
        return self.gate > 0

    def plan(self, *, seed: int, step: int, micro: int) -> LoopPlan:
        return LoopPlan(loops=self.loops, backprop=self.backprop, read=self.reads)

    def gate_loss(self, inputs: ObjectiveInputs, losses: Float[Tensor, "loops batch tokens"]) -> Float[Tensor, ""]:
        if not self.gate:
            return super().gate_loss(inputs, losses)
        labels = continuation_labels(losses, rule="best-later", gamma=self.gamma)
        return self.gate * calibration_loss(inputs, self.hazards(inputs), labels)
