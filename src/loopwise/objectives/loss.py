"""One micro-batch's loss under any objective: head, weights and gate loss put together."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from loopwise.errors import InputError
from loopwise.objectives.base import Objective, ObjectiveInputs
from loopwise.objectives.head import token_losses


@dataclass(frozen=True, kw_only=True)
class ObjectiveLoss:
    """What `objective_loss` returns."""

    total: Float[Tensor, ""]
    """What to call backward on, in nats per token, times `share`."""
    losses: Float[Tensor, "loops batch tokens"]
    """Cross-entropy of each token after each loop that was read, in nats, detached; 0 where the mask is False."""


def objective_loss(
    objective: Objective,
    inputs: ObjectiveInputs,
    *,
    hidden: Float[Tensor, "loops batch tokens width"] | Sequence[Float[Tensor, "batch tokens width"]],
    head_weight: Float[Tensor, "vocab width"],
    targets: Int[Tensor, "batch tokens"],
    share: float = 1.0,
    chunk_bytes: int | None = None,
) -> ObjectiveLoss:
    """The loss of one micro-batch.

    Args:
        objective: what to learn.
        inputs: plan, mask, hazards and progress.
        hidden: what the head multiplies, one entry for each of `inputs.plan.loops_read`.
        head_weight: the head's matrix.
        targets: the wanted token ids; not looked at where the mask is False.
        share: this micro-batch's part of the step, for gradient accumulation (its counted tokens over the step's).
            Given here it costs nothing; multiplying the total afterwards costs a pass over the head's gradient.
        chunk_bytes: see `token_losses`.

    Raises:
        InputError: as many hidden states as loops read are needed.
        ConfigError: the objective needs a gate and the model has none.
    """
    expected = len(inputs.plan.loops_read)
    if len(hidden) != expected:
        raise InputError(
            f"{len(hidden)} hidden states for a plan that reads {expected} of {inputs.plan.loops} loops; "
            "give one for each of plan.loops_read"
        )
    weights = objective.weights(inputs)
    if weights is not None and share != 1.0:
        weights = weights * share
    language = token_losses(hidden, head_weight, targets, weights=weights, mask=inputs.mask, chunk_bytes=chunk_bytes)
    gate = objective.gate_loss(inputs, language.losses)
    return ObjectiveLoss(total=language.weighted + share * gate, losses=language.losses)
