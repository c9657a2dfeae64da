"""From hazards (the chance of stopping at a loop, given that one got there) to exit probabilities.

    S_t = prod_{j<=t} (1 - lambda_j)        the chance of going on past loop t
    p_t = lambda_t S_{t-1}   for t < R      the chance of leaving at loop t
    p_R = S_{R-1}                           the last loop takes what is left; lambda_R is never used

Source: Ouro (arXiv 2510.25741), equation 3. Everything is computed in float32, or in float64 if the hazards
are, out of products and differences alone: no logarithm or division that a hazard of exactly 0 or 1 could break.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def widen(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same numbers in float32, or unchanged if they are float64."""
    return values if values.dtype == torch.float64 else values.float()


def exit_distribution(hazards: Float[Tensor, "loops *units"]) -> Float[Tensor, "loops *units"]:
    """The probability of leaving after each loop.

    Args:
        hazards: probabilities, loop 1 first; the last loop's is ignored.

    Returns:
        probabilities that sum to one over the loops (to rounding), float32 or wider, differentiable with
        finite gradients also where a hazard is exactly 0 or 1.
    """
    hazards = widen(hazards)
    survival = torch.ones_like(hazards[0])
    leaving = []
    for hazard in hazards[:-1]:
        leaving.append(hazard * survival)
        survival = survival * (1 - hazard)
    return torch.stack([*leaving, survival])


def exit_cdf(hazards: Float[Tensor, "loops *units"]) -> Float[Tensor, "loops *units"]:
    """The probability of having left after each loop: 1 - S_t, and exactly 1 at the last loop.

    Ouro's Q-exit leaves at the first loop where this reaches q.
    """
    hazards = widen(hazards)
    left = 1 - torch.cumprod(1 - hazards[:-1], dim=0)
    return torch.cat([left, torch.ones_like(hazards[:1])])


def entropy(probabilities: Float[Tensor, "loops *units"]) -> Float[Tensor, "*units"]:
    """Entropy over the loops in nats; where a probability is 0 its term is 0 and the gradient stays finite."""
    probabilities = widen(probabilities)
    tiny = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp_min(tiny).log()).sum(0)


def mean_exit_loop(probabilities: Float[Tensor, "loops *units"]) -> Float[Tensor, "*units"]:
    """The mean of the loop at which one leaves, loops counted from 1."""
    probabilities = widen(probabilities)
    loops = torch.arange(1, probabilities.shape[0] + 1, dtype=probabilities.dtype, device=probabilities.device)
    return (probabilities * loops.view(-1, *[1] * (probabilities.ndim - 1))).sum(0)


def continuation_cross_entropy(
    hazards: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Cross-entropy in nats between the chance of going on, 1 - hazard, and a wanted chance `targets`.

    The hazard is held just inside (0, 1), so value and gradient stay finite when a sigmoid has saturated; there the
    gradient is zero.
    """
    hazards = widen(hazards)
    limits = torch.finfo(hazards.dtype)
    inside = hazards.clamp(min=limits.tiny, max=1 - limits.eps)
    return -(targets * torch.log1p(-inside) + (1 - targets) * inside.log())
