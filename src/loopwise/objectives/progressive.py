"""The progressive loss: learn to carry any half-done thought on, so that no loop can count on where it stands.

    L = (1 - alpha) CE(m loops) + alpha CE(n loops without gradient, then k with it)
    n uniform in 0 .. m - 1,  k uniform in 1 .. m - n

Bansal et al. 2022 (arXiv 2202.05826), section 3.2. Both terms read the last loop alone. The first n loops leave no
graph behind (in the authors' code they build one and throw it away).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.loops.drivers import unroll
from loopwise.loops.protocol import LoopModel
from loopwise.nn.noise import uniform
from loopwise.objectives.base import LoopPlan
from loopwise.tasks.problems import IGNORED

PlaceLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, places..., K), targets (N, places...)) -> a scalar."""


@dataclass(frozen=True, kw_only=True)
class Progressive:
    """How a Deep-Thinking network is unrolled in training."""

    loops: int = 30
    """m, the most loops of training."""
    alpha: float = 0.01
    """Weight of the term with random start and length (mazes: 0.01, chess: 0.5, prefix sums: 1); 0 is plain training
    after m loops."""

    def __post_init__(self) -> None:
        if self.loops < 1:
            raise ConfigError(f"loops={self.loops}: allowed is 1 or more, such as loops=30")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha}: allowed is 0 to 1, such as alpha=0.01")

    def plans(self, *, seed: int, step: int) -> tuple[tuple[float, LoopPlan], ...]:
        """The unrolls of a step with their weights: a function of (seed, step) alone. None has weight 0."""
        chance = uniform(seed, "progressive loss", torch.tensor(step), torch.arange(2)).tolist()
        without = int(chance[0] * self.loops)
        carrying = 1 + int(chance[1] * (self.loops - without))
        both = (
            (1 - self.alpha, LoopPlan(loops=self.loops)),
            (self.alpha, LoopPlan(loops=without + carrying, backprop=carrying)),
        )
        return tuple((weight, plan) for weight, plan in both if weight > 0)


def place_loss(
    logits: Float[Tensor, "samples *places classes"], targets: Int[Tensor, "samples *places"]
) -> Float[Tensor, ""]:
    """Cross-entropy in nats, averaged over the places of all samples that are asked."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def progressive_loss(
    model: LoopModel,
    context: Any,
    targets: Int[Tensor, "samples *places"],
    objective: Progressive,
    *,
    seed: int,
    step: int,
    loss: PlaceLoss = place_loss,
) -> Float[Tensor, ""]:
    """The loss of one batch, with its gradient.

    Args:
        context: what `model.encode` returned for the batch.
        seed, step: what the random start and length are functions of.
        loss: what a prediction costs.
    """
    total = torch.zeros(())
    for weight, plan in objective.plans(seed=seed, step=step):
        state = unroll(model, context, loops=plan.loops, backprop=plan.backprop).state
        total = total + weight * loss(model.readout(state, context), targets)
    return total
