"""Guard rails for the known ways in which looped models fail to learn: each says what it saw and what to change.

A guard is a pure function of numbers and thresholds that returns its message or None. `inspect` runs them all and
keeps each from repeating itself; what it remembers is an explicit value that goes into the checkpoint.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopwise.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a guard speaks up."""

    after: int = 200
    """Steps before any guard but the one on skipped steps may speak: fresh models look collapsed and often recover."""
    cooldown: int = 1000
    """Steps for which a guard that has spoken stays silent."""
    correlation: float = 0.95
    """Mean pairwise cosine of the states of one sequence above which they count as collapsed."""
    loop_gain: float = 0.005
    """Nats by which the last trained loop must beat the first one."""
    loop_loss: float = 0.02
    """Nats by which the last trained loop may be worse than the best one before it."""
    norm_growth: float = 10.0
    """Factor by which the state's norm may grow from the first loop to the last."""
    first_exit: float = 0.6
    """Share of the exit distribution on loop 1 above which the gate counts as collapsed."""
    skipped: float = 0.05
    """Share of skipped steps, of those since the last look, that is too much."""

    def __post_init__(self) -> None:
        for name in ("after", "cooldown", "loop_gain", "loop_loss"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"guards.{name}={getattr(self, name)}: use 0 or more")
        for name in ("correlation", "first_exit", "skipped"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"guards.{name}={getattr(self, name)}: use a share above 0 and up to 1")
        if not self.norm_growth > 1.0:
            raise ConfigError(f"guards.norm_growth={self.norm_growth}: use a factor above 1")


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """What the guards look at; a field that was not measured is None, and its guards stay silent."""

    correlation: float | None = None
    """`token_correlation` of the states after the last loop."""
    losses: Sequence[float] | None = None
    """Mean loss in nats read after each loop 1..R; only for models whose intermediate readouts are trained."""
    norms: Sequence[float] | None = None
    """`state_norms`: mean norm of the states after each loop 1..R."""
    exits: Sequence[float] | None = None
    """Mean exit distribution p(1)..p(R)."""
    steps: int = 0
    """Steps tried since the last look."""
    skipped: int = 0
    """Of those, steps that were skipped."""


@dataclass(frozen=True, kw_only=True)
class GuardMemory:
    """When each guard last spoke."""

    spoken: Mapping[str, int] = field(default_factory=dict)
    """Step by guard name; JSON."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The outcome of one look."""

    warnings: Mapping[str, str]
    """Message by guard name; empty when all is well."""
    memory: GuardMemory
    """To be handed to the next look."""


def inspect(vitals: Vitals, *, step: int, config: GuardConfig, memory: GuardMemory) -> Inspection:
    """Runs every guard on `vitals` at `step` (optimiser steps completed)."""
    found = {"skipped": skipped_steps(vitals, config)}
    if step >= config.after:
        found |= {
            "correlation": state_collapse(vitals.correlation, config),
            "loop_gain": ignored_loops(vitals.losses, config),
            "loop_loss": harmful_loops(vitals.losses, config),
            "norm_growth": norm_blow_up(vitals.norms, config),
            "first_exit": gate_collapse(vitals.exits, config),
        }
    spoken = dict(memory.spoken)
    warnings = {
        name: message
        for name, message in found.items()
        if message is not None and (name not in spoken or step - spoken[name] >= config.cooldown)
    }
    return Inspection(warnings=warnings, memory=GuardMemory(spoken=spoken | dict.fromkeys(warnings, step)))


