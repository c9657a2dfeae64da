"""A training run, from top to bottom: one readable loop in plain PyTorch.

A step is a pure function of (configuration, step, weights, optimiser state): data order, depths and start states are
addressed by the step's number, so a run that was killed continues to the same bits from its newest checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loopwise.errors import CheckpointError, ConfigError
from loopwise.hub.checkpoints import save as save_model
from loopwise.models.looped_lm import LoopedLM
from loopwise.objectives.base import Objective
from loopwise.train import checkpoint
from loopwise.train.batches import BatchSource
from loopwise.train.config import StageConfig, TrainConfig
from loopwise.train.ema import Ema
from loopwise.train.folder import check_owner, claim, locked
from loopwise.train.guards import GuardMemory, Vitals, inspect
from loopwise.train.interrupt import Interrupt, held_back
from loopwise.train.machine import keep_freed_memory, matmul_peak
from loopwise.train.optimizers import Optimizer, build_optimizer, fused_blocks
from loopwise.train.outputs import Figures, Outputs, Stopwatch, open_outputs
from loopwise.train.progress import Progress
from loopwise.train.schedule import multiplier
from loopwise.train.setup import Data, build_data, build_model
from loopwise.train.step import autocast, executed_flops, micro_batch_loss, plan_step, training_start
from loopwise.train.validation import Validation, validate


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a finished run left its model."""

    folder: Path
    """The run folder; the model is saved in its `model`."""
    model: LoopedLM
    """The trained model (averaged weights when the run averages)."""
    validation: Validation
    """The last validation."""


def train(config: TrainConfig, *, progress: Progress | None = None) -> TrainResult:
    """Run, or go on with, the training that `config` describes.

    The run folder gets config.json, environment.json, metrics.jsonl, checkpoints/ and in the end model/. The same
    configuration resumes from the newest whole checkpoint. On a CPU under Linux the process keeps the memory that it
    frees (see `keep_freed_memory`).

    Raises:
        ConfigError: when the folder holds another run, or the configuration makes no sense.
        UserError: for missing or broken data and checkpoints, and for a full disk.
        KeyboardInterrupt: after Ctrl-C; the steps so far are saved.
    """
    folder = Path(config.run)
    check_owner(folder, config)
    if config.device == "cpu":
        keep_freed_memory()
    with locked(folder):
        data = build_data(config, cache=folder / "data")
        model = build_model(config, data)
        claim(folder, config)
        run = _Run(config, folder, model, data)
        resumed = run.resume()
        shown = progress or Progress()
        with open_outputs(config, folder, shown, step=run.step) as run.outputs, held_back() as interrupt:
            if resumed:
                shown.note(f"resuming {folder} at step {run.step:,} of {config.steps:,}")
            for index in range(len(config.stages)):
                run.train_stage(index, interrupt)
            if interrupt.wanted:
                run.save_checkpoint()
                shown.note(f"stopped at step {run.step:,}; type the same command again to go on")
                raise KeyboardInterrupt
            return run.finish()


