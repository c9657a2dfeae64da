"""How pairs of neurons synchronise over time (Darlow et al. 2025, arXiv 2505.05522, section 2.4 and appendix).

For a pair (i, j) with decay r >= 0 the synchronisation after tick t is

    S_t = sum_{s<=t} exp(-r (t-s)) z_i,s z_j,s / sqrt( sum_{s<=t} exp(-r (t-s)) )

which needs no history: with a <- exp(-r) a + z_i z_j and b <- exp(-r) b + 1 it is a / sqrt(b).

Axes: N rows, D neurons, P pairs.
"""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.errors import ConfigError

Pairing = Literal["first-last", "random", "random-pairing", "none"]
MOST_DECAY = 15.0
"""The authors' upper limit: beyond it nothing of the past is left in float32."""


def count_pairs(pairing: Pairing, chosen: int) -> int:
    """Pairs that `chosen` neurons make: n where they are drawn pair by pair, n(n+1)/2 where all meet all."""
    return chosen if pairing in ("random-pairing", "none") else chosen * (chosen + 1) // 2


def choose_neurons(
    pairing: Pairing, *, neurons: int, chosen: int, last: bool, self_pairs: int, generator: np.random.Generator
) -> Int[Tensor, "two chosen"]:
    """Left and right neurons from which the pairs are made; fixed when the model is built.

    Args:
        last: `first-last` takes the last neurons and not the first ones (for actions).
        self_pairs: in `random-pairing`, how many pairs are a neuron with itself.
    """
    if pairing == "first-last":
        order = torch.arange(neurons)
        side = order[neurons - chosen :] if last else order[:chosen]
        return torch.stack((side, side))
    left, right = torch.from_numpy(generator.integers(neurons, size=(2, chosen)))
    if pairing == "random-pairing":
        right[:self_pairs] = left[:self_pairs]
    return torch.stack((left, right))


def pair_up(pairing: Pairing, sides: Int[Tensor, "two chosen"]) -> Int[Tensor, "two pairs"]:
    """The pairs, in the authors' order: row by row of the upper triangle where all meet all."""
    if pairing in ("random-pairing", "none"):
        return sides
    row, column = torch.triu_indices(sides.shape[1], sides.shape[1], device=sides.device)
    return torch.stack((sides[0, row], sides[1, column]))


def sides_of(pairing: Pairing, pairs: Int[Tensor, "two pairs"], chosen: int) -> Int[Tensor, "two chosen"]:
    """The inverse of `pair_up`.

    Raises:
        ConfigError: when no choice of neurons makes these pairs.
    """
    if pairing in ("random-pairing", "none"):
        return pairs
    row, column = torch.triu_indices(chosen, chosen, device=pairs.device)
    sides = torch.stack((pairs[0, row == column], pairs[1, :chosen]))
    if not torch.equal(pair_up(pairing, sides), pairs):
        raise ConfigError(
            f"these pairs are not what pairing={pairing!r} of {chosen} neurons makes; build the model anew"
        )
    return sides


class _Clamp(torch.autograd.Function):
    """Clamp to [0, most]; of the gradient only what would push further out is dropped.

    A plain clamp has no gradient outside, so a decay that one step carried below 0 would never come back (the authors
    met this and clamp the parameter itself in every forward pass; here a forward pass changes nothing).
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(decay)
        ctx.most = most
        return decay.clamp(0.0, most)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (decay,) = ctx.saved_tensors
        outwards = ((decay < 0) & (gradients[0] > 0)) | ((decay > ctx.most) & (gradients[0] < 0))
        return gradients[0].masked_fill(outwards, 0.0), None


def retention(decay: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """What a tick keeps of the ones before: exp(-r), with r clamped to [0, 15] without losing its gradient at 0."""
    kept: Tensor = torch.exp(-_Clamp.apply(decay, MOST_DECAY))  # type: ignore[no-untyped-call]
    return kept


def products(activity: Float[Tensor, "rows neurons"], pairs: Int[Tensor, "two pairs"]) -> Float[Tensor, "rows pairs"]:
    """z_i z_j of every pair."""
    return activity[:, pairs[0]] * activity[:, pairs[1]]


def synchronisation(
    total: Float[Tensor, "rows pairs"], weight: Float[Tensor, "rows pairs"]
) -> Float[Tensor, "rows pairs"]:
    """a / sqrt(b)."""
    return total * torch.rsqrt(weight)
