"""A training run, from top to bottom: one readable loop in plain PyTorch.

A step is a pure function of (configuration, step, weights, optimiser state): data order, depths and start states are
addressed by the step's number, so a run that was killed continues to the same bits from its newest checkpoint.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.hub.checkpoints import save as save_model
from loopwise.hub.shards import write_text
from loopwise.models.looped_lm import LoopedLM
from loopwise.objectives.base import Objective
from loopwise.objectives.registry import build_objective
from loopwise.train import checkpoint
from loopwise.train.batches import BatchSource
from loopwise.train.config import StageConfig, TrainConfig
from loopwise.train.ema import Ema
from loopwise.train.guards import GuardMemory, Vitals, inspect
from loopwise.train.machine import environment, matmul_peak
from loopwise.train.metrics import MetricsLog
from loopwise.train.optimizers import Optimizer, build_optimizer, fused_blocks
from loopwise.train.progress import Progress, Status
from loopwise.train.schedule import multiplier
from loopwise.train.setup import Data, build_data, build_model, config_to_dict
from loopwise.train.step import (
    Validation,
    autocast,
    executed_flops,
    micro_batch_loss,
    training_start,
    validate,
)
from loopwise.train.trackers import Tracker, build_trackers


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a finished run left its model."""

    folder: Path
    """The run folder."""
    model: LoopedLM
    """The trained model (averaged weights when the run averages)."""
    validation: Validation
    """The last validation."""


def train(config: TrainConfig, *, progress: Progress | None = None) -> TrainResult:
    """Run, or go on with, the training that `config` describes.

    The run folder gets config.json, environment.json, metrics.jsonl, checkpoints/ and in the end model/. The same
    configuration resumes from the newest whole checkpoint.

    Raises:
        ConfigError: when the folder holds another run, or the configuration makes no sense.
        UserError: for missing or broken data and checkpoints, and for a full disk.
    """
    folder = Path(config.run)
    _claim(folder, config)
    data = build_data(config, cache=folder / "data")
    model = build_model(config, data)
    run = _Run(config, folder, model, data)
    resumed = run.resume()
    trackers = build_trackers(
        config.trackers, folder=folder, project="loopwise", run=folder.name, config=config_to_dict(config)
    )
    shown = progress or Progress()
    with shown, MetricsLog(folder / "metrics.jsonl", resume_step=run.step) as metrics:
        run.outputs = _Outputs(metrics, trackers, shown)
        if resumed:
            shown.note(f"resuming {folder} at step {run.step:,} of {config.steps:,}")
        try:
            for index in range(len(config.stages)):
                run.train_stage(index)
        except KeyboardInterrupt:
            run.save_checkpoint()
            shown.note(f"stopped at step {run.step:,}; type the same command again to go on")
            raise
        finally:
            for tracker in trackers:
                tracker.close()
        return run.finish()


@dataclass
class _Outputs:
    metrics: MetricsLog
    trackers: list[Tracker]
    progress: Progress

    def log(self, values: dict[str, Any], step: int) -> None:
        self.metrics.log(values, step)
        for tracker in self.trackers:
            tracker.log(values, step)


