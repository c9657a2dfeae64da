"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no schedule state."""

import math
from dataclasses import dataclass

from loopwise.errors import ConfigError

KINDS = ("warmup-stable-decay", "cosine", "constant")
SHAPES = ("linear", "1-sqrt")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves within one stage of training."""

    kind: str = "warmup-stable-decay"
    """`warmup-stable-decay`: flat until the decay begins. `cosine`: falls from the warmup on. `constant`: stays."""
    warmup: int = 0
    """Steps over which the rate rises linearly; the first step already has rate 1/warmup."""
    decay: int = 0
    """Steps at the end over which `warmup-stable-decay` falls; the other kinds do not take it."""
    shape: str = "linear"
    """`linear`: 1-x. `1-sqrt`: 1-sqrt(x), which falls fast first (Haegele et al. 2024, arXiv 2405.18392)."""
    final: float = 0.0
    """Fraction of the peak rate that the decay arrives at when the last step is done."""

    def __post_init__(self) -> None:
        for name, value, allowed in (("kind", self.kind, KINDS), ("shape", self.shape, SHAPES)):
            if value not in allowed:
                raise ConfigError(f"schedule.{name}={value!r} is unknown; use one of: {', '.join(allowed)}")
        if self.warmup < 0 or self.decay < 0:
            raise ConfigError(f"schedule.warmup={self.warmup}, schedule.decay={self.decay}: use 0 or more steps")
        if not 0.0 <= self.final <= 1.0:
            raise ConfigError(f"schedule.final={self.final}: use a fraction of the peak rate between 0 and 1")
        if self.kind != "warmup-stable-decay" and self.decay:
            raise ConfigError(f"schedule.decay={self.decay} has no effect with kind={self.kind}; leave it out")
        if self.final and (self.kind == "constant" or (self.kind == "warmup-stable-decay" and not self.decay)):
            raise ConfigError(f"schedule.final={self.final} has no effect without schedule.decay; set both or neither")


def multiplier(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the peak learning rate for the update that follows `step` completed ones, of `steps` in the stage.

    The first update (step 0) of a warmup of N gets 1/N, update N-1 gets 1. The decay is 1 where it begins and would
    be `final` at step == steps, so that no update is wasted on a rate of zero.
    Raises `ConfigError` if warmup and decay together are longer than the stage.
    """
    if config.warmup + config.decay > steps:
        raise ConfigError(
            f"schedule.warmup={config.warmup} and schedule.decay={config.decay} do not fit into {steps} steps; "
            "shorten them or raise steps"
        )
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.kind == "constant":
        return 1.0
    if config.kind == "cosine":
        done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
        height = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        done = min(1.0, max(0.0, (step - (steps - config.decay)) / max(1, config.decay)))
        height = 1.0 - (math.sqrt(done) if config.shape == "1-sqrt" else done)
    return config.final + (1.0 - config.final) * height
