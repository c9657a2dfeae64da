"""Random depth with truncated backpropagation: Huginn's recipe."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.objectives.base import LoopPlan, Objective, ObjectiveInputs
from loopwise.objectives.depth import draw_pair, log_normal_poisson_depth, uniform_depth

SAMPLERS = ("log-normal-poisson", "uniform", "fixed")


@dataclass(frozen=True, kw_only=True)
class RandomDepth(Objective):
    """The last loop's loss after a number of loops r drawn anew for each micro-batch.

    The last k = min(backprop, r) loops carry gradient, the r - k before them do not.
    Source: Huginn, arXiv 2502.05171, sections 3.2 and 3.3.
    """

    name: ClassVar[str] = "random-depth"

    loops: int = 32
    """The mean depth r aims at (log-normal Poisson: exactly one more; uniform: exactly this), or the fixed depth."""
    sampler: str = "log-normal-poisson"
    """log-normal-poisson (Huginn), uniform, or fixed."""
    sigma: float | None = None
    """Spread of the logarithm of the Poisson rate; none: 0.5. For log-normal-poisson alone."""
    min_loops: int = 1
    """The smallest depth; drawn values below are raised to it."""
    max_loops: int | None = None
    """The largest depth; drawn values above are lowered to it. None: 4 x loops for log-normal-poisson, and for uniform
    2 x loops - min_loops, which puts the mean at `loops`."""
    backprop: int | None = 8
    """At most so many last loops carry gradient; none: all of them."""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"sampler={self.sampler}; the samplers are {', '.join(SAMPLERS)}")
        if self.loops < 1:
            raise ConfigError(f"loops={self.loops}; at least one loop must run, for example loops=32")
        if self.backprop is not None and self.backprop < 1:
            raise ConfigError(f"backprop={self.backprop}; give 1 or more, or none for all loops")
        if self.sigma is not None and (self.sampler != "log-normal-poisson" or not self.sigma >= 0):
            raise ConfigError(
                f"sigma={self.sigma} with sampler={self.sampler}; 0 or more, for log-normal-poisson alone"
            )
        if self.sampler == "fixed" and (self.min_loops != 1 or self.max_loops is not None):
            raise ConfigError("sampler=fixed draws nothing; leave out min_loops and max_loops, or type sampler=uniform")
        if not 1 <= self.min_loops <= self.deepest:
            raise ConfigError(
                f"min_loops={self.min_loops} with loops={self.loops} and a largest depth of {self.deepest}; "
                f"give 1 to {self.deepest}, or set max_loops"
            )

    @property
    def deepest(self) -> int:
        """The largest depth that can be drawn."""
        if self.max_loops is not None:
            return self.max_loops
        return {
            "log-normal-poisson": 4 * self.loops,
            "uniform": 2 * self.loops - self.min_loops,
            "fixed": self.loops,
        }[self.sampler]

    def depth(self, *, seed: int, step: int, micro: int) -> int:
        """The loops of micro-batch `micro` of `step`."""
        if self.sampler == "fixed":
            return self.loops
        first, second = draw_pair(seed, step, micro)
        if self.sampler == "uniform":
            return uniform_depth(first, least=self.min_loops, most=self.deepest)
        sigma = 0.5 if self.sigma is None else self.sigma
        return log_normal_poisson_depth(
            first, second, mean=float(self.loops), sigma=sigma, least=self.min_loops, most=self.deepest
        )

    def plan(self, *, seed: int, step: int, micro: int) -> LoopPlan:
        loops = self.depth(seed=seed, step=step, micro=micro)
        return LoopPlan(loops=loops, backprop=None if self.backprop is None else min(self.backprop, loops), read="last")

    def metrics(self, inputs: ObjectiveInputs, losses: Float[Tensor, "loops batch tokens"]) -> dict[str, float]:
        """The common figures, with the loss under `loss` whatever the depth, and the depth under `loops`."""
        figures = super().metrics(inputs, losses)
        loss = figures.pop(f"loss_loop_{inputs.plan.loops}", None)
        return {**figures, **({} if loss is None else {"loss": loss}), "loops": float(inputs.plan.loops)}
