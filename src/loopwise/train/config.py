"""Everything a training run needs to know; saved with the run, complete and resolved."""

from dataclasses import dataclass, field
from typing import Literal

from loopwise.errors import ConfigError
from loopwise.models.config import LoopedLMConfig
from loopwise.objectives.registry import build_objective
from loopwise.tasks.pointer_chasing import PointerChasingConfig
from loopwise.train.ema import EmaConfig
from loopwise.train.guards import GuardConfig
from loopwise.train.optimizers import OptimizerConfig
from loopwise.train.schedule import ScheduleConfig, multiplier


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
    context: int
    """Tokens per sequence."""
    learning_rate: float
    """Peak rate of this stage."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the rate moves within the stage."""

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "micro_batches", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stage {self.name}: {name}={getattr(self, name)}; allowed is 1 or more")
        if not self.learning_rate > 0:
            raise ConfigError(f"stage {self.name}: learning_rate={self.learning_rate}; allowed is above 0")
        multiplier(self.schedule, 0, self.steps)
        build_objective(self.objective)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run: model, data, stages, and how to watch and save it."""

    run: str
    """The run folder."""
    stages: tuple[StageConfig, ...]
    """Trained one after the other; a run resumes exactly, across their boundaries too."""
    model: LoopedLMConfig | None = None
    """Shape of a new model; vocab_size is taken from the data. None when `init` is given."""
    init: str | None = None
    """A checkpoint to start from, of any supported family; its own tokenizer is used."""
    family: Literal["ouro", "huginn_raven", "loopwise"] = "loopwise"
    """Format of the trained model; one that is started from `init` keeps its own."""

    task: Literal["text", "pointer-chasing"] = "text"
    """What the data is: a corpus, or k-hop questions made on the fly."""
    corpus: str = "python"
    """A corpus: `python`, a file, folder or glob, JSON lines, Parquet, or a `datasets` name (see docs/data.md)."""
    corpus_bytes: int | None = None
    """Read at most this much of the corpus."""
    tokenizer: str = "bpe:4096"
    """`bpe:SIZE` trained on the corpus, `bytes`, or the folder of a checkpoint whose tokenizer is used."""
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

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def loops_validated(self) -> tuple[int, ...]:
        """The loop counts that validation reads, rising."""
        if self.validation_loops:
            return tuple(sorted(set(self.validation_loops)))
        most = max(build_objective(stage.objective).loops for stage in self.stages)
        if most <= 8:
            return tuple(range(1, most + 1))
        return tuple(sorted({2**power for power in range(most.bit_length())} | {most}))
