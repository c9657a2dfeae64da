"""Gate calibration: Ouro's stage II, where the language model is frozen and the gate learns what loops are worth.

Each judged gate learns by cross-entropy to go on with probability w = sigmoid(k (I - gamma)), where I is how much
going on gains, in nats of the token's loss. The published rule leaves room for doubt, so the rule is a setting:

    as-written   gate t (t = 2..R)    I = max(0, CE_{t-1} - CE_t)
    unclamped    gate t (t = 2..R)    I = CE_{t-1} - CE_t
    next-loop    gate t (t = 1..R-1)  I = CE_t - CE_{t+1}
    best-later   gate t (t = 1..R-1)  I = CE_t - min_{s>t} CE_s

`as-written` judges a gate by what the loop before it gained, teaches gate 1 nothing and, being clamped, can never ask
for an exit probability above 1 - sigmoid(-k gamma), 0.562 at the paper's gamma. `next-loop` judges it by what it
decides. `best-later` goes on if any later loop is better by enough, so it also serves tasks whose gain comes late and
all at once. The default is what did best in benchmarks/calibration.py (docs/objectives.md has the table).

Source: Ouro, arXiv 2510.25741, stage II (as-written; k = 50, gamma = 0.005); the other rules are ours.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.loops.hazard import continuation_cross_entropy
from loopwise.objectives.base import LoopPlan, Objective, ObjectiveInputs

LabelRule = Literal["as-written", "unclamped", "next-loop", "best-later"]
LABEL_RULES: tuple[str, ...] = get_args(LabelRule)


@dataclass(frozen=True, kw_only=True)
class ContinuationLabels:
    """What the judged gates are taught."""

    gates: slice
    """The judged gates, as a slice of the loop axis."""
    targets: Float[Tensor, "judged *units"]
    """The wanted probability of going on."""


def continuation_labels(
    losses: Float[Tensor, "loops *units"], *, rule: str, sharpness: float = 50.0, gamma: float = 0.005
) -> ContinuationLabels:
    """Labels from the losses of all loops, in nats; they carry no gradient.

    Raises:
        ConfigError: a rule that does not exist.
    """
    if rule not in LABEL_RULES:
        raise ConfigError(f"rule={rule}; the label rules are {', '.join(LABEL_RULES)}")
    losses = losses.detach()
    gain = losses[:-1] - losses[1:]
    if rule == "as-written":
        gain = gain.clamp_min(0)
    elif rule == "best-later":
        gain = losses[:-1] - losses[1:].flip(0).cummin(0).values.flip(0)
    gates = slice(1, None) if rule in ("as-written", "unclamped") else slice(None, -1)
    return ContinuationLabels(gates=gates, targets=torch.sigmoid(sharpness * (gain - gamma)))


def calibration_loss(
    inputs: ObjectiveInputs, hazards: Float[Tensor, "loops batch tokens"], labels: ContinuationLabels
) -> Float[Tensor, ""]:
    """Cross-entropy between going on and its label: summed over judged gates, divided by R, averaged over tokens."""
    judged = hazards.masked_fill(~inputs.mask, 0.5)[labels.gates]
    surprise = continuation_cross_entropy(judged, labels.targets) * inputs.mask
    return surprise.sum() / inputs.plan.loops / inputs.mask.sum().clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class Calibration(Objective):
    """Cross-entropy between going on and its label, summed over the judged gates, divided by R, averaged over tokens.

    `first_loop` restricts what the language model is asked, and nothing is asked of it here: every loop is judged,
    so a gate learns to go on through loops that were never trained to answer.
    """

    name: ClassVar[str] = "calibrate"
    trains: ClassVar[Literal["model", "gate"]] = "gate"
    reads: ClassVar[Literal["last", "all"]] = "all"
    always_shown: ClassVar[tuple[str, ...]] = ("rule",)

    rule: str = "best-later"
    """How the gain of going on is judged: as-written, unclamped, next-loop or best-later."""
    sharpness: float = 50.0
    """k, per nat: how fast the label turns from stop to go on."""
    gamma: float = 0.05
    """Nats that going on must gain to be worth it. The paper's 0.005 asks a gate to toss a coin where nothing is
    gained; this asks it to stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        continuation_labels(torch.zeros(2), rule=self.rule)
        if not self.sharpness > 0:
            raise ConfigError(f"sharpness={self.sharpness}; a positive number per nat, for example sharpness=50")
        if self.loops < 2:
            raise ConfigError("calibrate with loops=1 has no gate to judge; give loops=2 or more")

    @property
    def needs_hazards(self) -> bool:
        return True

    def plan(self, *, seed: int, step: int, micro: int) -> LoopPlan:
        return LoopPlan(loops=self.loops, read=self.reads)

    def weights(self, inputs: ObjectiveInputs) -> Float[Tensor, "loops batch tokens"] | None:
        self.hazards(inputs)
        return None

    def gate_loss(self, inputs: ObjectiveInputs, losses: Float[Tensor, "loops batch tokens"]) -> Float[Tensor, ""]:
        return calibration_loss(inputs, self.hazards(inputs), self._labels(losses))

    def metrics(self, inputs: ObjectiveInputs, losses: Float[Tensor, "loops batch tokens"]) -> dict[str, float]:
        """The common figures, over every loop whatever `first_loop`, and two of the gate.

        `go_on_wanted`: the mean label; `gate_agreement`: the share of judged gates on the label's side of one half.
        """
        labels = self._labels(losses)
        going = 1 - self.hazards(inputs).detach()[labels.gates]
        agree = (going > 0.5) == (labels.targets > 0.5)
        judged = inputs.mask.sum().clamp_min(1) * going.shape[0]
        everywhere = ObjectiveInputs(plan=inputs.plan, mask=inputs.mask, hazards=inputs.hazards)
        return {
            **super().metrics(everywhere, losses),
            "go_on_wanted": float((labels.targets * inputs.mask).sum() / judged),
            "gate_agreement": float((agree & inputs.mask).sum() / judged),
        }

    def _labels(self, losses: Tensor) -> ContinuationLabels:
        return continuation_labels(losses, rule=self.rule, sharpness=self.sharpness, gamma=self.gamma)
