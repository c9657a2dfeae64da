"""Presets: a few dials that a person turns, and everything else derived from them, each choice with its reason."""

from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from loopwise.errors import ConfigError
from loopwise.hub.checkpoints import inspect
from loopwise.models.config import LoopedLMConfig
from loopwise.objectives.calibration import LabelRule
from loopwise.tasks.pointer_chasing import PointerChasing, PointerChasingConfig
from loopwise.train.config import DEFAULT_TOKENIZER, UNKNOWN_VOCABULARY, StageConfig, TrainConfig
from loopwise.train.optimizers import OptimizerConfig
from loopwise.train.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Something a preset decided."""

    name: str
    value: Any
    reason: str


@dataclass
class Recipe:
    """A configuration with the reasons for it."""

    config: TrainConfig
    choices: list[Choice] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TextDials:
    """Dials of the text presets."""

    corpus: str = "python"
    """What to read (see docs/data.md)."""
    loops: int = 4
    """Loops to train with; the mean of the draws for huginn-tiny."""
    width: int = 256
    """Features of the state."""
    layers: int = 2
    """Layers inside the loop."""
    steps: int = 2000
    """Optimiser steps, all stages together."""
    rows: int = 16
    """Sequences per step."""
    context: int = 256
    """Tokens per sequence."""
    tokenizer: str = DEFAULT_TOKENIZER
    """`bpe:SIZE`, `bytes`, or the folder of a checkpoint."""
    seed: int = 0
    """Everything random is a function of it."""
    run: str | None = None
    """The run folder; none: runs/PRESET."""

    def __post_init__(self) -> None:
        for name in ("loops", "layers", "rows", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; allowed is 1 or more")
        if self.steps < 20:
            raise ConfigError(f"steps={self.steps}; allowed is 20 or more")
        if self.width < 32 or self.width % 32:
            raise ConfigError(f"width={self.width}; allowed are multiples of 32")


@dataclass(frozen=True, kw_only=True)
class CalibrateDials:
    """Dials of stage II on a finished model."""

    init: str
    """The checkpoint whose gate is to be calibrated."""
    corpus: str = "python"
    """What to read (see docs/data.md)."""
    rule: LabelRule = "best-later"
    """How the worth of another loop is judged (see docs/objectives.md)."""
    loops: int | None = None
    """Loops to judge; none: as many as the model runs by itself."""
    steps: int = 200
    """Optimiser steps."""
    rows: int = 16
    """Sequences per step."""
    context: int = 256
    """Tokens per sequence."""
    seed: int = 0
    """Order of the data."""
    run: str | None = None
    """The run folder; none: runs/PRESET."""


@dataclass(frozen=True, kw_only=True)
class PointerDials:
    """Dials of pointer chasing."""

    loops: int = 4
    """Loops to train with, and the most hops asked."""
    nodes: int = 8
    """Entries of the successor table."""
    width: int = 64
    """Features of the state."""
    steps: int = 2800
    """Optimiser steps, all stages together."""
    rows: int = 32
    """Tables per step."""
    seed: int = 0
    """Everything random is a function of it."""
    run: str | None = None
    """The run folder; none: runs/PRESET."""

    def __post_init__(self) -> None:
        for name in ("loops", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; allowed is 1 or more")
        if self.loops >= self.nodes:
            raise ConfigError(f"loops={self.loops} with nodes={self.nodes}; allowed are 1 to {self.nodes - 1} loops")
        if self.width < 32 or self.width % 16:
            raise ConfigError(f"width={self.width}; allowed are multiples of 16 from 32")
        if self.steps < 20:
            raise ConfigError(f"steps={self.steps}; allowed is 20 or more")


def ouro_tiny(dials: TextDials) -> Recipe:
    """A small Ouro: the whole stack is looped, a gate learns where to stop, in two stages."""
    head_width = 64 if dials.width % 64 == 0 else 32
    mlp_width = _round_to(8 * dials.width / 3, 32)
    calibration = max(10, dials.steps // 10) if dials.loops > 1 else 0
    first = dials.steps - calibration
    rate = 2e-3 * (256 / dials.width) ** 0.5
    model = LoopedLMConfig(
        vocab_size=UNKNOWN_VOCABULARY,
        width=dials.width,
        heads=dials.width // head_width,
        kv_heads=dials.width // head_width,
        head_width=head_width,
        mlp_width=mlp_width,
        core_layers=dials.layers,
        loops=dials.loops,
        trained_loops=(1, dials.loops),
        anytime=True,
        max_positions=max(1024, dials.context),
        norm="pre_branch",
        loop_norm=True,
        final_norm=False,
        gate=True,
    )
    stage = StageConfig(
        name="stage I",
        objective=f"expected:loops={dials.loops},beta=0.1,beta_end=0.05,uniform_until=0.5",
        steps=first,
        rows=dials.rows,
        context=dials.context,
        learning_rate=rate,
        schedule=ScheduleConfig(warmup=max(1, first // 20), decay=first // 3),
    )
    stages = [stage]
    if calibration:
        stages.append(
            StageConfig(
                name="stage II",
                objective=f"calibrate:loops={dials.loops},rule=best-later",
                steps=calibration,
                rows=dials.rows,
                context=dials.context,
                learning_rate=1e-2,
                schedule=ScheduleConfig(warmup=max(1, calibration // 10), decay=calibration // 2),
            )
        )
    config = TrainConfig(
        run=dials.run or "runs/ouro-tiny",
        stages=tuple(stages),
        model=model,
        family="ouro",
        corpus=dials.corpus,
        tokenizer=dials.tokenizer,
        seed=dials.seed,
    )
    return Recipe(
        config,
        [
            Choice(name="heads", value=model.heads, reason=f"width / {head_width}, a head width that kernels like"),
            Choice(name="mlp_width", value=mlp_width, reason="8/3 of the width, as gated MLPs have it, rounded to 32"),
            Choice(name="learning_rate", value=f"{rate:.1e}", reason="2e-3 at width 256, falling with its root"),
            Choice(name="stage I", value=first, reason="nine tenths of the steps: language model and gate together"),
            Choice(
                name="uniform_until",
                value=0.5,
                reason="equal weight for every loop at first, or the gate collapses onto loop 1",
            ),
            Choice(name="stage II", value=calibration, reason="the rest: the gate alone learns what a loop is worth"),
        ],
    )


def huginn_tiny(dials: TextDials) -> Recipe:
    """A small Huginn: prelude, looped core, coda, random start state, random depth."""
    head_width = 64 if dials.width % 64 == 0 else 32
    mlp_width = _round_to(8 * dials.width / 3, 32)
    rate = 2e-3 * (256 / dials.width) ** 0.5
    std = (2.0 / (5.0 * dials.width)) ** 0.5
    backprop = max(1, dials.loops // 2)
    model = LoopedLMConfig(
        vocab_size=UNKNOWN_VOCABULARY,
        width=dials.width,
        heads=dials.width // head_width,
        kv_heads=dials.width // head_width,
        head_width=head_width,
        mlp_width=mlp_width,
        prelude_layers=1,
        core_layers=dials.layers,
        coda_layers=1,
        loops=dials.loops,
        trained_loops=(1, 4 * dials.loops),
        anytime=True,
        max_positions=max(1024, dials.context),
        norm="pre_post",
        coda_norm=True,
        rotary="interleaved",
        rotary_base=50_000.0,
        qk_bias=True,
        embed_scale=float(dials.width) ** 0.5,
        tied_head=True,
        start="normal",
        start_std=std * float(dials.width) ** 0.5,
        injection="adapter",
    )
    stage = StageConfig(
        name="random depth",
        objective=f"random-depth:loops={dials.loops},backprop={backprop}",
        steps=dials.steps,
        rows=dials.rows,
        context=dials.context,
        learning_rate=rate,
        schedule=ScheduleConfig(warmup=max(1, dials.steps // 20), decay=dials.steps // 3),
    )
    config = TrainConfig(
        run=dials.run or "runs/huginn-tiny",
        stages=(stage,),
        model=model,
        family="huginn_raven",
        corpus=dials.corpus,
        tokenizer=dials.tokenizer,
        seed=dials.seed,
    )
    return Recipe(
        config,
        [
            Choice(name="prelude, coda", value=1, reason="one layer on each side of the loop"),
            Choice(name="depth", value=f"about {dials.loops}", reason="log-normal Poisson, a new draw each step"),
            Choice(name="backprop", value=backprop, reason="half the mean depth: deeper gradients cost and add little"),
            Choice(name="learning_rate", value=f"{rate:.1e}", reason="2e-3 at width 256, falling with its root"),
        ],
    )


def calibrate(dials: CalibrateDials) -> Recipe:
    """Stage II alone: the gate of a finished model learns what another loop is worth; nothing else changes."""
    loops = dials.loops or inspect(dials.init).config.loops
    stage = StageConfig(
        name="stage II",
        objective=f"calibrate:loops={loops},rule={dials.rule}",
        steps=dials.steps,
        rows=dials.rows,
        context=dials.context,
        learning_rate=1e-2,
        schedule=ScheduleConfig(warmup=max(1, dials.steps // 10), decay=dials.steps // 2),
    )
    config = TrainConfig(
        run=dials.run or "runs/calibrate", stages=(stage,), init=dials.init, corpus=dials.corpus, seed=dials.seed
    )
    return Recipe(
        config,
        [
            Choice(name="loops", value=loops, reason="as asked" if dials.loops else "what this model runs by itself"),
            Choice(name="learning_rate", value="1e-02", reason="the gate is one row of weights and nothing else moves"),
        ],
    )


def pointer_chasing(dials: PointerDials) -> Recipe:
    """k-hop questions: with a loss at loop r only for questions of at most r hops, each loop learns one hop."""
    task = PointerChasingConfig(nodes=dials.nodes, max_hops=dials.loops)
    calibration = max(10, dials.steps // 7) if dials.loops > 1 else 0
    first = dials.steps - calibration
    model = LoopedLMConfig(
        vocab_size=UNKNOWN_VOCABULARY,
        width=dials.width,
        heads=dials.width // 16,
        kv_heads=dials.width // 16,
        head_width=16,
        mlp_width=2 * dials.width,
        core_layers=1,
        loops=dials.loops,
        trained_loops=(1, dials.loops),
        anytime=True,
        max_positions=max(256, PointerChasing(task).length),
        norm="pre",
        tied_head=True,
        gate=True,
    )
    stages = [
        StageConfig(
            name="hops",
            objective=f"every:loops={dials.loops}" + (",gate=0.1,gamma=0.005" if dials.loops > 1 else ""),
            steps=first,
            rows=dials.rows,
            learning_rate=3e-3,
            schedule=ScheduleConfig(warmup=max(1, first // 20), decay=first // 5),
        )
    ]
    if calibration:
        stages.append(
            StageConfig(
                name="gate",
                objective=f"every:loops={dials.loops},gate=1",
                steps=calibration,
                rows=dials.rows,
                learning_rate=1e-3,
                schedule=ScheduleConfig(warmup=max(1, calibration // 10), decay=calibration // 2),
            )
        )
    config = TrainConfig(
        run=dials.run or "runs/pointer-chasing",
        stages=tuple(stages),
        model=model,
        task="pointer-chasing",
        pointer_chasing=task,
        optimizer=OptimizerConfig(betas=(0.9, 0.98), weight_decay=0.01),
        seed=dials.seed,
    )
    return Recipe(
        config,
        [
            Choice(name="core_layers", value=1, reason="one layer, one hop"),
            Choice(
                name="tied_head",
                value=True,
                reason="an answer is written just as the next lookup reads it, so a second hop comes nearly free",
            ),
            Choice(name="norm", value="pre", reason="edges stay what they are from loop to loop"),
            Choice(name="first_loop", value="k", reason="a k-hop question is asked from loop k on"),
            Choice(
                name="gate", value=calibration, reason="the last steps sharpen it: stop once no later loop is better"
            ),
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named way from dials to a configuration."""

    dials: type[Any]
    build: Callable[[Any], Recipe]


PRESETS: dict[str, Preset] = {
    "ouro-tiny": Preset(dials=TextDials, build=ouro_tiny),
    "huginn-tiny": Preset(dials=TextDials, build=huginn_tiny),
    "pointer-chasing": Preset(dials=PointerDials, build=pointer_chasing),
    "calibrate": Preset(dials=CalibrateDials, build=calibrate),
}


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ConfigError: with the right names.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise ConfigError(f"there is no preset {name!r}{hint}; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]


def _round_to(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)
