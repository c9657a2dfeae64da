"""How stage II should judge the worth of another loop: what a gate is worth that each label rule has taught.

    python benchmarks/calibration.py [text|hops] [seed=N]    about 4 minutes a seed on one core

text  stage I of the demo's language model; a token that stops does no more work (`last_exited`).
hops  pointer chasing with every loop asked and the gate not taught; only the answers stop, so `per_loop`.

The language model is frozen in stage II, so its states and losses are computed once, and each gate is then taught on
them alone, with the optimiser and the schedule of training. Reported: nats below random mixing of fixed depths (the
chord between fixed 2 and fixed 3) at a mean of 2.5 loops on held-out text, and below 0 where it is above; for hops
also the rank correlation of loops with hops at that mean.
"""

import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _trained import SEEDS, follower, language_model, source, trained
from torch import Tensor

from loopwise.loops.drivers import unroll
from loopwise.models.looped_lm import LoopedLM
from loopwise.objectives.base import LoopPlan, ObjectiveInputs
from loopwise.objectives.calibration import LABEL_RULES, calibration_loss, continuation_labels
from loopwise.objectives.head import token_losses
from loopwise.study.exits import hazard_for, measure_depths, measure_exit, rank_correlation
from loopwise.train.batches import Batch
from loopwise.train.machine import environment
from loopwise.train.optimizers import OptimizerConfig, build_optimizer
from loopwise.train.schedule import ScheduleConfig, multiplier

RESULTS = Path(__file__).parent / "results" / "calibration.json"
MEAN = 2.5
SETTINGS = ((50.0, 0.005), (50.0, 0.05), (10.0, 0.005), (10.0, 0.05), (2.0, 0.005))
"""Sharpness per nat and gamma in nats; the first is the paper's."""
STEPS = {"text": (50, 200), "hops": (400,)}
"""Steps of stage II; the demo's text takes the first."""
ROWS = {"text": (16, 128), "hops": (32, 256)}
"""Sequences per step, and held-out ones."""


@dataclass(frozen=True)
class Seen:
    """One step's counted tokens, as a gate on frozen states finds them."""

    states: Tensor
    """(R, 1, N, D)"""
    losses: Tensor
    """(R, 1, N), nats."""


@torch.no_grad()
def look(model: LoopedLM, batch: Batch) -> Seen:
    context = model.encode(batch.tokens, documents=batch.documents)
    states = unroll(model, context, loops=model.config.loops, collect=("states",)).states
    assert states is not None
    hidden = [model.read(state, context) for state in states]
    losses = token_losses(hidden, model.head_weight, batch.targets, mask=batch.mask).losses
    return Seen(states[:, batch.mask][:, None], losses[:, batch.mask][:, None])


def teach(model: LoopedLM, steps: Sequence[Seen], *, rule: str, sharpness: float, gamma: float) -> None:
    """Stage II, the gate alone."""
    assert model.gate is not None
    plan = LoopPlan(loops=model.config.loops, read="all")
    schedule = ScheduleConfig(warmup=max(1, len(steps) // 10), decay=len(steps) // 2)
    optimizer = build_optimizer(
        [(f"gate.{name}", parameter) for name, parameter in model.gate.named_parameters()], OptimizerConfig()
    )
    for step, seen in enumerate(steps):
        hazards = model.hazard(seen.states)
        assert hazards is not None
        labels = continuation_labels(seen.losses, rule=rule, sharpness=sharpness, gamma=gamma)
        inputs = ObjectiveInputs(plan=plan, mask=torch.ones_like(seen.losses[0], dtype=torch.bool))
        calibration_loss(inputs, hazards, labels).backward()
        optimizer.step(1e-2 * multiplier(schedule, step, len(steps)))
        optimizer.zero_grad()


def judge(model: LoopedLM, task: str, batches: list[Batch]) -> dict[str, float | None]:
    depths = measure_depths(model, batches)
    policy = "last_exited" if task == "text" else "per_loop"
    point = measure_exit(model, batches, hazard_for(depths, MEAN), depths, policy=policy)
    found: dict[str, float | None] = {"mean_loops": point.mean_loops, "loss": point.loss, "gain": point.gain}
    if task == "hops":
        hops = torch.cat([batch.first_loop[batch.mask] for batch in batches if batch.first_loop is not None])
        correlation = rank_correlation(point.loops, hops.numpy())
        found["correlation"] = None if math.isnan(correlation) else correlation
    return found


def measure(task: str, seed: int) -> dict[str, Any]:
    """Every rule and setting on one model."""
    config = language_model(seed) if task == "text" else follower(seed)
    model, data = trained(config), source(config)
    assert model.gate is not None
    rows, held_out = ROWS[task]
    # Batches that stage I has not used.
    used = config.stages[0].steps
    seen = [look(model, data.batch(used + step, 0, rows=rows)) for step in range(max(STEPS[task]))]
    batches = data.validation(held_out)
    untaught = {name: value.clone() for name, value in model.gate.state_dict().items()}
    found: dict[str, Any] = {"stage I": judge(model, task, batches)}
    for rule, (sharpness, gamma), steps in itertools.product(LABEL_RULES, SETTINGS, STEPS[task]):
        model.gate.load_state_dict(untaught)
        teach(model, seen[:steps], rule=rule, sharpness=sharpness, gamma=gamma)
        name = f"{rule} k={sharpness:g} gamma={gamma:g} steps={steps}"
        found[name] = judge(model, task, batches)
        print(f"{task} {seed}  {name:48} {found[name]['gain']:+.4f} at {found[name]['mean_loops']:.2f}", flush=True)
    return found


def main() -> None:
    words = sys.argv[1:]
    seeds = [int(word.removeprefix("seed=")) for word in words if word.startswith("seed=")] or list(SEEDS)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for task in [word for word in words if word in STEPS] or list(STEPS):
        rows = results.setdefault(task, {})
        for seed in seeds:
            rows[str(seed)] = measure(task, seed)
        print(f"\n{task}: nats below random mixing at {MEAN} loops, mean (least to most) over seeds {', '.join(rows)}")
        for name in rows[str(seeds[0])]:
            gains = [row[name]["gain"] for row in rows.values()]
            print(f"{name:48} {statistics.mean(gains):+.4f} ({min(gains):+.4f} to {max(gains):+.4f})")
    results["machine"] = environment()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
