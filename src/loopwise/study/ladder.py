"""Make a checkpoint's ladder: what each name of effort stands for, from a validation set.

Between the fewest and the most trained loops the rungs ask for means in equal ratios; the lowest and the highest are
fixed depths, those between are thresholds of one exit rule, so that a token's effort follows its need.

On text every rung is then run as the engine would run it (`last_exited`: a token that stops does no more work). Where
only some tokens are asked, as in pointer chasing, the others are prompt, which runs every loop whatever the rule: there
the figures are those of replay, and no time is given.

A rung whose loss is not below that of the rung under it takes that rung's settings: more effort never costs quality,
and coinciding rungs are shown as such.
"""

import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch

from loopwise.engine.ladder import EFFORTS, Ladder, Rung
from loopwise.errors import ConfigError
from loopwise.loops.drivers import run_until
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.examples import Examples
from loopwise.study.record import Record, record
from loopwise.study.rules import Family, families, family_of
from loopwise.tasks.problems import IGNORED


def calibrate_ladder(
    model: LoopedLM, data: Sequence[Examples], *, start: int | str | None = None, rounds: int = 3
) -> Ladder:
    """Measure a ladder on held-out tokens.

    Args:
        data: batches of a language model, see `loopwise.study.examples`.
        start: start state of random-start models.
        rounds: times that every rung is run, the rungs taking turns; seconds are the medians of all but the first,
            which warms up (of the only one, where there is one).

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
    settings: list[tuple[int, str | None]] = [(least, None)]
    settings += [(most, _threshold(family, mean)) if least < most else (most, None) for mean in wanted[1:-1]]
    settings.append((most, None))
    runs = {setting: _Run() for setting in dict.fromkeys(settings)}
    prompted = any(bool((examples.targets == IGNORED).any()) for examples in data)
    for turn in range(1 if prompted else rounds):
        for (loops, rule), run in runs.items():
            if prompted:
                run.replay(taken, loops=loops, rule=rule)
            else:
                run.measure(model, data, loops=loops, rule=rule, start=start, counts=turn > 0 or rounds == 1)
    order = sorted(settings, key=lambda setting: runs[setting].mean_loops)
    chosen: list[tuple[int, str | None]] = []
    for setting in order:
        better = not chosen or runs[setting].loss < runs[chosen[-1]].loss
        chosen.append(setting if better else chosen[-1])
    return Ladder(
        measured=True,
        rungs=tuple(runs[setting].rung(effort, *setting) for effort, setting in zip(EFFORTS, chosen, strict=True)),
    )


def _threshold(family: Family, mean_loops: float) -> str:
    """The rule whose replayed mean is nearest."""
    tries = family.thresholds(64)
    nearest = min(tries, key=lambda threshold: abs(float(family.exits(threshold).mean()) - mean_loops))
    return family.rule(float(f"{nearest:.4g}"))


class _Run:
    """One rung, run a few times on all batches."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens = 0
        self.loss = self.accuracy = self.mean_loops = 0.0

    def replay(self, taken: Record, *, loops: int, rule: str | None) -> None:
        used = np.full(taken.units, loops)
        if rule is not None:
            family, threshold = family_of(taken, rule)
            used = np.minimum(family.exits(threshold), loops)
        units = np.arange(taken.units)
        self.loss, self.mean_loops = float(taken.losses[used - 1, units].mean()), float(used.mean())
        self.accuracy = float(taken.right[used - 1, units].mean())

    def measure(
        self,
        model: LoopedLM,
        data: Sequence[Examples],
        *,
        loops: int,
        rule: str | None,
        start: int | str | None,
        counts: bool,
    ) -> None:
        loss = right = used = 0.0
        tokens = 0
        seconds = 0.0
        for examples in data:
            began = time.perf_counter()
            with torch.no_grad():
                context = model.encode(examples.inputs, **examples.options)
                outcome = run_until(model, context, rule or f"fixed:{loops}", max_loops=loops, start=start)
            seconds += time.perf_counter() - began
            asked = (examples.targets != IGNORED).to(outcome.prediction.device)
            logits, targets = outcome.prediction[asked].float(), examples.targets.to(asked.device)[asked]
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            right += float((logits.argmax(-1) == targets).sum())
            used += float(outcome.loops[asked].sum())
            tokens += len(targets)
        # The first round warms up.
        self.seconds += [seconds] if counts else []
        self.tokens = tokens
        self.loss, self.accuracy, self.mean_loops = loss / tokens, right / tokens, used / tokens

    def rung(self, effort: str, loops: int, rule: str | None) -> Rung:
        return Rung(
            effort=effort,
            max_loops=loops,
            exit=rule,
            mean_loops=self.mean_loops,
            loss=self.loss,
            accuracy=self.accuracy,
            seconds_per_token=statistics.median(self.seconds) / self.tokens if self.seconds else None,
        )
