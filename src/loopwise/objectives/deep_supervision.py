"""What deep supervision learns after each segment: the answer, and whether it is right (HRM, arXiv 2506.21734; TRM,
arXiv 2510.04871).

    loss = stablemax CE(answer) + 0.5 [ BCE(halting logit, answer is right) + BCE(going-on logit, bootstrapped target) ]

TRM leaves the last term out. Everything is a mean over the batch; within a sample, over the places that are asked.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from loopwise.tasks.problems import IGNORED

HALTING_WEIGHT = 0.5
"""Weight of the halting losses in both papers' code."""


@dataclass(frozen=True, kw_only=True)
class SegmentLoss:
    """The losses of one segment, each a scalar with its gradient."""

    answer: Tensor
    """Cross-entropy of the answer, in nats per place."""
    halting: Tensor
    """Cross-entropy of the halting head."""

    @property
    def total(self) -> Tensor:
        """What the optimiser makes small."""
        return self.answer + HALTING_WEIGHT * self.halting


def segment_loss(
    prediction: Float[Tensor, "batch *places classes"],
    targets: Int[Tensor, "batch *places"],
    right: Bool[Tensor, " batch"],
    halt: Float[Tensor, " batch"],
    go_on: tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]] | None = None,
) -> SegmentLoss:
    """The loss after one segment.

    Args:
        prediction: logits of every place.
        targets: right classes, `IGNORED` where nothing is asked.
        right: whether the whole answer of each sample is right.
        halt: logits of halting.
        go_on: logits of going on and their target probabilities (HRM); None without (TRM).
    """
    wide = torch.promote_types(halt.dtype, torch.float32)
    halting = F.binary_cross_entropy_with_logits(halt.to(wide), right.to(wide))
    if go_on is not None:
        logits, goals = go_on
        halting = halting + F.binary_cross_entropy_with_logits(logits.to(wide), goals.to(wide))
    return SegmentLoss(answer=stablemax_cross_entropy(prediction, targets).mean(), halting=halting)


def stablemax_cross_entropy(
    logits: Float[Tensor, "batch *places classes"], targets: Int[Tensor, "batch *places"]
) -> Float64[Tensor, " batch"]:
    """-log stablemax(logits)[target], averaged over the places of a sample that are asked; 0 where none is.

    In float64, as in the authors' code: a place that is nearly certain still has a gradient then.
    """
    asked = targets != IGNORED
    chosen = targets.masked_fill(~asked, 0)[..., None]
    losses = -log_stablemax(logits.double()).gather(-1, chosen)[..., 0] * asked
    return losses.flatten(1).sum(1) / asked.flatten(1).sum(1).clamp(min=1)


def log_stablemax(logits: Float[Tensor, "... classes"]) -> Float[Tensor, "... classes"]:
    """log of s(x) / sum s(x), with s(x) = x + 1 above zero and 1 / (1 - x) below (Prieto et al., arXiv 2501.04697).

    It grows only linearly, so a model cannot make its loss small by scaling its logits up.
    """
    # Each branch sees only numbers it is meant for: the gradient of the other, times zero, could be NaN.
    above, below = logits.clamp(min=0), logits.clamp(max=0)
    log_s = torch.where(logits < 0, -torch.log1p(-below), torch.log1p(above))
    return log_s - log_s.logsumexp(-1, keepdim=True)


def going_on_target(ahead: Float[Tensor, "batch 2"], last: Bool[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """HRM's target of the going-on logit: the better of both choices one segment later, or halting if it must.

    Args:
        ahead: logits of halting and of going on after one more segment, without gradient.
        last: whether that segment would be one too many.
    """
    halt, go_on = ahead.unbind(-1)
    return torch.where(last, halt, torch.maximum(halt, go_on)).sigmoid()
