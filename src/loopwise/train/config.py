"""Everything a training run needs to know; saved with the run, complete and resolved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from loopwise.errors import ConfigError
from loopwise.models.config import LoopedLMConfig
from loopwise.objectives.base import Objective
from loopwise.objectives.random_depth import RandomDepth
from loopwise.objectives.registry import build_objective
from loopwise.tasks.pointer_chasing import PointerChasing, PointerChasingConfig
from loopwise.train.ema import EmaConfig
from loopwise.train.guards import GuardConfig
from loopwise.train.optimizers import OptimizerConfig
from loopwise.train.schedule import ScheduleConfig, multiplier

UNKNOWN_VOCABULARY = 1
"""As `model.vocab_size`: as many tokens as the data has."""
DEFAULT_TOKENIZER = "bpe:4096"


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stretch of training with one objective."""

    name: str
    """Shown in the progress line and written into the metrics."""
    objective: str
    """What to learn, such as "expected:loops=4,beta=0.05" (see docs/objectives.md)."""
    steps: int
    """Optimiser steps."""
    rows: int
    """Sequences per micro-batch."""
    micro_batches: int = 1
    """Micro-batches per step; each draws its own depth, so a micro-batch is a bucket of one depth."""
    context: int | None = None
    """Tokens per sequence of text; none for questions, which have a length of their own."""
    learning_rate: float
    """Peak rate of this stage."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the rate moves within the stage."""

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "micro_batches", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"stage {self.name}: {name}={value}; allowed is 1 or more")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"stage {self.name}: learning_rate={self.learning_rate}; allowed is above 0")
        try:
            multiplier(self.schedule, 0, self.steps)
            self.learns()
        except ConfigError as error:
            raise ConfigError(f"stage {self.name}: {error}") from None

    def learns(self) -> Objective:
        """The objective that `objective` names."""
        return build_objective(self.objective)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run: model, data, stages, and how to watch and save it."""

    run: str
    """The run folder."""
    stages: tuple[StageConfig, ...]
    """Trained one after the other; a run resumes exactly, across their boundaries too."""
    model: LoopedLMConfig | None = None
    """Shape of a new model. `vocab_size=1` stands for as many tokens as the data has; `trained_loops` and `anytime`
    are widened to what the stages train. None when `init` is given."""
    init: str | None = None
    """A checkpoint, or a finished run, to start from; its family and its tokenizer are kept."""
    family: Literal["ouro", "huginn_raven", "loopwise"] | None = None
    """Format in which a new model is saved; none: loopwise."""

    task: Literal["text", "pointer-chasing"] = "text"
    """What the data is: a corpus, or k-hop questions made on the fly."""
    corpus: str = "python"
    """A corpus: `python`, a file, folder or glob, JSON lines, Parquet, or a `datasets` name (see docs/data.md)."""
    corpus_bytes: int | None = None
    """Read at most this much of the corpus."""
    tokenizer: str | None = None
    """`bpe:SIZE` trained on the corpus, `bytes`, or the folder of a checkpoint whose tokenizer is used. None: bpe:4096,
    or the tokenizer of `init`."""
    pointer_chasing: PointerChasingConfig = field(default_factory=PointerChasingConfig)
    """The questions of task `pointer-chasing`."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Which optimiser; the rate is each stage's own."""
    ema: EmaConfig | None = None
    """Averaged weights, used for validation and saved as the model; None: the last weights."""
    guards: GuardConfig = field(default_factory=GuardConfig)
    """When to warn of the known failures."""
    seed: int = 0
    """Weights, order of the data, depths and start states are functions of it."""

    device: str = "cpu"
    """Where to train."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the matrix products (bfloat16: autocast; weights stay float32)."""
    compile: bool = False
    """Compile one loop of the core. Compiled and eager runs differ in the last bits."""
    recompute: bool = False
    """Forget what happens inside a loop and recompute it in the backward pass: less memory, a third more work."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 200
    """Steps between validations; there is one at the end in any case."""
    validation_rows: int = 32
    """Sequences of the validation text that are read."""
    validation_loops: tuple[int, ...] = ()
    """Loops to read the validation loss at; empty: 1, 2, 4, ... up to the most loops of any stage."""
    checkpoint_every: int = 200
    """Steps between checkpoints; there is one at the end of every stage in any case."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay."""
    trackers: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """Where metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("stages is empty; give at least one, for example with --preset ouro-tiny")
        if (self.model is None) == (self.init is None):
            raise ConfigError("give either model=... (a new model) or init=PATH_OR_ID (one to start from)")
        for name in ("log_every", "validate_every", "validation_rows", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; allowed is 1 or more")
        if any(loops < 1 for loops in self.validation_loops):
            raise ConfigError(f"validation_loops={list(self.validation_loops)}; allowed are numbers from 1")
        self._refuse_idle_settings()
        if self.model is not None:
            check_fit(self, self.model)

    def _refuse_idle_settings(self) -> None:
        """A setting that would change nothing is a misunderstanding, and is not passed over in silence."""
        if self.init is not None:
            for name in ("family", "tokenizer"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name}={getattr(self, name)}: a model started from init keeps its own {name}; leave it out"
                    )
        text = self.task == "text"
        idle = ("pointer_chasing",) if text else ("corpus", "corpus_bytes", "tokenizer")
        for name in idle:
            default = PointerChasingConfig() if name == "pointer_chasing" else getattr(TrainConfig, name)
            if getattr(self, name) != default:
                raise ConfigError(f"{name} has no effect with task={self.task}; leave it out or choose another task")
        for stage in self.stages:
            if text and stage.context is None:
                raise ConfigError(f"stage {stage.name}: context is missing; give the tokens per sequence")
            if not text and stage.context is not None:
                raise ConfigError(
                    f"stage {stage.name}: context={stage.context} has no effect with task={self.task}; leave it out"
                )

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def first_step(self, stage: int) -> int:
        """Optimiser steps of the stages before this one."""
        return sum(before.steps for before in self.stages[:stage])

    def loops_validated(self) -> tuple[int, ...]:
        """The loop counts that validation reads, rising."""
        if self.validation_loops:
            return tuple(sorted(set(self.validation_loops)))
        most = max(stage.learns().loops for stage in self.stages)
        if most <= 8:
            return tuple(range(1, most + 1))
        return tuple(sorted({2**power for power in range(most.bit_length())} | {most}))


def check_fit(config: TrainConfig, model: LoopedLMConfig) -> None:
    """Refuse a run that a model of this shape cannot make.

    Raises:
        ConfigError: a stage needs a gate that the model has not, or more positions than it holds.
    """
    for stage in config.stages:
        objective = stage.learns()
        if objective.needs_hazards and not model.gate:
            raise ConfigError(
                f"stage {stage.name}: objective {objective.name} needs an exit gate and this model has none; "
                "choose last, every or random-depth, or a model with gate=true"
            )
        length = stage.context or PointerChasing(config.pointer_chasing).length
        if length > model.max_positions:
            raise ConfigError(
                f"stage {stage.name}: sequences of {length} tokens, and this model holds {model.max_positions}; "
                "make them shorter, or max_positions larger in a new model"
            )


def with_trained_loops(model: LoopedLMConfig, stages: Sequence[StageConfig]) -> LoopedLMConfig:
    """The configuration that states the loops which these stages train, besides those it stated before."""
    least, most = model.trained_loops
    anytime = model.anytime
    for objective in (stage.learns() for stage in stages):
        if objective.trains == "gate":
            continue
        fewest, deepest = answered_loops(objective)
        least, most, anytime = min(least, fewest), max(most, deepest), anytime or fewest < deepest
    return replace(model, trained_loops=(least, most), anytime=anytime)


def answered_loops(objective: Objective) -> tuple[int, int]:
    """Fewest and most loops after which this objective asks for an answer."""
    if isinstance(objective, RandomDepth):
        return (objective.deepest if objective.sampler == "fixed" else objective.min_loops), objective.deepest
    return (1 if objective.reads == "all" else objective.loops), objective.loops