class _Run:
    """A run in progress: what changes from step to step, and how to save and restore it."""

    outputs: Outputs

    def __init__(self, config: TrainConfig, folder: Path, model: LoopedLM, data: Data) -> None:
        self.config = config
        self.folder = folder
        self.model = model
        self.data = data
        self.step = 0
        """Optimiser steps completed, over all stages."""
        self.skipped = 0
        """Of those, steps whose gradients were not finite."""
        self.optimizer: Optimizer | None = None
        self.optimizer_trains = ""
        self.ema = Ema(model.named_parameters(), config.ema) if config.ema is not None else None
        self.guards = GuardMemory()
        self.looked_at = (0, 0)
        """`step` and `skipped` when the guards last looked."""
        self.last_validation: Validation | None = None
        self.clock = Stopwatch(matmul_peak(_DTYPES[config.dtype], config.device))

    def train_stage(self, index: int, interrupt: Interrupt) -> None:
        config, stage = self.config, self.config.stages[index]
        first, last = config.first_step(index), config.first_step(index + 1)
        objective, source = stage.learns(), self.data.source(index)
        if self.step == first and not interrupt.wanted:
            self.begin_stage(objective)
        while self.step < last and not interrupt.wanted:
            self.train_step(stage, objective, source, first)
            if self.step % config.validate_every == 0 or self.step == config.steps:
                self.validate(source)
            if self.step % config.checkpoint_every == 0 or self.step == last:
                self.save_checkpoint()

    def begin_stage(self, objective: Objective) -> None:
        """Moments and averages carry over while the same parameters are trained."""
        if self.optimizer is not None and self.optimizer_trains == objective.trains:
            return
        if self.optimizer is not None and self.ema is not None:
            # What was averaged is now held still, so the average is what the next stage must learn beside.
            with torch.no_grad(), self.averaged():
                settled = {name: parameter.clone() for name, parameter in self.model.named_parameters()}
            self.put(settled)
            self.ema = Ema(self.model.named_parameters(), self.ema.config)
        self.prepare_optimizer(objective)

    def prepare_optimizer(self, objective: Objective) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(objective.trains == "model" or name.startswith("gate."))
        shape = self.model.config
        blocks = fused_blocks(
            heads=shape.heads, kv_heads=shape.kv_heads, head_width=shape.head_width, mlp_width=shape.mlp_width
        )
        self.optimizer = build_optimizer(self.model.named_parameters(), self.config.optimizer, blocks=blocks)
        self.optimizer_trains = objective.trains

    def train_step(self, stage: StageConfig, objective: Objective, source: BatchSource, first: int) -> None:
        assert self.optimizer is not None
        self.clock.start()
        config, here = self.config, self.step - first
        rate = stage.learning_rate * multiplier(stage.schedule, here, stage.steps)
        logging = (self.step + 1) % config.log_every == 0 or here + 1 == stage.steps
        figures, tokens, flops = Figures(), 0, 0.0
        batches = [source.batch(here, micro, rows=stage.rows) for micro in range(stage.micro_batches)]
        for micro, work in enumerate(plan_step(objective, batches, seed=config.seed, step=self.step)):
            batch = work.batch.to(config.device)
            with autocast(config.device, config.dtype):
                result = micro_batch_loss(
                    self.model,
                    batch,
                    objective,
                    work.plan,
                    progress=here / stage.steps,
                    start=training_start(self.model, batch, seed=config.seed, step=self.step, micro=micro),
                    recompute=config.recompute,
                    share=work.share,
                )
            torch.autograd.backward(result.loss.total)
            size, length = batch.tokens.numel(), batch.tokens.shape[1]
            tokens += size
            flops += executed_flops(self.model.config, work.plan, tokens=size, context=length, trains=objective.trains)
            if logging:
                found = objective.metrics(result.inputs, result.loss.losses)
                figures.add(found, loops=work.plan.loops, share=work.share)
                figures.total += float(result.loss.total.detach())
        report = self.optimizer.step(rate)
        self.optimizer.zero_grad()
        self.step += 1
        self.skipped += report.skipped
        if self.ema is not None and not report.skipped:
            self.ema.update(self.step)
        self.clock.stop(tokens=tokens, flops=flops)
        if logging:
            values = {"stage": stage.name, "loss_total": figures.total, **figures.means()}
            values |= {"gradient_norm": report.gradient_norm, "learning_rate": rate, "skipped": self.skipped}
            self.outputs.trained(values, self.clock.look(), self.step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the averaged weights in place, when the run averages."""
        if self.ema is None:
            yield
        else:
            with self.ema.applied():
                yield

    def measure(self, source: BatchSource) -> Validation:
        config = self.config
        batches = [batch.to(config.device) for batch in source.validation(config.validation_rows)]
        with self.averaged(), autocast(config.device, config.dtype):
            return validate(self.model, batches, config.loops_validated())

    def validate(self, source: BatchSource) -> None:
        """Measure, write it down, and warn of the known failures, each with its cure."""
        found = self.last_validation = self.measure(source)
        self.outputs.validated(found, self.step, bytes_per_token=self.data.bytes_per_token)
        losses, (steps_before, skipped_before) = found.losses, self.looked_at
        # On questions that are asked from some loop on, every loop answers a set of its own: nothing to compare.
        every_loop = tuple(losses) == tuple(range(1, len(losses) + 1)) and self.config.task == "text"
        vitals = Vitals(
            correlation=found.correlation,
            losses=list(losses.values()) if self.model.facts.anytime and every_loop else None,
            norms=found.norms,
            exits=found.exits,
            steps=self.step - steps_before,
            skipped=self.skipped - skipped_before,
        )
        seen = inspect(vitals, step=self.step, config=self.config.guards, memory=self.guards)
        self.guards, self.looked_at = seen.memory, (self.step, self.skipped)
        for name, message in seen.warnings.items():
            self.outputs.warn(name, message, self.step)

    def save_checkpoint(self) -> None:
        if self.optimizer is None:
            return
        # A checkpoint must never be ahead of the metrics that led to it.
        self.outputs.metrics.sync()
        optimizer = checkpoint.flatten(self.optimizer.state(), "optimizer")
        average = checkpoint.flatten(self.ema.state() if self.ema is not None else {}, "ema")
        weights = {f"model/{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        meta = {
            "optimizer": optimizer.skeleton,
            "ema": average.skeleton,
            "skipped": self.skipped,
            "guards": dict(self.guards.spoken),
            "looked_at": self.looked_at,
            "data": self.data.identity(),
        }
        tensors = {**weights, **optimizer.tensors, **average.tensors}
        checkpoint.save(self.folder / "checkpoints", self.step, tensors, meta, keep=self.config.keep_checkpoints)

    def resume(self) -> bool:
        """Take over the newest whole checkpoint; False when there is none."""
        folder = self.folder / "checkpoints"
        found = checkpoint.newest(folder, device=self.config.device)
        if found is None:
            if checkpoint.steps(folder):
                raise CheckpointError(
                    f"every checkpoint in {folder} is broken; mend one, or remove that folder to train from step 0"
                )
            return False
        if found.meta["data"] != self.data.identity():
            raise ConfigError(
                f"the data of {self.folder} has changed since its checkpoint at step {found.step}; "
                "restore the corpus, or start a new run with run=OTHER_FOLDER"
            )
        self.step, self.skipped = found.step, found.meta["skipped"]
        self.put({name: found.tensors[f"model/{name}"] for name, _ in self.model.named_parameters()})
        stages = range(len(self.config.stages))
        stage = next(i for i in stages if self.step <= self.config.first_step(i + 1))
        self.prepare_optimizer(self.config.stages[stage].learns())
        assert self.optimizer is not None
        self.optimizer.load_state(checkpoint.unflatten(found.tensors, found.meta["optimizer"]))
        if self.ema is not None:
            self.ema.load_state(checkpoint.unflatten(found.tensors, found.meta["ema"]))
        self.guards = GuardMemory(spoken=found.meta["guards"])
        self.looked_at = tuple(found.meta["looked_at"])
        return True

    def put(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])

    def finish(self) -> TrainResult:
        """Write the model that the run was for."""
        validation = self.last_validation or self.measure(self.data.source(len(self.config.stages) - 1))
        with self.averaged(), torch.no_grad():
            final = {name: parameter.clone() for name, parameter in self.model.named_parameters()}
        self.put(final)
        self.model.requires_grad_(True)
        save_model(self.model, self.folder / "model")
        self.outputs.progress.note(f"saved {self.folder / 'model'}")
        return TrainResult(folder=self.folder, model=self.model.eval(), validation=validation)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
