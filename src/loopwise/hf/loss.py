"""What `labels` mean: the loss of the chosen objective.

Axes: B batch, T tokens, D width.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.loops.drivers import unroll
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.noise import integer
from loopwise.objectives import (
    ExpectedLoss,
    LastLoop,
    LoopPlan,
    Objective,
    ObjectiveInputs,
    RandomDepth,
    build_objective,
    objective_loss,
)

IGNORED = -100
"""The label of a token that is not asked for."""


def default_objective(model: LoopedLM) -> str:
    """Ouro's stage I for models with an exit gate, the last loop's loss for the others."""
    return "last" if model.gate is None else "expected"


def resolve_objective(given: str | Objective, *, loops: int) -> Objective:
    """The objective that a text describes; `loops` are those it runs unless it names its own."""
    if isinstance(given, str) and not re.search(r"[:,]\s*loops\s*=", given):
        return build_objective(given, loops=loops)
    return build_objective(given)


def check_progress(objective: Objective, progress: float | None) -> float:
    """The share of training that is done, for objectives that change on the way.

    Raises:
        ConfigError: when such an objective was never told.
    """
    changes = isinstance(objective, ExpectedLoss) and (objective.uniform_until > 0 or objective.beta_end is not None)
    if progress is None and changes:
        raise ConfigError(
            f"objective {objective} changes while training goes on, and nobody says how far it is; "
            "add loopwise.hf.ObjectiveProgress() to the trainer's callbacks, or set model.progress (0 to 1)"
        )
    return progress or 0.0


@dataclass(frozen=True, kw_only=True)
class LabelledRun:
    """A forward pass with its loss."""

    loss: Float[Tensor, ""]
    hidden: Float[Tensor, "batch tokens width"]
    """What the head multiplies after the last loop."""
    states: tuple[Float[Tensor, "batch tokens width"], ...]
    """The prelude's output and the state after each loop; empty unless asked for."""


def labelled_run(
    model: LoopedLM,
    objective: Objective,
    *,
    tokens: Int[Tensor, "batch tokens"],
    labels: Int[Tensor, "batch tokens"],
    padding_mask: Bool[Tensor, "batch tokens"] | None,
    documents: Int[Tensor, "batch tokens"] | None,
    positions: Int[Tensor, "batch tokens"] | None,
    start: int | str | Tensor | None,
    training: bool,
    progress: float,
    expected_items: Tensor | int | None,
    recompute: bool,
    keep_states: bool,
) -> LabelledRun:
    """Run the objective's plan and weigh its losses.

    A label is asked of the token before it, unless it is `IGNORED`, or that token is padding or of another document.

    Args:
        training: whether random depths and start states are drawn anew, from torch's default generator; otherwise
            they are the objective's `loops` and the model's own start.
        expected_items: labels of the whole optimiser step, of which this batch is a part; None: this batch is all.
        recompute: recompute each loop in the backward pass.
        keep_states: whether the state after each loop is wanted.

    Raises:
        InputError: for a label outside the vocabulary.
        ConfigError: when the objective needs a gate and the model has none.
    """
    if not training and isinstance(objective, RandomDepth):
        objective = LastLoop(loops=objective.loops)
    plan = objective.plan(seed=_draw() if training else 0, step=0, micro=0)
    hazard_states: list[Tensor] = []
    read_states: list[Tensor] = []
    kept: list[Tensor] = []

    def visit(loop: int, state: Tensor) -> None:
        if loop in plan.loops_read:
            read_states.append(state)
        if objective.needs_hazards:
            hazard_states.append(state)
        if keep_states:
            kept.append(state)

    with torch.no_grad() if objective.trains == "gate" else nullcontext(), _cast_weights_afresh(plan, tokens.device):
        context = model.encode(tokens, padding_mask=padding_mask, documents=documents, positions=positions)
        if start is None and training and model.facts.random_start:
            rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand(tokens.shape)
            start = model.draw_start(context.positions, integer(_draw(), "training start"), rows)
        unroll(model, context, loops=plan.loops, start=start, backprop=plan.backprop, checkpoint=recompute, visit=visit)
        hidden = [model.read(state, context) for state in read_states]
        states = (context.injected, *kept) if keep_states else ()
    hazards = [hazard for state in hazard_states if (hazard := model.hazard(state)) is not None]
    mask, targets = _shift(labels, padding_mask, documents)
    inputs = ObjectiveInputs(plan=plan, mask=mask, hazards=torch.stack(hazards) if hazards else None, progress=progress)
    share = 1.0 if expected_items is None else float(mask.sum()) / max(float(expected_items), 1.0)
    loss = objective_loss(
        objective, inputs, hidden=hidden, head_weight=model.head_weight, targets=targets, share=share
    ).total
    return LabelledRun(loss=loss, hidden=hidden[-1], states=states)


def _draw() -> int:
    return int(torch.randint(2**62, ()))


@contextmanager
def _cast_weights_afresh(plan: LoopPlan, device: torch.device) -> Iterator[None]:
    """Keep autocast from reusing weights that it cast inside a loop without gradient: they are cut off from theirs."""
    if plan.backprop is None or not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False):
        yield


def _shift(
    labels: Int[Tensor, "batch tokens"],
    padding_mask: Bool[Tensor, "batch tokens"] | None,
    documents: Int[Tensor, "batch tokens"] | None,
) -> tuple[Bool[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Whether a token is asked for its successor, and that successor."""
    targets = labels.roll(-1, dims=-1)
    mask = targets != IGNORED
    mask[:, -1] = False
    if padding_mask is not None:
        mask = mask & padding_mask
    if documents is not None:
        mask = mask & (documents == documents.roll(-1, dims=-1))
    return mask, targets
