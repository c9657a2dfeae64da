"""One micro-batch: unroll, read, weigh, and the gradient. Everything else in training is bookkeeping."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopwise.loops.drivers import unroll
from loopwise.loops.hazard import exit_distribution, mean_exit_loop
from loopwise.models.accounting import count_flops
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LMContext, LoopedLM
from loopwise.nn.noise import integer
from loopwise.objectives.base import LoopPlan, Objective, ObjectiveInputs
from loopwise.objectives.head import token_losses
from loopwise.objectives.loss import ObjectiveLoss, objective_loss
from loopwise.train.batches import Batch
from loopwise.train.guards import state_norms, token_correlation


@dataclass(frozen=True, kw_only=True)
class MicroBatchResult:
    """What one micro-batch cost and how it was unrolled."""

    loss: ObjectiveLoss
    inputs: ObjectiveInputs


def micro_batch_loss(
    model: LoopedLM,
    batch: Batch,
    objective: Objective,
    plan: LoopPlan,
    *,
    progress: float = 0.0,
    start: Tensor | None = None,
    recompute: bool = False,
    share: float = 1.0,
) -> MicroBatchResult:
    """The objective's loss of one micro-batch, ready for `backward`.

    Args:
        plan: what `objective.plan` says for this micro-batch.
        progress: share of the stage's steps already done.
        start: the start state of random-start models.
        recompute: recompute each loop in the backward pass.
        share: this micro-batch's part of the step.
    """
    frozen = objective.trains == "gate"
    states: list[Tensor] = []
    with torch.no_grad() if frozen else nullcontext():
        context = model.encode(batch.tokens, documents=batch.documents)
        unroll(
            model,
            context,
            loops=plan.loops,
            start=start,
            backprop=plan.backprop,
            checkpoint=recompute,
            visit=_keep(states, plan, every=objective.needs_hazards),
        )
        hidden = [model.read(state, context) for state in states[-len(plan.loops_read) :]]
    hazards = None
    if objective.needs_hazards and model.gate is not None:
        hazards = torch.stack([_hazard(model, state) for state in states])
    inputs = ObjectiveInputs(
        plan=plan, mask=batch.mask, hazards=hazards, first_loop=batch.first_loop, progress=progress
    )
    loss = objective_loss(
        objective, inputs, hidden=hidden, head_weight=model.head_weight, targets=batch.targets, share=share
    )
    return MicroBatchResult(loss=loss, inputs=inputs)


def _keep(states: list[Tensor], plan: LoopPlan, *, every: bool) -> Any:
    def visit(loop: int, state: Tensor) -> None:
        if every or loop in plan.loops_read:
            states.append(state)

    return visit


def _hazard(model: LoopedLM, state: Tensor) -> Tensor:
    hazard = model.hazard(state)
    if hazard is None:
        raise TypeError("hazards were asked of a model without a gate")
    return hazard


def training_start(model: LoopedLM, batch: Batch, *, seed: int, step: int, micro: int) -> Tensor | None:
    """The start state of a random-start model: a function of (seed, step, micro-batch, row, position)."""
    if not model.facts.random_start:
        return None
    rows, tokens = batch.tokens.shape
    positions = torch.arange(tokens, device=batch.tokens.device).expand(rows, tokens)
    samples = torch.arange(rows, device=batch.tokens.device)[:, None].expand(rows, tokens)
    return model.draw_start(positions, integer(seed, f"training start {step} {micro}"), samples)


def autocast(device: str, dtype: str) -> AbstractContextManager[Any]:
    """The context in which a run computes.

    The cache of cast weights stays off: filled inside a no-gradient loop, it would be reused in the loops that need
    gradients and cut them off from the weights.
    """
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, cache_enabled=False)


def executed_flops(config: LoopedLMConfig, plan: LoopPlan, *, tokens: int, context: int, trains: str) -> float:
    """Floating-point operations of one micro-batch: forward, and twice that where gradient flows.

    Recomputation is not counted: it is a cost of saving memory, not work that was asked for.
    """
    flops = count_flops(config, context=context // 2)
    if trains == "gate":
        return float(tokens * (plan.loops * flops.per_loop + len(plan.loops_read) * flops.fixed))
    with_gradient = plan.loops if plan.backprop is None else plan.backprop
    loops = plan.loops + 2 * with_gradient
    return float(tokens * (loops * flops.per_loop + 3 * len(plan.loops_read) * flops.fixed))


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How a model does on text it has not seen."""

    losses: dict[int, float]
    """Mean loss in nats per token, by loops."""
    accuracies: dict[int, float]
    """Share of targets that are the likeliest token, by loops."""
    exits: list[float] | None
    """Mean exit distribution p(1)..p(R); None without a gate."""
    mean_exit: float | None
    """Mean exit loop under the gate."""
    correlation: float
    """Mean cosine between states of different tokens after the last loop."""
    norms: list[float]
    """Root mean square of the states after each loop."""


@torch.no_grad()
def validate(model: LoopedLM, batches: list[Batch], loops: tuple[int, ...]) -> Validation:
    """Read validation batches at several loop counts in one pass each. Tokens weigh the same everywhere."""
    losses = torch.zeros(len(loops), dtype=torch.float64)
    hits = torch.zeros(len(loops), dtype=torch.float64)
    counts = torch.zeros(len(loops), dtype=torch.float64)
    leaving = torch.zeros(max(loops), dtype=torch.float64)
    correlations: list[float] = []
    norms = torch.zeros(max(loops), dtype=torch.float64)
    exit_sum, tokens = 0.0, 0
    for batch in batches:
        context: LMContext = model.encode(batch.tokens, documents=batch.documents)
        states: list[Tensor] = []
        unroll(model, context, loops=max(loops), visit=lambda loop, state, kept=states: kept.append(state))
        for index, loop in enumerate(loops):
            mask = batch.mask if batch.first_loop is None else batch.mask & (batch.first_loop <= loop)
            hidden = model.read(states[loop - 1], context)
            found = token_losses([hidden], model.head_weight, batch.targets, mask=mask)
            losses[index] += found.losses.double().sum().cpu()
            likeliest = torch.nn.functional.linear(hidden[mask], model.head_weight).argmax(-1)
            hits[index] += (likeliest == batch.targets[mask]).double().sum().cpu()
            counts[index] += mask.sum().cpu()
        stacked = torch.stack(states)
        norms += torch.tensor(state_norms(stacked), dtype=torch.float64)
        correlations.append(token_correlation(states[-1], batch.mask))
        if model.gate is not None:
            shares = exit_distribution(torch.stack([_hazard(model, state) for state in states])) * batch.mask
            leaving += shares.sum((1, 2)).double().cpu()
            exit_sum += float((mean_exit_loop(shares)).sum())
            tokens += int(batch.mask.sum())
    return Validation(
        losses={loop: float(losses[i] / counts[i].clamp_min(1)) for i, loop in enumerate(loops)},
        accuracies={loop: float(hits[i] / counts[i].clamp_min(1)) for i, loop in enumerate(loops)},
        exits=(leaving / max(tokens, 1)).tolist() if model.gate is not None else None,
        mean_exit=exit_sum / max(tokens, 1) if model.gate is not None else None,
        correlation=sum(correlations) / max(len(correlations), 1),
        norms=(norms / max(len(batches), 1)).tolist(),
    )
