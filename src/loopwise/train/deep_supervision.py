"""Deep supervision with a batch that never ends (HRM, arXiv 2506.21734, section 2; TRM, arXiv 2510.04871, section 4).

A batch is a table of slots. In each optimiser step every slot runs one loop from where it stands and the loss is taken
right after it; then the state is cut from the graph and kept. A slot whose sample is done (its halting logit is
positive, or it has had all its loops) takes the next problem of the task, so samples of all ages learn side by side and
easy ones do not wait for hard ones.

Everything is a function of (seed, step, slot) or of (seed, problem number), and the states travel with the checkpoint:
a run that was killed continues to the same bits.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopwise.errors import CheckpointError, ConfigError
from loopwise.loops.protocol import LoopModel, leaves, scatter, select, tree_map
from loopwise.models.trm import TRM
from loopwise.nn.noise import uniform
from loopwise.objectives.deep_supervision import SegmentLoss, going_on_target, segment_loss
from loopwise.tasks.problems import Task
from loopwise.tasks.problems import numbers as problem_numbers
from loopwise.train.ema import Ema, EmaConfig
from loopwise.train.optimizers import Optimizer, OptimizerConfig, build_optimizer
from loopwise.train.schedule import ScheduleConfig, multiplier
from loopwise.train.snapshots import newest_snapshot, put_weights, save_snapshot, take_over


@dataclass(frozen=True, kw_only=True)
class SupervisionConfig:
    """How a model learns under deep supervision. The defaults that are not sizes are TRM's."""

    steps: int
    """Optimiser steps in all; each runs one loop of every slot."""
    batch: int
    """Slots."""
    max_loops: int = 16
    """Loops after which a sample leaves in any case."""
    explore: float = 0.1
    """Chance, drawn anew for each slot and step, that a halting logit counts only from a random loop between 2 and
    `max_loops` on."""
    seed: int = 0
    """Of the problems and of exploration."""
    learning_rate: float = 1e-4
    """The schedule's peak."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(kind="constant"))
    """How the rate moves from step to step."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(betas=(0.9, 0.95), weight_decay=1.0, clip=None)
    )
    """What moves the weights. The authors use AdamATan2, which AdamW comes near."""
    ema: EmaConfig | None = field(default_factory=lambda: EmaConfig(decay=0.999))
    """Average the weights; the model leaves with the average in it."""
    log_every: int = 50
    """Steps between two calls of `log`."""
    checkpoint_every: int = 500
    """Steps between two checkpoints, where a folder for them is given."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "max_loops", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: use 1 or more")
        if not 0.0 <= self.explore <= 1.0:
            raise ConfigError(f"explore={self.explore}: use a chance from 0 to 1, such as 0.1")
        if self.explore and self.max_loops < 2:
            raise ConfigError(f"explore={self.explore} has no effect with max_loops={self.max_loops}; use explore=0")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate}: use a number above 0, such as 1e-4")


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """What a run did."""

    losses: tuple[float, ...]
    """Total loss of every step that ran here; a resumed run has those since its checkpoint."""
    samples: int
    """Samples that left their slot since step 0."""
    loops: float
    """Mean loops of those samples; NaN when there are none."""
    skipped: int
    """Steps skipped because a gradient was not finite."""
    seconds: float
    """Wall time spent here."""


@dataclass(frozen=True, kw_only=True)
class Advance:
    """One loop of every slot."""

    loss: SegmentLoss
    right: Bool[Tensor, " batch"]
    """Which slots' answers are right now."""
    left: Int[Tensor, " left"]
    """Loops of the samples that are done."""