def token_correlation(
    states: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> float:
    """Mean cosine between the states of two different real positions of a sequence, averaged over sequences.

    Near 1 every position carries the same state: each loop has mixed the tokens until none is left (Huginn, section
    4.3, the first failed run). NaN if no sequence has two real positions.
    """
    unit = torch.nn.functional.normalize(states.detach().float(), dim=-1)
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    unit = unit * mask[..., None]
    count = mask.sum(1).double()
    # The sum over all pairs is |sum of unit vectors|^2; the pairs of a position with itself are taken off.
    pairs = unit.sum(1, dtype=torch.float64).square().sum(-1) - unit.square().sum((1, 2), dtype=torch.float64)
    several = count > 1
    return float((pairs[several] / (count * (count - 1))[several]).mean())


def state_norms(states: Float[Tensor, "loops batch tokens width"]) -> list[float]:
    """Mean root-mean-square of the states after each loop."""
    return [float(value) for value in states.detach().float().square().mean(-1).sqrt().mean((1, 2))]


def state_collapse(correlation: float | None, config: GuardConfig) -> str | None:
    """All positions carry nearly the same state (Huginn, arXiv 2502.05171, section 4.3, bad run 1)."""
    if correlation is None or not correlation > config.correlation:
        return None
    return (
        f"states of different tokens have become alike (mean cosine {correlation:.3f} > {config.correlation}): loops "
        "mix the tokens away; use norm=pre_post with injection=adapter and embed_scale=sqrt(width), or a smaller "
        "learning_rate"
    )


def ignored_loops(losses: Sequence[float] | None, config: GuardConfig) -> str | None:
    """The loss is the same after one loop and after all (Huginn, section 4.3, bad run 2: r=1 and r=32 identical)."""
    if losses is None or len(losses) < 2 or not abs(losses[0] - losses[-1]) < config.loop_gain:
        return None
    return (
        f"loops 1 and {len(losses)} have the same loss ({losses[0]:.4f} and {losses[-1]:.4f}): the model ignores its "
        "loops; use norm=pre_post with injection=adapter, draw the number of loops at random, or train longer"
    )


def harmful_loops(losses: Sequence[float] | None, config: GuardConfig) -> str | None:
    """The loss rises with further loops: weight has moved to early loops and the later ones are no longer trained.

    Seen when the gate of an expected-loss objective settles on loop 1 early on; the cure to try first is uniform exit
    weights for the first half of stage I, then an annealed entropy weight (beta).
    """
    if losses is None or len(losses) < 2:
        return None
    best = min(losses[:-1])
    if not losses[-1] - best > config.loop_loss:
        return None
    return (
        f"loop {len(losses)} is worse than loop {losses.index(best) + 1} (loss {losses[-1]:.4f} against {best:.4f}): "
        "later loops are not trained; use uniform exit weights for the first half of stage I, or raise beta"
    )


def norm_blow_up(norms: Sequence[float] | None, config: GuardConfig) -> str | None:
    """States grow from loop to loop: a normed readout does not see their size (arXiv 2606.24898 reports 1e4)."""
    if norms is None or len(norms) < 2:
        return None
    growth = norms[-1] / norms[0] if norms[0] > 0 else math.inf
    if not growth > config.norm_growth:
        return None
    return (
        f"the state's norm grows {growth:.3g} times from loop 1 to {len(norms)} ({norms[0]:.3g} to {norms[-1]:.3g}); "
        "norm the state after each loop (loop_norm=true), or raise weight_decay"
    )


def gate_collapse(exits: Sequence[float] | None, config: GuardConfig) -> str | None:
    """The exit distribution sits on loop 1, so the other loops get no training signal (self-reinforcing).

    Ouro (arXiv 2510.25741, section 3) adds the entropy term against the same collapse on the last loop.
    """
    if exits is None or len(exits) < 2 or not exits[0] > config.first_exit:
        return None
    return (
        f"the gate stops at loop 1 with probability {exits[0]:.2f} > {config.first_exit}: the other loops starve; use "
        "uniform exit weights (gate loss off) for the first half of stage I, or raise beta"
    )


def skipped_steps(vitals: Vitals, config: GuardConfig) -> str | None:
    """Gradients that are not finite, step after step."""
    if not vitals.steps or not vitals.skipped / vitals.steps > config.skipped:
        return None
    return (
        f"{vitals.skipped} of the last {vitals.steps} steps had gradients that are not finite and were skipped; use a "
        "smaller learning_rate, a longer warmup, a smaller clip, or fewer loops"
    )
