"""What a model that learns when to stop pays: PonderNet's expected loss and ACT's ponder cost.

PonderNet (Banino et al. 2021, arXiv 2107.05407, equations 2 to 5), with hazards h_n and losses L_n after loop n of N:

    p_n = h_n prod_{j<n} (1 - h_j)   for n < N,   p_N = prod_{j<N} (1 - h_j)
    q_n = g (1 - g)^{n-1}            for n < N,   q_N = (1 - g)^{N-1}           the prior, geometric with hazard g
    L   = sum_n p_n L_n + beta KL(p || q)                                       averaged over units

What is left after loop N - 1 goes to loop N in both, so that p sums to 1, and is q where every hazard is g. (The paper
leaves open where the prior's tail goes; to renormalise instead would make no hazard reach a KL of 0.)

ACT (Graves 2016, arXiv 1603.08983, equations 5 to 13):

    L = L_task + tau (N + R)                                                    averaged over units

N counts loops and has no gradient; R, the remainder, carries all of it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.loops.hazard import exit_distribution, widen
from loopwise.models.pondering import ACTState


@dataclass(frozen=True, kw_only=True)
class Ponder:
    """PonderNet's two numbers."""

    prior: float = 0.1
    """g, the prior's hazard; 1 / g loops are its mean before truncation."""
    beta: float = 0.01
    """Weight of the KL, in nats per nat of loss."""

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise ConfigError(f"prior={self.prior}: allowed is a chance between 0 and 1, such as prior=0.1")
        if not self.beta >= 0:
            raise ConfigError(f"beta={self.beta}: allowed is 0 or more, such as beta=0.01")


def truncated_geometric(prior: float, loops: int) -> Float[Tensor, " loops"]:
    """The prior over loops, in float64: geometric, the last loop takes what is left."""
    return exit_distribution(torch.full((loops,), prior, dtype=torch.float64))


def divergence(
    leaving: Float[Tensor, "loops *units"], prior: Float[Tensor, " loops"] | Float[Tensor, "loops *units"]
) -> Float[Tensor, "*units"]:
    """KL(leaving || prior) in nats, the prior one for all or each unit's own.

    A loop that is never left at adds 0, with a finite gradient.
    """
    leaving = widen(leaving)
    tiny = torch.finfo(leaving.dtype).tiny
    expected = prior.to(leaving).clamp_min(tiny).log().view(*prior.shape, *[1] * (leaving.dim() - prior.dim()))
    return (leaving * (leaving.clamp_min(tiny).log() - expected)).sum(0)


def ponder_loss(losses: Float[Tensor, "..."], hazards: Float[Tensor, "..."], ponder: Ponder) -> Float[Tensor, ""]:
    """PonderNet's loss of a batch.

    Args:
        losses: of each unit's answer after each loop, (R, units...), with their gradient.
        hazards: the chance of stopping after each loop, given that one got there; the last is never used.

    Raises:
        InputError: when the two have different shapes.
    """
    if losses.shape != hazards.shape:
        raise InputError(f"losses {tuple(losses.shape)} and hazards {tuple(hazards.shape)}: give one of each per loop")
    leaving = exit_distribution(hazards)
    expected = (leaving * losses).sum(0)
    spread = divergence(leaving, truncated_geometric(ponder.prior, len(hazards)))
    return (expected + ponder.beta * spread).mean()


def ponder_cost(state: ACTState) -> Float[Tensor, " samples"]:
    """N + R of each sample, after the last loop that may run: a sample that has not halted by then halts there."""
    return state.loops + (1 - state.spent)


def act_loss(losses: Float[Tensor, " samples"], state: ACTState, tau: float) -> Float[Tensor, ""]:
    """ACT's loss of a batch.

    Args:
        losses: of each sample's answer, read from `state`.
        state: what `unroll` left after the most loops that may run.
        tau: price of a loop, in nats.

    Raises:
        ConfigError: for a negative price.
    """
    if not tau >= 0:
        raise ConfigError(f"tau={tau}: allowed is 0 or more, such as tau=0.01")
    return (losses + tau * ponder_cost(state)).mean()
