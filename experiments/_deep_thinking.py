"""What the Deep-Thinking experiments share: a network trained on one size, and its accuracy by size and loops."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _lab import Cell
from torch import Tensor

from loopwise.loops.drivers import unroll
from loopwise.models.deep_thinking import DeepThinking, DeepThinkingConfig
from loopwise.objectives.progressive import Progressive, progressive_loss
from loopwise.tasks.problems import IGNORED, Problems, Task, numbers
from loopwise.train.fit import FitConfig, fit
from loopwise.train.schedule import ScheduleConfig

TEST_SEED = 1_000_003
"""No training seed; problems of the test."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One setting of a Deep-Thinking experiment."""

    train_size: int
    """Size of the problems in training."""
    test_sizes: tuple[int, ...]
    """Sizes of the test, the trained one first."""
    test_counts: tuple[int, ...]
    """Problems of each size in the test."""
    dimensions: int
    """1: sequences, 2: pictures."""
    width: int
    """Numbers per place in the state."""
    loops: int
    """Most loops of training, m."""
    alpha: float
    """Weight of the progressive term where a variant has it."""
    test_loops: int
    """Loops of the test."""
    batch: int
    """Problems per step."""
    steps: int
    """Optimiser steps."""
    learning_rate: float
    """AdamW's peak, with a short warm-up and a cosine to 0."""


def layout(pictures: Tensor, sizes: Sizes) -> Tensor:
    """Inputs in the order that a CPU's convolutions like best."""
    return pictures.contiguous(memory_format=torch.channels_last) if sizes.dimensions == 2 else pictures


def train(cell: Cell, task: Callable[[int], Task], *, recall: bool, alpha: float) -> DeepThinking:
    """The cell's network, trained; at once where the cell's folder holds the end of its training."""
    sizes: Sizes = cell.setting
    torch.manual_seed(cell.seed)
    config = DeepThinkingConfig(
        dimensions=sizes.dimensions,
        channels=3 if sizes.dimensions == 2 else 1,
        width=sizes.width,
        recall=recall,
        trained_loops=(1, sizes.test_loops),
    )
    model = DeepThinking(config).to(cell.device)
    if sizes.dimensions == 2:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    problems = task(sizes.train_size)
    objective = Progressive(loops=sizes.loops, alpha=alpha)

    def batches(step: int) -> Problems:
        return problems.draw(cell.seed, numbers(step * sizes.batch, sizes.batch))

    def loss(batch: Problems, step: int) -> Tensor:
        context = model.encode(layout(batch.inputs, sizes).to(cell.device))
        targets = batch.targets.to(cell.device)
        return progressive_loss(model, context, targets, objective, seed=cell.seed, step=step)

    schedule = ScheduleConfig(kind="cosine", warmup=max(1, sizes.steps // 20))
    fit(
        model,
        loss,
        batches,
        FitConfig(steps=sizes.steps, learning_rate=sizes.learning_rate, schedule=schedule, checkpoint_every=200),
        checkpoints=cell.checkpoints,
        log=cell.log,
    )
    return model


@torch.no_grad()
def accuracies(model: DeepThinking, cell: Cell, task: Task, size: int, count: int) -> dict[str, Any]:
    """Share of problems right as a whole after each loop, and at each one's most confident loop (the authors' way)."""
    sizes: Sizes = cell.setting
    problems = task.draw(TEST_SEED, numbers(0, count))
    asked = (problems.targets != IGNORED).to(cell.device)
    context = model.encode(layout(problems.inputs, sizes).to(cell.device), asked=asked)
    right: list[Tensor] = []
    certain: list[Tensor] = []

    def visit(loop: int, state: Tensor) -> None:
        prediction = model.readout(state, context)
        right.append(task.verify(problems, prediction.argmax(-1).cpu()))
        certain.append(model.signal(state, prediction).cpu())

    unroll(model, context, loops=sizes.test_loops, visit=visit)
    solved, certainty = torch.stack(right), torch.stack(certain)
    chosen = certainty.argmax(0)
    return {
        f"accuracy_{size}": solved.gather(0, chosen[None])[0].float().mean().item(),
        f"loops_{size}": (chosen + 1).float().mean().item(),
        f"curve_{size}": [round(share, 4) for share in solved.float().mean(1).tolist()],
    }


def measure(cell: Cell, task: Callable[[int], Task], *, recall: bool, alpha: float) -> dict[str, Any]:
    """Train, then test every size."""
    model = train(cell, task, recall=recall, alpha=alpha)
    found: dict[str, Any] = {}
    for size, count in zip(cell.setting.test_sizes, cell.setting.test_counts, strict=True):
        found |= accuracies(model, cell, task(size), size, count)
    return found
