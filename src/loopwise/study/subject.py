"""Whom to ask, and with what: a checkpoint of any family that is read here, and data that suits it."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from loopwise.configuration import from_dict
from loopwise.errors import ConfigError
from loopwise.hub.locate import read_json
from loopwise.hub.machines import load
from loopwise.loops.protocol import LoopModel
from loopwise.models.ctm import CTM
from loopwise.models.looped_lm import LoopedLM
from loopwise.models.trm import TRM
from loopwise.study.examples import Examples, of_pointer_chasing, of_task, of_text
from loopwise.tasks.corpus import Corpus
from loopwise.tasks.mazes import Mazes, MazesConfig
from loopwise.tasks.parity import CumulativeParity
from loopwise.tasks.pointer_chasing import PointerChasing, PointerChasingConfig
from loopwise.tasks.sudoku import Sudoku, SudokuConfig

TASKS = ("pointer-chasing", "mazes", "sudoku", "parity")
ONLY_FOR = {
    "rule": ("calibration", "adaptivity"),
    "cost": ("exits",),
    "number": ("grid", "lens", "convergence"),
    "push": ("convergence",),
    "tolerance": ("convergence",),
    "others": ("depth",),
}
"""Settings that only some questions read."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What to ask with."""

    data: str | None = None
    """A corpus (python, a folder, a file, see docs/data.md), or one of pointer-chasing, mazes, sudoku, parity. None:
    what the run was trained on; python for other checkpoints."""
    units: int = 2048
    """Tokens, questions or problems to ask, at least; questions that look at states take 1024 at most."""
    length: int = 256
    """Tokens of a row of text."""
    data_bytes: int | None = 8_000_000
    """Read no more of a corpus than its first bytes; none reads all."""
    loops: int | None = None
    """Loops to run. None: what suits the question, such as twice the trained range for `depth`."""
    rule: str | None = None
    """Exit rule of `calibration` and `adaptivity`; None: the model's own signal at its default."""
    others: tuple[str, ...] = ()
    """Further checkpoints for `depth`, such as other seeds of the same training; bands are then over all of them."""
    cost: Literal["loops", "flops", "kv_bytes"] = "loops"
    """What stands below the curves of `exits`."""
    number: int = 0
    """Which problem or row `grid`, `lens` and the map of `convergence` show."""
    push: float = 0.1
    """Length of the push of `convergence`, as a share of the state's norm."""
    tolerance: float = 0.01
    """A state that changes by a smaller share rests, for `convergence`."""
    seed: int = 0
    """Of problems made in code, of shuffles and of pushes."""
    start: int | Literal["zero"] | None = None
    """Start state of random-start models; None: the model's own."""
    pointer_chasing: PointerChasingConfig | None = None
    """Size of data=pointer-chasing; None: that of the run."""
    mazes: MazesConfig = field(default_factory=MazesConfig)
    """Size of data=mazes."""
    sudoku: SudokuConfig = field(default_factory=lambda: SudokuConfig(empties=(40, 50)))
    """Size of data=sudoku."""
    parity: CumulativeParity = field(default_factory=CumulativeParity)
    """Size of data=parity."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = "float32"
    """Number type of the weights; none keeps the checkpoint's."""
    device: str = "cpu"
    """Where to run."""

    def __post_init__(self) -> None:
        for name in ("units", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed is 1 or more")
        if self.loops is not None and self.loops < 1:
            raise ConfigError(f"loops={self.loops}: allowed is 1 or more")
        if self.number < 0:
            raise ConfigError(f"number={self.number}: allowed is 0 or more")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and where it came from."""

    model: LoopModel
    name: str
    run: Path | None
    """The run folder, where it is one."""


def open_subject(name: str, *, dtype: str | None = "float32", device: str | torch.device = "cpu") -> Subject:
    """A checkpoint of a language model, a CTM, a TRM or an HRM, or what a run has trained.

    Raises:
        UserError: it is not there, broken, or of none of these.
    """
    model = load(name, dtype=dtype, device=device)
    path = Path(name).expanduser()
    is_run = path.is_dir() and (path / "metrics.jsonl").is_file()
    return Subject(model=model, name=name if name.count("/") < 2 else path.name, run=path if is_run else None)


def open_data(subject: Subject, config: StudyConfig, *, units: int | None = None) -> list[Examples]:
    """At least so many units of the data that `config` names.

    Raises:
        ConfigError: data that this kind of model cannot read.
        UserError: a corpus that is missing, broken or too short.
    """
    wanted = units or config.units
    model = subject.model
    of_run = {} if subject.run is None else read_json(subject.run / "config.json")
    data = config.data or ("pointer-chasing" if of_run.get("task") == "pointer-chasing" else of_run.get("corpus"))
    if not isinstance(model, LoopedLM):
        data = config.data or ("sudoku" if isinstance(model, TRM) else "mazes")
        return _boards(model, data, config, wanted)
    data = data or "python"
    if data in ("mazes", "sudoku", "parity"):
        raise ConfigError(f"data={data} is not for language models; give a corpus, or data=pointer-chasing")
    if data == "pointer-chasing":
        shape = config.pointer_chasing
        if shape is None:
            shape = from_dict(PointerChasingConfig, of_run.get("pointer_chasing", {}))
        task = PointerChasing(shape)
        if task.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"data=pointer-chasing has {task.vocab_size} tokens and the model knows {model.config.vocab_size}; "
                "give its own size, such as pointer_chasing.nodes=10"
            )
        return of_pointer_chasing(task, seed=config.seed, units=wanted)
    if model.tokenizer is None:
        raise ConfigError(f"{subject.name} has no tokenizer, so it cannot read text; give data=pointer-chasing")
    length = min(config.length, model.config.max_positions)
    corpus = Corpus(data, limit=config.data_bytes)
    return of_text(corpus, model.tokenizer, units=wanted, length=length, most_documents=4)


def _boards(model: LoopModel, data: str, config: StudyConfig, units: int) -> list[Examples]:
    if data not in TASKS or data == "pointer-chasing":
        raise ConfigError(f"data={data!r} is for language models; this model takes mazes, sudoku or parity")
    if data == "sudoku":
        return of_task(Sudoku(config.sudoku), seed=config.seed, count=units, rows=64)
    if data == "parity":
        return of_task(config.parity, seed=config.seed, count=units)
    mazes = config.mazes
    if isinstance(model, CTM) and mazes == MazesConfig() and model.config.places is not None:
        mazes = dataclasses.replace(mazes, form="route", moves=model.config.places)
    return of_task(Mazes(mazes), seed=config.seed, count=units, rows=64)


def check_settings(question: str, given: Collection[str]) -> None:
    """Refuse a setting that this question would not read.

    Args:
        given: names of the settings that were typed.

    Raises:
        ConfigError: it says which questions read it.
    """
    for name in given:
        readers = ONLY_FOR.get(name)
        if readers is not None and question not in readers and (question != "report" or name == "others"):
            raise ConfigError(f"{name}= has no effect on {question}; only {', '.join(readers)} read it: leave it out")


def facts(config: StudyConfig) -> dict[str, Any]:
    """What was asked with, for the files of results."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None and value != ()}
