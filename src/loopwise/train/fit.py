"""Train any model on batches made in code: one readable loop, for models that need no corpus and no run folder.

`loopwise train` (`run.py`) is the whole training run of a language model. This is its small sibling for everything
else that loops: the caller brings a loss of (batch, step) and a batch for each step, both functions of the step alone,
so that a fit that was interrupted continues to the same bits.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopwise.errors import ConfigError
from loopwise.train.ema import Ema, EmaConfig
from loopwise.train.optimizers import OptimizerConfig, build_optimizer
from loopwise.train.schedule import ScheduleConfig, multiplier
from loopwise.train.snapshots import newest_snapshot, put_weights, save_snapshot, take_over

Loss = Callable[[Any, int], Tensor]
"""(batch, step counted from 0) -> the number to make small, a scalar with its gradient."""
Batches = Callable[[int], Any]
"""Step counted from 0 -> its batch; the same step always gives the same batch."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how fast a model learns."""

    steps: int
    """Optimiser steps in all."""
    learning_rate: float = 1e-3
    """The schedule's peak."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(kind="cosine"))
    """How the rate moves from step to step."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.0, clip=1.0)
    )
    """What moves the weights."""
    ema: EmaConfig | None = None
    """Average the weights; the model leaves the fit with the average in it."""
    log_every: int = 50
    """Steps between two calls of `log`."""
    checkpoint_every: int = 500
    """Steps between two checkpoints, where a folder for them is given."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: use 1 or more")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate}: use a number above 0, such as 1e-3")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a fit did."""

    losses: tuple[float, ...]
    """Loss of every step that ran here; a resumed fit has those since its checkpoint."""
    skipped: int
    """Steps skipped because a gradient was not finite."""
    seconds: float
    """Wall time spent here."""


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    config: FitConfig,
    *,
    checkpoints: str | Path | None = None,
    log: Callable[[int, Mapping[str, float]], None] | None = None,
) -> Fitted:
    """Train `model` in place; it is in train mode during the fit and in eval mode after it.

    Args:
        loss: called with a batch and the step.
        batches: gives the batch of a step.
        checkpoints: folder to write checkpoints to and to resume from, exactly; None keeps nothing.
        log: called with the steps done and {"loss", "gradient_norm", "learning_rate", "steps_per_second"}.

    Raises:
        CheckpointError: when the folder holds checkpoints of another model, or only broken ones.
    """
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    ema = Ema(model.named_parameters(), config.ema) if config.ema is not None else None
    folder = None if checkpoints is None else Path(checkpoints)
    done = 0
    if folder is not None and (found := newest_snapshot(folder)) is not None:
        take_over(found, model, optimizer, ema)
        done = found.step
    losses: list[float] = []
    began = looked = time.perf_counter()
    model.train()
    for step in range(done, config.steps):
        value = loss(batches(step), step)
        torch.autograd.backward(value)
        rate = config.learning_rate * multiplier(config.schedule, step, config.steps)
        report = optimizer.step(rate)
        optimizer.zero_grad()
        if ema is not None and not report.skipped:
            ema.update(step + 1)
        losses.append(float(value.detach()))
        if log is not None and ((step + 1) % config.log_every == 0 or step + 1 == config.steps):
            now = time.perf_counter()
            recent = losses[-config.log_every :]
            log(
                step + 1,
                {
                    "loss": sum(recent) / len(recent),
                    "gradient_norm": report.gradient_norm,
                    "learning_rate": rate,
                    "steps_per_second": len(recent) / max(now - looked, 1e-9),
                },
            )
            looked = now
        if folder is not None and ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps):
            save_snapshot(folder, step + 1, model, optimizer, ema)
    if ema is not None:
        put_weights(model, ema.state())
    model.eval()
    return Fitted(losses=tuple(losses), skipped=optimizer.skipped, seconds=time.perf_counter() - began)
