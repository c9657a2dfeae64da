"""Expected loss with a prior over loops: Ouro's stage I, where the language model and its exit gate learn together."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.loops.hazard import entropy, exit_distribution
from loopwise.objectives.base import LoopPlan, Objective, ObjectiveInputs, check_share, even_weights
from loopwise.objectives.pondering import divergence


@dataclass(frozen=True, kw_only=True)
class ExpectedLoss(Objective):
    """sum_t p_t CE_t - beta H(p), or with `prior` sum_t p_t CE_t + beta KL(p || q), per token, averaged over tokens.

    p is the exit distribution of the gate (`loops.hazard`). Up to a constant the first is a negative evidence bound
    with a uniform prior over loops (KL to uniform = log R - H). Source: Ouro, arXiv 2510.25741, equations 3 to 5. The
    second has PonderNet's geometric prior (arXiv 2107.05407), whose last loop takes what is left.

    With `first_loop`, p and q are conditioned on leaving at a loop that counts, so that the gate gains nothing by
    leaving where no loss is asked.
    """

    name: ClassVar[str] = "expected"
    reads: ClassVar[Literal["last", "all"]] = "all"

    backprop: int | None = None
    """The last so many loops carry gradient; none: all of them."""
    beta: float = 0.1
    """Weight of the entropy, in nats per nat (Ouro: 0.1, later 0.05). Without it all mass collapses onto one loop."""
    prior: float | None = None
    """The hazard of a geometric prior over loops, between 0 and 1; none: a uniform prior."""
    beta_end: float | None = None
    """Where beta ends; none: it stays."""
    anneal_until: float = 1.0
    """Share of the steps at which beta has reached `beta_end`, in a straight line from `uniform_until`."""
    uniform_until: float = 0.0
    """Share of the steps at first with equal weights for all loops and the gate untaught. 0.5 keeps the gate from
    collapsing onto loop 1 before the later loops are worth anything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("beta", self.beta), ("beta_end", self.beta_end)):
            if value is not None and not value >= 0:
                raise ConfigError(f"{name}={value}; a weight of 0 or more, for example {name}=0.05")
        if self.prior is not None and not 0 < self.prior < 1:
            raise ConfigError(f"prior={self.prior}; a hazard between 0 and 1, for example prior=0.5, or none: uniform")
        check_share("uniform_until", self.uniform_until)
        check_share("anneal_until", self.anneal_until)
        if self.beta_end is None and self.anneal_until != 1:
            raise ConfigError(f"anneal_until={self.anneal_until} without an end; add beta_end=0.05 or leave it out")
        if self.beta_end is not None and self.anneal_until <= self.uniform_until:
            raise ConfigError(
                f"anneal_until={self.anneal_until} is not after uniform_until={self.uniform_until}; "
                "beta moves between the two, for example uniform_until=0.5,anneal_until=1"
            )

    @property
    def needs_hazards(self) -> bool:
        return True

    def plan(self, *, seed: int, step: int, micro: int) -> LoopPlan:
        return LoopPlan(loops=self.loops, backprop=self.backprop, read=self.reads)

    def beta_at(self, progress: float) -> float:
        """The prior's weight after a share `progress` of the steps; 0 while the weights are still uniform."""
        if progress < self.uniform_until:
            return 0.0
        if self.beta_end is None:
            return self.beta
        done = (progress - self.uniform_until) / (self.anneal_until - self.uniform_until)
        return self.beta + (self.beta_end - self.beta) * min(1.0, done)

    def weights(self, inputs: ObjectiveInputs) -> Float[Tensor, "loops batch tokens"]:
        if inputs.progress < self.uniform_until:
            return even_weights(inputs)
        return self._leaving(inputs).detach().double() * inputs.counted / inputs.tokens_counted

    def gate_loss(self, inputs: ObjectiveInputs, losses: Float[Tensor, "loops batch tokens"]) -> Float[Tensor, ""]:
        if inputs.progress < self.uniform_until:
            return losses.new_zeros(())
        leaving = self._leaving(inputs)
        # The value of the expected loss is already in the weighted sum; here only its gradient in p is wanted.
        expected = ((leaving - leaving.detach()) * losses.detach() * inputs.counted).sum()
        # Where nothing counts all mass is on the last loop: entropy and divergence are 0.
        pull = self.beta_at(inputs.progress) * self._away(inputs, leaving).sum()
        return (expected + pull) / inputs.tokens_counted

    def metrics(self, inputs: ObjectiveInputs, losses: Float[Tensor, "loops batch tokens"]) -> dict[str, float]:
        return {**super().metrics(inputs, losses), "beta": self.beta_at(inputs.progress)}

    def _away(
        self, inputs: ObjectiveInputs, leaving: Float[Tensor, "loops batch tokens"]
    ) -> Float[Tensor, "batch tokens"]:
        """How far each token's exit distribution is from the prior, in nats; from a uniform one up to a constant."""
        if self.prior is None:
            return -entropy(leaving)
        hazards = torch.full_like(leaving, self.prior).masked_fill(~inputs.counted, 0)
        return divergence(leaving, exit_distribution(hazards))

    def _leaving(self, inputs: ObjectiveInputs) -> Float[Tensor, "loops batch tokens"]:
        """Exit probabilities given that one leaves where it counts: a hazard of 0 before."""
        return exit_distribution(self.hazards(inputs).masked_fill(~inputs.counted, 0))
