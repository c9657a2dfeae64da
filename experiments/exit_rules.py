"""Stage II against the other exit rules, and a uniform against a geometric prior over loops.

python experiments/exit_rules.py [--setting small|full] [--seeds 0,1,2]

Axes: R loops, M mean loops of the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _exit_tables import (
    FIRST,
    GRID,
    LOOPS,
    MIDDLE,
    ORACLE,
    SECOND,
    UNIFORM,
    UNTRAINED,
    WRITTEN,
    Told,
    best_untrained,
    drawn,
    named,
    priors_table,
    rules_table,
    shown,
    stages_table,
)
from _intervals import Interval
from _lab import RUNS, Cell, Experiment, Page, Results, run
from jaxtyping import Float
from torch import Tensor, nn

from loopwise.loops.hazard import entropy, exit_distribution, mean_exit_loop
from loopwise.models.looped_lm import LoopedLM
from loopwise.objectives.base import Objective
from loopwise.objectives.calibration import Calibration
from loopwise.objectives.expected import ExpectedLoss
from loopwise.study.examples import Examples, of_text
from loopwise.study.exit_curves import ExitCurves, exits
from loopwise.study.exits import Depths, hazard_for, measure_exit
from loopwise.study.record import Record, record
from loopwise.tasks.corpus import Corpus
from loopwise.train.batches import Batch, BatchSource
from loopwise.train.config import StageConfig
from loopwise.train.fit import FitConfig, fit
from loopwise.train.optimizers import OptimizerConfig
from loopwise.train.presets import TextDials, ouro_tiny
from loopwise.train.setup import build_data, build_model
from loopwise.train.step import micro_batch_loss


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes."""

    corpus_bytes: int | None
    vocabulary: int
    width: int
    layers: int
    rows: int
    context: int
    steps: int
    """Of both stages; a tenth is stage II."""
    optimizer: str
    learning_rate: float
    beta: float
    priors: tuple[float, ...]
    """Hazards of the geometric priors, rising."""
    units: int
    """Held-out tokens that are asked."""


SETTINGS = {
    "small": Setting(
        corpus_bytes=8_000_000,
        vocabulary=1024,
        width=128,
        layers=1,
        rows=4,
        context=128,
        steps=400,
        optimizer="muon",
        learning_rate=6e-3,
        beta=0.1,
        priors=(0.3, 0.7),
        units=16_384,
    ),
    "full": Setting(
        corpus_bytes=None,
        vocabulary=8192,
        width=512,
        layers=6,
        rows=32,
        context=512,
        steps=10_000,
        optimizer="muon",
        learning_rate=3e-3,
        beta=0.1,
        priors=(0.1, 0.5, 0.9),
        units=65_536,
    ),
}


def variants(setting: Setting) -> list[str]:
    """The priors of stage I."""
    return [UNIFORM, *(f"geometric {prior}" for prior in setting.priors)]


def stage_one(setting: Setting, variant: str) -> ExpectedLoss:
    """What language model and gate learn in stage I."""
    prior = float(variant.split()[1]) if variant.startswith("geometric") else None
    return ExpectedLoss(loops=LOOPS, beta=setting.beta, prior=prior)


def measure(cell: Cell) -> dict[str, Any]:
    """Stage I; then every rule, and stage II of the gate on the frozen model, on the same held-out tokens."""
    setting: Setting = cell.setting
    dials = TextDials(
        loops=LOOPS,
        width=setting.width,
        layers=setting.layers,
        rows=setting.rows,
        context=setting.context,
        steps=setting.steps,
        tokenizer=f"bpe:{setting.vocabulary}",
        seed=cell.seed,
    )
    preset = ouro_tiny(dials).config
    objective = stage_one(setting, cell.variant)
    first = replace(preset.stages[0], objective=str(objective), learning_rate=setting.learning_rate)
    second = preset.stages[1]
    config = replace(preset, stages=(first, second), corpus_bytes=setting.corpus_bytes, device=cell.device)
    data = build_data(config, cache=RUNS / "exit_rules" / "data")
    assert data.tokenizer is not None
    model = build_model(config, data)
    _teach(
        model,
        model,
        objective,
        first,
        data.source(0),
        cell,
        optimizer=OptimizerConfig(name=setting.optimizer),
        checkpoints=cell.checkpoints / "stage I",
    )
    corpus = Corpus(config.corpus, limit=setting.corpus_bytes)
    asked = [
        replace(part, inputs=part.inputs.to(cell.device), targets=part.targets.to(cell.device))
        for part in of_text(corpus, data.tokenizer, units=setting.units, length=setting.context, most_documents=8)
    ]
    taken = record(model, asked)
    curves = exits(taken, points=32)
    rules = {name: _curve(curves, name) for name in UNTRAINED}
    rules[ORACLE] = _against(curves, curves.oracle_loss_loops, curves.oracle_loss)
    rules[FIRST] = _curve(curves, "hazard")
    skipping = {FIRST: _skipping(model, asked, taken)}
    assert model.gate is not None
    learned = {name: value.clone() for name, value in model.gate.state_dict().items()}
    for name, judge in (
        (SECOND, Calibration(loops=LOOPS)),
        (WRITTEN, Calibration(loops=LOOPS, rule="as-written", gamma=0.005)),
    ):
        model.gate.load_state_dict(learned)
        _teach(model, model.gate, judge, second, data.source(1), cell, optimizer=OptimizerConfig(weight_decay=0.0))
        taught = record(model, asked)
        rules[name] = _curve(exits(taught, points=32), "hazard")
        skipping[name] = _skipping(model, asked, taught)
    return {**_at_depths(taken), "rules": rules, "skipping": skipping}


