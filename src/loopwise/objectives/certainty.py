"""Minimum loss and maximum certainty (Darlow et al. 2025, arXiv 2505.05522, section 2.5 and listing 4).

A sample is trained at two of its loops: where its loss is smallest and where it is most certain. Nothing asks for few
loops; that easy samples need fewer is what falls out.

For routes, losses count up to a little beyond the longest stretch from the start that any loop gets right: a
curriculum that lengthens itself.

Axes: R loops, N samples, S places of an answer, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.tasks.problems import IGNORED


@dataclass(frozen=True, kw_only=True)
class CertaintyLoss:
    """What `certainty_loss` found."""

    total: Float[Tensor, ""]
    """What to call backward on: mean over samples of half the loss at either loop, in nats per place."""
    best: Int[Tensor, " samples"]
    """The loop, counted from 1, at which each sample's loss is smallest."""
    certain: Int[Tensor, " samples"]
    """The loop, counted from 1, at which each sample is most certain (with `last`: the last one)."""
    losses: Float[Tensor, "loops samples"]
    """Loss of each sample after each loop, detached."""


def certainty_loss(
    logits: Float[Tensor, "loops samples *places classes"],
    targets: Int[Tensor, "samples *places"],
    certainties: Float[Tensor, "loops samples"],
    *,
    lookahead: int | None = None,
    last: bool = False,
) -> CertaintyLoss:
    """Mean of the losses at the loop of least loss and at the most certain loop.

    Args:
        targets: classes; `IGNORED` where nothing is asked.
        certainties: the model's signal after each loop; it chooses and carries no gradient.
        lookahead: for routes: places count up to this many beyond the last one of the longest right beginning; None
            counts all.
        last: take the last loop in place of the most certain one, as the authors do for baselines without certainty.

    Raises:
        ConfigError: for a lookahead below 1, or one where answers have no places.
    """
    if lookahead is not None and (lookahead < 1 or targets.dim() != 2):
        raise ConfigError(
            f"lookahead={lookahead} with targets of {targets.dim()} axes; give 1 or more, for routes only"
        )
    repeated = targets.expand(logits.shape[0], *targets.shape)
    each = F.cross_entropy(logits.flatten(0, -2), repeated.flatten(), ignore_index=IGNORED, reduction="none")
    each = each.view(*logits.shape[:2], -1)
    counted = (targets != IGNORED).view(len(targets), -1)
    if lookahead is not None:
        counted = counted & within_reach(logits.detach(), targets, lookahead)
    losses = (each * counted).sum(-1) / counted.sum(-1).clamp_min(1)
    best = losses.detach().argmin(0)
    certain = torch.full_like(best, len(losses) - 1) if last else certainties.argmax(0)
    samples = torch.arange(len(best), device=best.device)
    total = (losses[best, samples] + losses[certain, samples]).mean() / 2
    return CertaintyLoss(total=total, best=best + 1, certain=certain + 1, losses=losses.detach())


def within_reach(
    logits: Float[Tensor, "loops samples places classes"], targets: Int[Tensor, "samples places"], lookahead: int
) -> Tensor:
    """Which places of a route are trained, (N, S): up to `lookahead` beyond the last of the longest right beginning.

    The longest over all loops; where even the first place is wrong at every loop, as if it alone were right.
    """
    right = (logits.argmax(-1) == targets).int().cumprod(-1).sum(-1).amax(0)
    reach = right.clamp_min(1) - 1 + lookahead
    return torch.arange(targets.shape[1], device=targets.device) < reach[:, None]