class _Run:
    """A run in progress: what changes from step to step, and how to save and restore it."""

    def __init__(self, config: TrainConfig, folder: Path, model: LoopedLM, data: Data) -> None:
        self.config = config
        self.folder = folder
        self.model = model
        self.data = data
        self.step = 0
        """Optimiser steps completed, over all stages."""
        self.outputs: _Outputs
        self.optimizer: Optimizer | None = None
        self.optimizer_trains = ""
        self.ema = Ema(model.named_parameters(), config.ema) if config.ema is not None else None
        self.guards = GuardMemory()
        self.skipped_before = 0
        self.steps_before = 0
        self.last_validation: Validation | None = None
        self.peak = matmul_peak(_DTYPES[config.dtype], config.device)

    def first_step(self, index: int) -> int:
        """The step at which stage `index` begins."""
        return sum(stage.steps for stage in self.config.stages[:index])

    def train_stage(self, index: int) -> None:
        stage = self.config.stages[index]
        first, last = self.first_step(index), self.first_step(index + 1)
        if self.step >= last:
            return
        objective = build_objective(stage.objective)
        if self.step == first:
            self.prepare_optimizer(objective)
        source = self.data.source(index)
        while self.step < last:
            self.train_step(stage, objective, source, first)
            ended = self.step == last
            if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
                self.validate(source)
            if self.step % self.config.checkpoint_every == 0 or ended:
                self.save_checkpoint()

    def prepare_optimizer(self, objective: Objective) -> None:
        """An optimiser for what the objective trains; moments carry over while that stays the same."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(objective.trains == "model" or name.startswith("gate."))
        if self.optimizer_trains == objective.trains:
            return
        config = self.model.config
        blocks = fused_blocks(
            heads=config.heads, kv_heads=config.kv_heads, head_width=config.head_width, mlp_width=config.mlp_width
        )
        self.optimizer = build_optimizer(
            self.model.named_parameters(), self.config.optimizer, blocks=blocks if objective.trains == "model" else None
        )
        self.optimizer_trains = objective.trains

    def train_step(self, stage: StageConfig, objective: Objective, source: BatchSource, first: int) -> None:
        assert self.optimizer is not None
        began = time.perf_counter()
        config, here = self.config, self.step - first
        progress = here / stage.steps
        rate = stage.learning_rate * multiplier(stage.schedule, here, stage.steps)
        logging = (self.step + 1) % config.log_every == 0 or self.step + 1 == first + stage.steps
        tokens, flops, total = 0, 0.0, 0.0
        figures: list[dict[str, float]] = []
        for micro in range(stage.micro_batches):
            batch = source.batch(here, micro, rows=stage.rows).to(config.device)
            plan = objective.plan(seed=config.seed, step=self.step, micro=micro)
            start = training_start(self.model, batch, seed=config.seed, step=self.step, micro=micro)
            with autocast(config.device, config.dtype):
                result = micro_batch_loss(
                    self.model,
                    batch,
                    objective,
                    plan,
                    progress=progress,
                    start=start,
                    recompute=config.recompute,
                    share=1.0 / stage.micro_batches,
                )
            result.loss.total.backward()
            tokens += batch.tokens.numel()
            flops += executed_flops(
                self.model.config, plan, tokens=batch.tokens.numel(), context=stage.context, trains=objective.trains
            )
            if logging:
                total += float(result.loss.total.detach())
                figures.append(objective.metrics(result.inputs, result.loss.losses))
        report = self.optimizer.step(rate)
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None and not report.skipped:
            self.ema.update(self.step)
        if logging:
            seconds = time.perf_counter() - began
            shown = _mean(figures)
            values = {"stage": stage.name, "loss_total": total, **shown}
            values |= {"gradient_norm": report.gradient_norm, "learning_rate": rate, "skipped": self.optimizer.skipped}
            values["timing"] = {
                "tokens_per_second": tokens / seconds,
                "peak_share": flops / seconds / self.peak,
            }
            self.outputs.log(values, self.step)
            self.outputs.progress.update(
                Status(
                    step=self.step,
                    steps=config.steps,
                    stage=stage.name if len(config.stages) > 1 else None,
                    losses=[value for key, value in shown.items() if key.startswith("loss")],
                    mean_exit=shown.get("exit_loop"),
                    tokens_per_second=tokens / seconds,
                    peak_share=flops / seconds / self.peak,
                    learning_rate=rate,
                    skipped=self.optimizer.skipped,
                )
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the averaged weights in place, when the run averages."""
        if self.ema is None:
            yield
        else:
            with self.ema.applied():
                yield

    def validate(self, source: BatchSource) -> Validation:
        config = self.config
        batches = [batch.to(config.device) for batch in source.validation(config.validation_rows)]
        with self.averaged(), autocast(config.device, config.dtype):
            found = validate(self.model, batches, config.loops_validated())
        self.last_validation = found
        values: dict[str, Any] = {f"validation_loss_loop_{loop}": loss for loop, loss in found.losses.items()}
        values |= {f"validation_accuracy_loop_{loop}": share for loop, share in found.accuracies.items()}
        if self.data.bytes_per_token is not None:
            values |= {
                f"validation_bits_per_byte_loop_{loop}": loss / math.log(2) / self.data.bytes_per_token
                for loop, loss in found.losses.items()
            }
        if found.mean_exit is not None:
            values["validation_exit_loop"] = found.mean_exit
        self.outputs.log(values, self.step)
        losses = " ".join(f"{loop}:{loss:.3f}" for loop, loss in found.losses.items())
        self.outputs.progress.note(f"step {self.step:,} · validation loss by loops {losses}")
        self.look_after(found)
        return found

    def look_after(self, found: Validation) -> None:
        """Warn of the known failures, each with its cure."""
        assert self.optimizer is not None
        anytime = self.model.facts.anytime and tuple(found.losses) == tuple(range(1, len(found.losses) + 1))
        vitals = Vitals(
            correlation=found.correlation,
            losses=list(found.losses.values()) if anytime else None,
            norms=found.norms,
            exits=found.exits,
            steps=self.step - self.steps_before,
            skipped=self.optimizer.skipped - self.skipped_before,
        )
        seen = inspect(vitals, step=self.step, config=self.config.guards, memory=self.guards)
        self.guards = seen.memory
        self.steps_before, self.skipped_before = self.step, self.optimizer.skipped
        for name, message in seen.warnings.items():
            self.outputs.log({"warning": name, "message": message}, self.step)
            self.outputs.progress.note(f"warning: {message}")

    def save_checkpoint(self) -> None:
        if self.optimizer is None:
            return
        self.outputs.metrics.sync()
        flat = checkpoint.flatten(self.optimizer.state(), "optimizer")
        tensors: dict[str, Tensor] = {f"model/{name}": p.detach() for name, p in self.model.named_parameters()}
        tensors |= flat.tensors
        average = checkpoint.flatten(self.ema.state() if self.ema is not None else {}, "ema")
        tensors |= average.tensors
        meta = {
            "optimizer": flat.skeleton,
            "ema": average.skeleton,
            "trains": self.optimizer_trains,
            "guards": dict(self.guards.spoken),
            "seen": [self.steps_before, self.skipped_before],
            "data": self.data.identity(),
        }
        checkpoint.save(
            self.folder / "checkpoints", self.step, tensors, meta, keep=self.config.keep_checkpoints
        )

    def resume(self) -> bool:
        """Take over the newest whole checkpoint; False when there is none."""
        found = checkpoint.newest(self.folder / "checkpoints", device=self.config.device)
        if found is None:
            return False
        if found.meta["data"] != self.data.identity():
            raise ConfigError(
                f"the data of {self.folder} has changed since its checkpoint at step {found.step}; "
                "restore the corpus, or start a new run with run=OTHER_FOLDER"
            )
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(found.tensors[f"model/{name}"])
        self.step = found.step
        stage = next(i for i in range(len(self.config.stages)) if self.step <= self.first_step(i + 1))
        objective = build_objective(self.config.stages[stage].objective)
        self.optimizer_trains = ""
        self.prepare_optimizer(objective)
        assert self.optimizer is not None
        self.optimizer.load_state(checkpoint.unflatten(found.tensors, found.meta["optimizer"]))
        if self.ema is not None:
            self.ema.load_state(checkpoint.unflatten(found.tensors, found.meta["ema"]))
        self.guards = GuardMemory(spoken=found.meta["guards"])
        self.steps_before, self.skipped_before = found.meta["seen"]
        return True

    def finish(self) -> TrainResult:
        """Write the model that the run was for."""
        last = len(self.config.stages) - 1
        if self.last_validation is None:
            self.prepare_optimizer(build_objective(self.config.stages[last].objective))
            self.validate(self.data.source(last))
        assert self.last_validation is not None
        with self.averaged(), torch.no_grad():
            final = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(final[name])
                parameter.requires_grad_(True)
        save_model(self.model, self.folder / "model")
        self.outputs.progress.note(f"saved {self.folder / 'model'}")
        return TrainResult(folder=self.folder, model=self.model.eval(), validation=self.last_validation)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _mean(figures: list[dict[str, float]]) -> dict[str, float]:
    """Each figure's mean over the micro-batches that have it."""
    names = dict.fromkeys(name for each in figures for name in each)
    return {name: sum(f[name] for f in figures if name in f) / sum(name in f for f in figures) for name in names}


def _claim(folder: Path, config: TrainConfig) -> None:
    """Make the folder this run's, or see that it is."""
    wanted = config_to_dict(config)
    path = folder / "config.json"
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in wanted.keys() | held.keys() if wanted.get(key) != held.get(key))
        if different:
            raise ConfigError(
                f"{folder} holds another run (it differs in {', '.join(different)}); give run=OTHER_FOLDER, or the "
                "same settings to go on with it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "environment.json", json.dumps(environment(config.device), indent=2) + "\n")
    write_text(path, json.dumps(wanted, indent=2) + "\n")
