"""One micro-batch: unroll, read, weigh, and the gradient. Everything else in training is bookkeeping.

Axes: R loops, B batch, T tokens.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loopwise.loops.drivers import unroll
from loopwise.models.accounting import count_flops
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.attention import Memory
from loopwise.nn.noise import integer
from loopwise.objectives.base import LoopPlan, Objective, ObjectiveInputs
from loopwise.objectives.loss import ObjectiveLoss, objective_loss
from loopwise.train.batches import Batch


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one micro-batch will do: known before anything is computed."""

    batch: Batch
    plan: LoopPlan
    share: float
    """Its part of the step's loss."""


@dataclass(frozen=True, kw_only=True)
class MicroBatchResult:
    """What one micro-batch cost and how it was unrolled."""

    loss: ObjectiveLoss
    inputs: ObjectiveInputs


def plan_step(objective: Objective, batches: Sequence[Batch], *, seed: int, step: int) -> list[MicroBatch]:
    """The micro-batches of a step, with shares that make its loss the mean over all its tokens whose loss counts."""
    plans = [objective.plan(seed=seed, step=step, micro=micro) for micro in range(len(batches))]
    counts = [counted_tokens(objective, batch, plan) for batch, plan in zip(batches, plans, strict=True)]
    return [
        MicroBatch(batch=batch, plan=plan, share=count / max(1, sum(counts)))
        for batch, plan, count in zip(batches, plans, counts, strict=True)
    ]


def counted_tokens(objective: Objective, batch: Batch, plan: LoopPlan) -> int:
    """Over how many tokens the objective takes its mean. Calibration judges every token at every loop."""
    first_loop = None if objective.trains == "gate" else batch.first_loop
    inputs = ObjectiveInputs(plan=plan, mask=batch.mask, first_loop=first_loop)
    return int(inputs.counted.any(0).sum())


def micro_batch_loss(
    model: LoopedLM,
    batch: Batch,
    objective: Objective,
    plan: LoopPlan,
    *,
    progress: float = 0.0,
    start: Float[Tensor, "batch tokens width"] | None = None,
    recompute: bool = False,
    share: float = 1.0,
    memory: Memory | None = None,
) -> MicroBatchResult:
    """The objective's loss of one micro-batch, ready for `backward`.

    Args:
        plan: what `objective.plan` says for this micro-batch.
        progress: share of the stage's steps already done.
        start: the start state of random-start models.
        recompute: recompute each loop in the backward pass.
        share: this micro-batch's part of the step, see `plan_step`.
        memory: what may read what, in place of the batch's documents.

    Raises:
        ConfigError: the objective needs an exit gate and the model has none.
    """
    states: list[Tensor] = []

    def keep(loop: int, state: Tensor) -> None:
        if objective.needs_hazards or loop in plan.loops_read:
            states.append(state)

    with torch.no_grad() if objective.trains == "gate" else nullcontext():
        context = model.encode(batch.tokens, documents=batch.documents if memory is None else None, memory=memory)
        unroll(model, context, loops=plan.loops, start=start, backprop=plan.backprop, checkpoint=recompute, visit=keep)
        hidden = [model.read(state, context) for state in states[-len(plan.loops_read) :]]
    inputs = ObjectiveInputs(
        plan=plan,
        mask=batch.mask,
        hazards=read_hazards(model, states) if objective.needs_hazards else None,
        first_loop=batch.first_loop,
        progress=progress,
    )
    loss = objective_loss(
        objective, inputs, hidden=hidden, head_weight=model.head_weight, targets=batch.targets, share=share
    )
    return MicroBatchResult(loss=loss, inputs=inputs)


def read_hazards(model: LoopedLM, states: Sequence[Tensor]) -> Float[Tensor, "loops batch tokens"] | None:
    """The gate's chance of stopping after each loop, never narrower than float32; None without a gate."""
    hazards = [hazard for state in states if (hazard := model.hazard(state)) is not None]
    return torch.stack(hazards) if hazards else None


def training_start(
    model: LoopedLM, batch: Batch, *, seed: int, step: int, micro: int
) -> Float[Tensor, "batch tokens width"] | None:
    """The start state of a random-start model: a function of (seed, step, micro-batch, row, position)."""
    if not model.facts.random_start:
        return None
    rows, tokens = batch.tokens.shape
    positions = torch.arange(tokens, device=batch.tokens.device).expand(rows, tokens)
    samples = torch.arange(rows, device=batch.tokens.device)[:, None].expand(rows, tokens)
    return model.draw_start(positions, integer(seed, f"training start {step} {micro}"), samples)


def autocast(device: str, dtype: Literal["float32", "bfloat16"]) -> AbstractContextManager[Any]:
    """The context in which a run computes.

    The cache of cast weights stays off: filled inside a no-gradient loop, it would be reused in the loops that need
    gradients and cut them off from the weights.
    """
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, cache_enabled=False)


def executed_flops(
    config: LoopedLMConfig, plan: LoopPlan, *, tokens: int, context: int, trains: Literal["model", "gate"]
) -> float:
    """Floating-point operations of one micro-batch: forward, and twice that where gradient flows.

    Recomputation is not counted: it is a cost of saving memory, not work that was asked for.

    Args:
        tokens: in the micro-batch.
        context: tokens of one sequence.
        trains: what the objective trains.
    """
    flops = count_flops(config, context=context // 2)
    if trains == "gate":
        return float(tokens * (plan.loops * flops.per_loop + len(plan.loops_read) * flops.fixed))
    with_gradient = plan.loops if plan.backprop is None else plan.backprop
    loops = plan.loops + 2 * with_gradient
    return float(tokens * (loops * flops.per_loop + 3 * len(plan.loops_read) * flops.fixed))
