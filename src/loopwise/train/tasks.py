"""A looped language model trained on problems made in code, and asked them: tokens in, answers at the places asked.

The loop is `fit`'s, the loss any objective's over loops:

    model = train_on_problems(config, task, objective, fit_config, rows=64, seed=0)
    right = answer(model, task.draw(1, numbers(0, 1000)), loops=4).right

Axes: R loops, N problems, P places (the tokens of a row).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.loops.drivers import unroll
from loopwise.loops.protocol import select
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM, initialise
from loopwise.nn.attention import CausalMemory, Memory
from loopwise.nn.noise import integer
from loopwise.objectives.base import Objective
from loopwise.tasks.problems import IGNORED, Problems, Task, numbers
from loopwise.train.batches import Batch
from loopwise.train.fit import Batches, FitConfig, Loss, fit
from loopwise.train.step import micro_batch_loss, training_start


def as_batch(problems: Problems, first_loop: Int[Tensor, "problems places"] | None = None) -> Batch:
    """Problems whose inputs are token ids (N, P), as a batch whose loss counts where something is asked."""
    asked = problems.targets != IGNORED
    return Batch(
        tokens=problems.inputs,
        targets=torch.where(asked, problems.targets, 0),
        documents=torch.zeros_like(problems.inputs),
        mask=asked,
        first_loop=first_loop,
    )


def whole_sequence(problems: Problems) -> Memory:
    """Attention in which every token reads every other one, before it and after it: for inputs that are sets."""
    places = problems.inputs.shape[1]
    return CausalMemory(torch.zeros(1, 1, places, places, device=problems.inputs.device))


def problem_batches(
    tasks: Callable[[int], Task], *, seed: int, rows: int, device: str | torch.device = "cpu"
) -> Batches:
    """New problems at every step, `rows` of them.

    Args:
        tasks: the task to draw from at a step; a constant, or a curriculum.
        seed: of the training problems.
    """

    def batch(step: int) -> Problems:
        drawn = tasks(step).draw(integer(seed, "training problems"), numbers(step * rows, rows))
        return dataclasses.replace(drawn, inputs=drawn.inputs.to(device), targets=drawn.targets.to(device))

    return batch


def problem_loss(
    model: LoopedLM,
    objective: Objective,
    *,
    seed: int,
    steps: int,
    memory: Callable[[Problems], Memory] | None = None,
    first_loop: Callable[[Problems], Int[Tensor, "problems places"]] | None = None,
) -> Loss:
    """An objective's loss of one batch of problems, for `fit`.

    Args:
        seed: of depths and start states.
        steps: of the whole fit, for objectives with a schedule.
        memory: what may read what, such as `whole_sequence`; by default each token reads what stands before it.
        first_loop: from which loop on each place's loss counts; by default from the first.
    """

    def loss(problems: Problems, step: int) -> Tensor:
        batch = as_batch(problems, None if first_loop is None else first_loop(problems))
        return micro_batch_loss(
            model,
            batch,
            objective,
            objective.plan(seed=seed, step=step, micro=0),
            progress=step / steps,
            start=training_start(model, batch, seed=seed, step=step, micro=0),
            memory=None if memory is None else memory(problems),
        ).loss.total

    return loss


def train_on_problems(
    config: LoopedLMConfig,
    task: Task | Callable[[int], Task],
    objective: Objective,
    fit_config: FitConfig,
    *,
    rows: int,
    seed: int,
    device: str = "cpu",
    memory: Callable[[Problems], Memory] | None = None,
    first_loop: Callable[[Problems], Int[Tensor, "problems places"]] | None = None,
    checkpoints: str | Path | None = None,
    log: Callable[[int, Mapping[str, float]], None] | None = None,
) -> LoopedLM:
    """A new model, trained.

    Args:
        task: what to learn, or the task of each step.
        rows: problems per step.
        seed: of the weights, of the problems, and of what the objective draws.
        memory, first_loop: see `problem_loss`.
        checkpoints, log: see `fit`.
    """
    tasks = (lambda step: task) if isinstance(task, Task) else task
    model = LoopedLM(config)
    initialise(model, seed=seed)
    model.to(device)
    loss = problem_loss(model, objective, seed=seed, steps=fit_config.steps, memory=memory, first_loop=first_loop)
    batches = problem_batches(tasks, seed=seed, rows=rows, device=device)
    fit(model, loss, batches, fit_config, checkpoints=checkpoints, log=log)
    return model


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says after every loop."""

    answers: Int[Tensor, "loops problems places"]
    """The likeliest class at every place."""
    losses: Float[Tensor, "loops problems"]
    """Cross-entropy in nats, the mean over the places that are asked."""
    right: Bool[Tensor, "loops problems"]
    """Whether every place that is asked is right; a task's `verify` may know of other right answers."""
    hazards: Float[Tensor, "loops problems places"] | None
    """The gate's chance of stopping; None without a gate."""


@torch.no_grad()
def answer(
    model: LoopedLM,
    problems: Problems,
    *,
    loops: int,
    rows: int = 256,
    memory: Callable[[Problems], Memory] | None = None,
) -> Answers:
    """Ask a model problems and read it out after every loop; `rows` at once."""
    answers, losses, hazards = [], [], []
    for first in range(0, len(problems), rows):
        part: Problems = select(problems, torch.arange(first, min(first + rows, len(problems))))
        context = model.encode(part.inputs, memory=None if memory is None else memory(part))
        out = unroll(model, context, loops=loops, collect=("logits", "signals"))
        assert out.logits is not None
        asked = part.targets != IGNORED
        nats = torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 2).float(),
            part.targets.expand(loops, -1, -1).flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view(loops, *part.targets.shape)
        answers.append(out.logits.argmax(-1))
        losses.append(nats.sum(-1) / asked.sum(-1))
        if out.signals is not None:
            hazards.append(out.signals)
    said = torch.cat(answers, dim=1)
    return Answers(
        answers=said,
        losses=torch.cat(losses, dim=1),
        right=((said == problems.targets) | (problems.targets == IGNORED)).all(-1),
        hazards=torch.cat(hazards, dim=1) if hazards else None,
    )