class Slots:
    """The batch: which problem each slot works on, for how many loops by now, and its state."""

    def __init__(self, model: LoopModel, task: Task, config: SupervisionConfig) -> None:
        if model.facts.unit != "sample" or model.facts.signal != "halt_logit" or model.facts.loop_dependent:
            raise ConfigError(
                f"deep supervision mixes samples of all ages and halts them by a logit; {type(model).__name__} has "
                f"unit={model.facts.unit}, signal={model.facts.signal}, loop_dependent={model.facts.loop_dependent}"
            )
        self.model, self.task, self.config = model, task, config
        self.numbers = problem_numbers(0, config.batch)
        """Problem in each slot."""
        self.problems = task.draw(config.seed, self.numbers)
        self.ages = torch.zeros(config.batch, dtype=torch.long)
        """Loops that each slot's sample has had."""
        self.next_number = config.batch
        with torch.no_grad():
            self.state: Any = tree_map(torch.clone, model.initial_state(model.encode(self._inputs())))
        self.samples = self.loops = 0

    def advance(self, step: int) -> Advance:
        """Run one loop in every slot and take the loss after it; samples that are done make room for the next.

        Args:
            step: counted from 0; exploration is drawn for it.
        """
        model, config = self.model, self.config
        device = self._device()
        context = model.encode(self._inputs())
        state = tree_map(torch.clone, self.state)
        fresh = (self.ages == 0).nonzero().flatten().to(device)
        if len(fresh):
            scatter(state, select(model.initial_state(context), fresh), fresh)
        state = model.step(state, context, 1)
        prediction = model.readout(state, context)
        signal = model.signal(state, prediction)
        if signal is None:
            raise ConfigError(f"{type(model).__name__} gives no signal after all; return a halting logit per sample")
        right = self.task.verify(self.problems, prediction.detach().argmax(-1).cpu())
        self.ages += 1
        last = self.ages >= config.max_loops
        kept = tree_map(torch.detach, state)
        targets = self.problems.targets.to(device)
        if isinstance(model, TRM) and model.config.halts == "over-continue":
            halt, go_on = model.halting(state).unbind(-1)
            with torch.no_grad():
                goals = going_on_target(model.halting(model.step(kept, context.detach(), 1)), last.to(device))
            loss = segment_loss(prediction, targets, right.to(device), halt, (go_on, goals))
        else:
            loss = segment_loss(prediction, targets, right.to(device), signal)
        done = last | ((signal.detach() > 0).cpu() & (self.ages >= self._least_loops(step)))
        left = self.ages[done]
        self.state = kept
        self._refill(done.nonzero().flatten())
        self.samples += len(left)
        self.loops += int(left.sum())
        return Advance(loss=loss, right=right, left=left)

    def carry(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything that goes on from step to step, for a checkpoint."""
        tensors = {"numbers": self.numbers, "ages": self.ages}
        tensors |= {f"state/{index}": leaf for index, leaf in enumerate(leaves(self.state))}
        return tensors, {"next_number": self.next_number, "samples": self.samples, "loops": self.loops}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Take over what `carry` gave; the problems are drawn again.

        Raises:
            CheckpointError: when it is of another model or batch.
        """
        mine, _ = self.carry()
        different = [
            name
            for name in sorted(mine.keys() | tensors.keys())
            if name not in mine or name not in tensors or mine[name].shape != tensors[name].shape
        ]
        if different:
            raise CheckpointError(
                f"the checkpoint's batch is of another shape ({', '.join(different[:3])}); resume with the same model "
                "and batch, or remove the folder"
            )
        self.numbers, self.ages = tensors["numbers"].clone(), tensors["ages"].clone()
        kept = iter([tensors[f"state/{index}"] for index in range(len(leaves(self.state)))])
        self.state = tree_map(lambda leaf: next(kept).to(leaf.device, copy=True), self.state)
        self.next_number, self.samples, self.loops = (counters[k] for k in ("next_number", "samples", "loops"))
        self.problems = self.task.draw(self.config.seed, self.numbers)

    def _refill(self, slots: Int[Tensor, " done"]) -> None:
        if not len(slots):
            return
        numbers = problem_numbers(self.next_number, len(slots))
        self.next_number += len(slots)
        drawn = self.task.draw(self.config.seed, numbers)
        # A copy: the backward pass still needs the inputs of this step.
        self.problems = tree_map(torch.clone, self.problems)
        scatter(self.problems, drawn, slots)
        self.numbers[slots] = numbers
        self.ages[slots] = 0

    def _least_loops(self, step: int) -> Int[Tensor, " batch"]:
        config = self.config
        slots, here = torch.arange(config.batch), torch.tensor(step)
        explores = uniform(config.seed, "explore", here, slots) < config.explore
        drawn = 2 + (uniform(config.seed, "least loops", here, slots) * (config.max_loops - 1)).long()
        return torch.where(explores, drawn, 1)

    def _inputs(self) -> Any:
        device = self._device()
        return tree_map(lambda tensor: tensor.to(device), self.problems.inputs)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def supervise(
    model: LoopModel,
    task: Task,
    config: SupervisionConfig,
    *,
    checkpoints: str | Path | None = None,
    log: Callable[[int, Mapping[str, float]], None] | None = None,
) -> Supervised:
    """Train `model` in place on the problems of `task`; it is in eval mode afterwards.

    Args:
        checkpoints: folder to write checkpoints to and to resume from, exactly; None keeps nothing.
        log: called with the steps done and {"loss", "answer_loss", "halting_loss", "right", "loops", "learning_rate",
            "steps_per_second"}: `right` is the share of slots whose answer is right, `loops` the mean loops of samples
            that left (NaN when none did), both over the steps since the last call.

    Raises:
        ConfigError: when the model's units are not samples that halt by a logit, or its loops differ.
        CheckpointError: when the folder holds checkpoints of another model or batch, or only broken ones.
    """
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    ema = Ema(model.named_parameters(), config.ema) if config.ema is not None else None
    slots = Slots(model, task, config)
    folder = None if checkpoints is None else Path(checkpoints)
    done = 0 if folder is None else _resume(folder, model, optimizer, ema, slots)
    losses: list[float] = []
    recent: list[tuple[float, float, float, float]] = []
    began = looked = time.perf_counter()
    samples, loops = slots.samples, slots.loops
    model.train()
    for step in range(done, config.steps):
        advance = slots.advance(step)
        total = advance.loss.total
        torch.autograd.backward(total)
        rate = config.learning_rate * multiplier(config.schedule, step, config.steps)
        report = optimizer.step(rate)
        optimizer.zero_grad()
        if ema is not None and not report.skipped:
            ema.update(step + 1)
        losses.append(float(total.detach()))
        recent.append((
            losses[-1], float(advance.loss.answer.detach()), float(advance.loss.halting.detach()),
            float(advance.right.double().mean()),
        ))  # fmt: skip
        if log is not None and ((step + 1) % config.log_every == 0 or step + 1 == config.steps):
            now, count = time.perf_counter(), len(recent)
            names = ("loss", "answer_loss", "halting_loss", "right")
            values = {name: sum(column) / count for name, column in zip(names, zip(*recent, strict=True), strict=True)}
            left = slots.samples - samples
            values["loops"] = (slots.loops - loops) / left if left else float("nan")
            values |= {"learning_rate": rate, "steps_per_second": count / max(now - looked, 1e-9)}
            log(step + 1, values)
            looked, samples, loops = now, slots.samples, slots.loops
            recent.clear()
        if folder is not None and ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps):
            _save(folder, step + 1, model, optimizer, ema, slots)
    if ema is not None:
        put_weights(model, ema.state())
    model.eval()
    return Supervised(
        losses=tuple(losses),
        samples=slots.samples,
        loops=slots.loops / slots.samples if slots.samples else float("nan"),
        skipped=optimizer.skipped,
        seconds=time.perf_counter() - began,
    )


def _save(folder: Path, step: int, model: LoopModel, optimizer: Optimizer, ema: Ema | None, slots: Slots) -> None:
    carried, counters = slots.carry()
    tensors = {f"slots/{name}": tensor for name, tensor in carried.items()}
    save_snapshot(folder, step, model, optimizer, ema, tensors=tensors, meta={"slots": counters})


def _resume(folder: Path, model: LoopModel, optimizer: Optimizer, ema: Ema | None, slots: Slots) -> int:
    found = newest_snapshot(folder)
    if found is None:
        return 0
    if "slots" not in found.meta:
        raise CheckpointError(f"the checkpoints in {folder} are of a run without deep supervision; give another folder")
    take_over(found, model, optimizer, ema)
    carried = {name.removeprefix("slots/"): t for name, t in found.tensors.items() if name.startswith("slots/")}
    slots.restore(carried, found.meta["slots"])
    return found.step
