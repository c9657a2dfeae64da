"""Make a checkpoint's ladder: what each name of effort stands for, from a validation set.

Between the fewest and the most trained loops the rungs ask for means in equal ratios; the lowest and the highest are
fixed depths, those between are thresholds of one exit rule, so that a token's effort follows its need.

On text every rung is then run as the engine would run it (`last_exited`: a token that stops does no more work), and
the engine itself writes some answers at each, which gives the time. Where only some tokens are asked, as in pointer
chasing, the others are prompt, which runs every loop whatever the rule: there the figures are those of replay, and no
time is given.

A rung whose loss is not below that of the rung under it takes that rung's settings, and one that saves no time takes
those of the rung above it: more effort never costs quality, less never costs time, and coinciding rungs are shown as
such.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from loopwise.engine.engine import Engine
from loopwise.engine.ladder import EFFORTS, Ladder, Rung
from loopwise.engine.sampling import Sampling
from loopwise.errors import ConfigError
from loopwise.loops.drivers import run_until
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.examples import Examples
from loopwise.study.record import Record, record
from loopwise.study.rules import Family, families, family_of
from loopwise.tasks.problems import IGNORED

SAVES = 0.97
"""A rung saves time when it takes at most this much of that of the rung above; less is not told from noise."""
_ANSWERS, _PROMPT, _ANSWER = 8, 64, 48
"""Answers that the engine writes together to be timed, and the tokens of their prompts and of themselves."""

Setting = tuple[int, str | None]
"""Most loops, exit rule."""


def calibrate_ladder(
    model: LoopedLM,
    data: Sequence[Examples],
    *,
    start: int | Literal["zero"] | None = None,
    rounds: int = 3,
) -> Ladder:
    """Measure a ladder on held-out tokens.

    Args:
        data: batches of a language model, see `loopwise.study.examples`.
        start: start state of random-start models.
        rounds: times that the engine writes at every rung, the rungs taking turns after one that warms up; seconds are
            the medians.

    Raises:
        ConfigError: for fewer than one round.
    """
    if rounds < 1:
        raise ConfigError(f"rounds={rounds}: allowed is 1 or more")
    least, most = model.facts.trained_loops
    taken = record(model, data, max_loops=most, start=start)
    # The model's own signal where it has one, else the change of its state: neither pays for readouts.
    family = families(taken)[0]
    wanted = [least * (most / least) ** (step / (len(EFFORTS) - 1)) for step in range(len(EFFORTS))]
    settings: list[Setting] = [(least, None)]
    settings += [(most, _threshold(family, mean)) if least < most else (most, None) for mean in wanted[1:-1]]
    settings.append((most, None))
    different = list(dict.fromkeys(settings))
    if any(bool((examples.targets == IGNORED).any()) for examples in data):
        runs = {setting: _replay(taken, setting) for setting in different}
    else:
        seconds = _writing_seconds(model, data, different, start=start, rounds=rounds)
        runs = {
            setting: replace(_read(model, data, setting, start=start), seconds=seconds[setting])
            for setting in different
        }
    rungs = [
        runs[setting].rung(effort, setting) for effort, setting in zip(EFFORTS, choose(settings, runs), strict=True)
    ]
    return Ladder(measured=True, rungs=tuple(rungs))


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one setting gave on the validation set."""

    loss: float
    accuracy: float
    mean_loops: float
    seconds: float | None = None
    """Per token written; None where nothing was timed."""

    def rung(self, effort: str, setting: Setting) -> Rung:
        return Rung(
            effort=effort,
            max_loops=setting[0],
            exit=setting[1],
            mean_loops=self.mean_loops,
            loss=self.loss,
            accuracy=self.accuracy,
            seconds_per_token=self.seconds,
        )


def choose(settings: Sequence[Setting], runs: Mapping[Setting, Run]) -> list[Setting]:
    """A setting for every effort, so that from one to the next loss falls and time rises, or both stay."""
    chosen: list[Setting] = []
    for setting in sorted(settings, key=lambda setting: runs[setting].mean_loops):
        better = not chosen or runs[setting].loss < runs[chosen[-1]].loss
        chosen.append(setting if better else chosen[-1])
    for place in range(len(chosen) - 2, -1, -1):
        mine, above = runs[chosen[place]].seconds, runs[chosen[place + 1]].seconds
        if mine is not None and above is not None and mine > SAVES * above:
            chosen[place] = chosen[place + 1]
    return chosen


def _threshold(family: Family, mean_loops: float) -> str:
    """The rule whose replayed mean is nearest."""
    tries = family.thresholds(64)
    nearest = min(tries, key=lambda threshold: abs(float(family.exits(threshold).mean()) - mean_loops))
    return family.rule(float(f"{nearest:.4g}"))


def _replay(taken: Record, setting: Setting) -> Run:
    loops, rule = setting
    used = np.full(taken.units, loops)
    if rule is not None:
        family, threshold = family_of(taken, rule)
        used = np.minimum(family.exits(threshold), loops)
    units = np.arange(taken.units)
    return Run(
        loss=float(taken.losses[used - 1, units].mean()),
        accuracy=float(taken.right[used - 1, units].mean()),
        mean_loops=float(used.mean()),
    )


@torch.no_grad()
def _read(model: LoopedLM, data: Sequence[Examples], setting: Setting, *, start: int | str | None) -> Run:
    """All texts as tokens that leave early read them."""
    loops, rule = setting
    loss = right = used = 0.0
    tokens = 0
    for examples in data:
        context = model.encode(examples.inputs, **examples.options)
        outcome = run_until(model, context, rule or f"fixed:{loops}", max_loops=loops, start=start)
        logits, targets = outcome.prediction.float(), examples.targets.to(outcome.prediction.device)
        loss += float(torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum"))
        right += float((logits.argmax(-1) == targets).sum())
        used += float(outcome.loops.sum())
        tokens += targets.numel()
    return Run(loss=loss / tokens, accuracy=right / tokens, mean_loops=used / tokens)


def _writing_seconds(
    model: LoopedLM,
    data: Sequence[Examples],
    settings: Sequence[Setting],
    *,
    start: int | Literal["zero"] | None,
    rounds: int,
) -> dict[Setting, float]:
    """Seconds per token of a few answers that the engine writes together."""
    length = min(_PROMPT, model.config.max_positions // 2)
    prompts = [row[:length].tolist() for examples in data for row in examples.inputs][:_ANSWERS]
    tokens = min(_ANSWER, model.config.max_positions - length)
    engine = Engine(model, "last_exited")
    taken: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for turn in range(rounds + 1):
        for loops, rule in settings:
            sampling = Sampling(
                max_tokens=tokens, temperature=1.0, seed=turn, ignore_eos=True, exit=rule, max_loops=loops, start=start
            )
            began = time.perf_counter()
            engine.generate(prompts, sampling)
            if turn:
                taken[loops, rule].append((time.perf_counter() - began) / (tokens * len(prompts)))
    return {setting: statistics.median(times) for setting, times in taken.items()}