def _teach(
    model: LoopedLM,
    part: nn.Module,
    objective: Objective,
    stage: StageConfig,
    source: BatchSource,
    cell: Cell,
    *,
    optimizer: OptimizerConfig,
    checkpoints: Path | None = None,
) -> None:
    """Train `part` of a model, all of it or its gate."""

    def loss(batch: Batch, step: int) -> Tensor:
        plan = objective.plan(seed=cell.seed, step=step, micro=0)
        return micro_batch_loss(model, batch, objective, plan, progress=step / stage.steps).loss.total

    fit(
        part,
        loss,
        lambda step: source.batch(step, 0, rows=stage.rows).to(cell.device),
        FitConfig(
            steps=stage.steps,
            learning_rate=stage.learning_rate,
            schedule=stage.schedule,
            optimizer=optimizer,
            log_every=max(1, stage.steps // 5),
            checkpoint_every=max(1, stage.steps // 3),
        ),
        checkpoints=checkpoints,
        log=cell.log,
    )


def _at_depths(taken: Record) -> dict[str, Any]:
    """Losses of fixed depths, and where the gate would leave if one drew from it."""
    assert taken.signals is not None
    leaving = exit_distribution(torch.from_numpy(taken.signals))
    loss = taken.losses.mean(axis=1)
    return {
        "loss": loss.tolist(),
        "accuracy": taken.right.mean(axis=1).tolist(),
        "last_loss": float(loss[-1]),
        "best_loss": float(loss.min()),
        "expected_loss": float((leaving.numpy() * taken.losses).sum(axis=0).mean()),
        "leaving": leaving.mean(dim=1).tolist(),
        "exit_loop": float(mean_exit_loop(leaving).mean()),
        "exit_entropy": float(entropy(leaving).mean()),
    }


def _curve(curves: ExitCurves, name: str) -> dict[str, Any]:
    found = next(curve for curve in curves.curves if curve.name == name)
    return _against(curves, found.mean_loops, found.loss, found.accuracy)


def _against(
    curves: ExitCurves,
    means: Float[np.ndarray, " points"],
    losses: Float[np.ndarray, " points"],
    accuracies: Float[np.ndarray, " points"] | None = None,
) -> dict[str, Any]:
    """What a rule gains on random mixing at each mean of the grid; None where it cannot stop so early.

    Between two thresholds units take one or the other at random. The area is the mean gain over all means from 1 to
    R, where the rule cannot stop so early that of random mixing, 0.
    """
    gains: list[float | None] = []
    for mean in GRID:
        reached = mean >= means[0] - 0.02
        gains.append(curves.mixed_loss(mean) - float(np.interp(mean, means, losses)) if reached else None)
    found: dict[str, Any] = {
        "gain": gains,
        "area": float(np.trapezoid([gain or 0.0 for gain in gains], GRID)) / (GRID[-1] - GRID[0]),
    }
    if accuracies is not None:
        middle = GRID[MIDDLE]
        more = float(np.interp(middle, means, accuracies)) - curves.mixed_accuracy(middle)
        found["accuracy_gain"] = more if gains[MIDDLE] is not None else None
    return found


def _skipping(model: LoopedLM, asked: Sequence[Examples], taken: Record) -> dict[str, float]:
    """The gate at about 2.5 mean loops when tokens that stop do no more work, and later ones read their last plane."""
    depths = Depths(losses=taken.losses, right=taken.right, hazards=taken.signals)
    batches = [
        Batch(
            tokens=part.inputs,
            targets=part.targets,
            documents=torch.zeros_like(part.inputs),
            mask=torch.ones_like(part.inputs, dtype=torch.bool),
        )
        for part in asked
    ]
    point = measure_exit(model, batches, hazard_for(depths, GRID[MIDDLE]), depths)
    return {"mean_loops": point.mean_loops, "gain": point.gain}


def report(results: Results) -> Page:
    """What the gate is worth beside the other rules, and what the prior does to losses and exits."""
    setting: Setting = results.setting
    told = Told(results)
    best = best_untrained(told, UNIFORM)
    stages, beyond = told.more(UNIFORM, SECOND, FIRST), told.more(UNIFORM, SECOND, best)
    assert stages is not None
    assert beyond is not None
    geometric = {f"geometric {prior}": prior for prior in setting.priors}
    worse = {variant: results.difference(variant, UNIFORM, "last_loss") for variant in geometric}
    tried = [told.gain(UNIFORM, rule, MIDDLE) for rule in (FIRST, SECOND, *UNTRAINED)]
    ahead = sum(interval is not None and interval.low > 0 for interval in tried)
    gain = {rule: shown(told.gain(UNIFORM, rule, MIDDLE)) for rule in (FIRST, SECOND, best)}
    verdict = (
        f"At a mean of 2.5 of {LOOPS} loops stage II's gate is {gain[SECOND]} nats below random mixing, stage I's "
        f"{gain[FIRST]}: {_judged(stages)} ({shown(stages)}). The best rule without training is {named(best)}, "
        f"{gain[best]}; stage II beside it: {_judged(beyond)} ({shown(beyond)}). {ahead} of {len(tried)} rules beat "
        f"random mixing there beyond the seeds' spread. Loss after {LOOPS} loops, geometric prior less uniform: "
        + ", ".join(f"{worse[variant].text(3, sign=True)} with hazard {prior}" for variant, prior in geometric.items())
        + f"; {_prior_judged(list(worse.values()))}."
    )
    return Page(
        verdict=verdict,
        paper=PAPER,
        tables=[rules_table(told), priors_table(told), stages_table(told)],
        notes=NOTES.format(beta=setting.beta),
        summary={
            "gain_at_2.5": {
                variant: {
                    rule: None if (found := told.gain(variant, rule, MIDDLE)) is None else vars(found)
                    for rule in (FIRST, SECOND, WRITTEN, *UNTRAINED, ORACLE)
                }
                for variant in results.records
            },
            "stage_two_less_stage_one": vars(stages),
            "stage_two_less_best_untrained": {"rule": best, **vars(beyond)},
            "last_loss_less_uniform": {variant: vars(interval) for variant, interval in worse.items()},
        },
        figure=drawn(told),
    )


def _judged(difference: Interval) -> str:
    if difference.low > 0:
        return "more"
    return "less" if difference.high < 0 else "not told apart"


def _prior_judged(worse: Sequence[Interval]) -> str:
    """In words: losses under geometric priors of rising hazard, less that under the uniform one."""
    if all(interval.low > 0 for interval in worse):
        grows = all(less.mean < more.mean for less, more in pairwise(worse))
        return "the uniform prior is better, as in the paper" + (", the more so the earlier the other" * grows)
    if all(interval.high < 0 for interval in worse):
        return "the uniform prior is worse, unlike in the paper"
    return "that the uniform prior is better does not reproduce for each of them at this size"


PAPER = (
    "Ouro (arXiv 2510.25741). *Exits*, figure 5, MMLU of the 1.4B model, read off the figure: at 2.5 mean loops stage "
    "II's gate has 66%, stage I's about 64%, stopping when the state changes little is 1 to 2 points below stage II, "
    "and each of them beats fixed depths. (Table 10 has 60.43 after 2 and 66.71 after 3 loops, so random mixing has "
    "63.6: stage II is 2.4 points above it, stage I 0.4.) Later work finds simple readouts more accurate than the "
    "released gate in 5 of 12 cases (arXiv 2607.20519). *Prior*, appendix A, 776M parameters, 20B tokens: a uniform "
    "prior has a lower loss than geometric ones of 0.1 to 0.9, the more so the more they leave early; a figure "
    "without numbers. *Exit distribution* of the 1.4B model, figure 19, mean on MMLU: 0.0004, 0.0855, 0.3793, 0.5348."
)

NOTES = (
    "All variants share data, start, optimiser and steps; beta is {beta} throughout. The geometric prior of hazard g "
    "has g (1 - g)^(t - 1) at loop t and what is left at the last; we could not find how the paper's own ends. The "
    "gate learns from the first step on (the preset `ouro-tiny` lets it wait for half of them). Stage II takes a "
    "tenth of the steps, on new text with the language model frozen, by the labels `best-later` with gamma 0.05 (the "
    "default), and `as written` in the paper with gamma 0.005. A threshold is set on the tokens it is measured on, to "
    "the mean loops asked for and never by the loss. The oracle knows the next token. Where losses rise with loops, "
    "random mixing is not the best that one can do without looking: a smaller fixed depth is."
)


EXPERIMENT = Experiment(
    title="Exit rules and the prior over loops",
    question="A small Ouro learns real text (the sources of Python's library) with its gate, stage I, under a uniform "
    "or a geometric prior over loops; then the gate alone is calibrated, stage II. Which rule knows best "
    "where a token may stop: the gate of either stage, or one that watches states or predictions? And which "
    "prior makes the better model?",
    settings=SETTINGS,
    variants=variants,
    measure=measure,
    report=report,
)

if __name__ == "__main__":
    run(EXPERIMENT, __file__)
