"""Runs small enough to be trained dozens of times."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loopwise.models.config import LoopedLMConfig
from loopwise.tasks.pointer_chasing import PointerChasingConfig
from loopwise.train import run
from loopwise.train.config import StageConfig, TrainConfig
from loopwise.train.ema import EmaConfig
from loopwise.train.metrics import read_metrics
from loopwise.train.optimizers import OptimizerConfig
from loopwise.train.progress import Progress, Status

OURO = {
    "vocab_size": 1,
    "width": 16,
    "heads": 2,
    "kv_heads": 2,
    "head_width": 8,
    "mlp_width": 16,
    "core_layers": 1,
    "loops": 3,
    "trained_loops": (1, 3),
    "max_positions": 32,
    "norm": "pre_branch",
    "loop_norm": True,
    "final_norm": False,
    "gate": True,
}
HUGINN = {
    **OURO,
    "norm": "pre_post",
    "loop_norm": False,
    "final_norm": True,
    "gate": False,
    "prelude_layers": 1,
    "coda_layers": 1,
    "coda_norm": True,
    "rotary": "interleaved",
    "qk_bias": True,
    "tied_head": True,
    "start": "normal",
    "injection": "adapter",
}


def stage(name: str, objective: str, steps: int, **settings: Any) -> StageConfig:
    return StageConfig(
        **{"name": name, "objective": objective, "steps": steps, "rows": 2, "context": 12, "learning_rate": 1e-2}
        | settings
    )


RECIPES: dict[str, dict[str, Any]] = {
    # Loops, beta, batch, context and rate change, then the gate alone; averages throughout.
    "two stages of Ouro": {
        "model": LoopedLMConfig(**OURO),
        "family": "ouro",
        "ema": EmaConfig(decay=0.8, start=2),
        "stages": (
            stage("I", "expected:loops=2,beta=0.1,uniform_until=0.5", 4, micro_batches=2),
            stage("Ib", "expected:loops=3,beta=0.05", 3, rows=1, context=20, micro_batches=3, learning_rate=3e-3),
            stage("II", "calibrate:loops=3", 3, learning_rate=3e-2),
        ),
    },
    # Another number of loops in each micro-batch, from another random start, through a window, by Muon.
    "random depth by Muon": {
        "model": LoopedLMConfig(**HUGINN),
        "optimizer": OptimizerConfig(name="muon"),
        "recompute": True,
        "stages": (
            stage("wide", "random-depth:loops=3,backprop=2", 4, micro_batches=2),
            stage("deep", "random-depth:loops=2,sampler=uniform,backprop=none", 4, context=16),
        ),
    },
    "pointer chasing": {
        "model": LoopedLMConfig(**OURO | {"tied_head": True}),
        "task": "pointer-chasing",
        "pointer_chasing": PointerChasingConfig(nodes=4, max_hops=3, questions=3),
        "stages": (
            stage("hops", "every:loops=3,gate=0.1", 5, context=None, micro_batches=2),
            stage("gate", "calibrate:loops=3,rule=best-later", 3, context=None),
        ),
    },
}


class Killed(BaseException):
    """Stands for the end of the process."""


class Watch(Progress):
    """Keeps what a run says, and may end it after a step as a kill would: nothing more is written."""

    killed = Killed

    def __init__(self, *, die_at: int | None = None, at_step: Callable[[int], None] | None = None) -> None:
        super().__init__(console=Console(file=io.StringIO(), width=300))
        self.statuses: list[Status] = []
        self.notes: list[str] = []
        self.die_at = die_at
        self.at_step = at_step

    def update(self, status: Status) -> None:
        self.statuses.append(status)
        if self.at_step is not None:
            self.at_step(status.step)
        if self.die_at == status.step:
            raise Killed

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, and memory stays as it is for the tests that come after."""
    monkeypatch.setattr(run, "matmul_peak", lambda dtype, device: 1e9)
    monkeypatch.setattr(run, "keep_freed_memory", lambda: True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six thousand characters in which something can be learned."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = ["loop", "state", "gate", "core", "token", "depth"]
    lines = [f"{words[i * i % 6]} {words[i * 7 % 5]} {i % 13} times {words[i % 6]}.\n" for i in range(240)]
    path.write_text("".join(lines))
    return path


def make_config(recipe: str, folder: Path, corpus: Path, **settings: Any) -> TrainConfig:
    text = {} if RECIPES[recipe].get("task") else {"corpus": str(corpus), "tokenizer": "bytes"}
    usual = {"run": str(folder), "log_every": 1, "validate_every": 3, "validation_rows": 2, "checkpoint_every": 2}
    return TrainConfig(**usual | text | RECIPES[recipe] | settings)


@pytest.fixture
def tiny_run(quick_machine: None, tmp_path: Path, corpus: Path) -> Callable[..., TrainConfig]:
    """`tiny_run("two stages of Ouro", folder="a", seed=1)` is a configuration to train."""

    def make(recipe: str = "two stages of Ouro", folder: str = "run", **settings: Any) -> TrainConfig:
        return make_config(recipe, tmp_path / folder, corpus, **settings)

    return make


def metrics_of(folder: str | Path) -> list[dict[str, Any]]:
    """All lines without what hangs on the clock."""
    return [
        {key: line[key] for key in line if key != "timing"} for line in read_metrics(Path(folder) / "metrics.jsonl")
    ]


def state_of(folder: str | Path) -> dict[str, bytes]:
    """Every byte that a run leaves, but for its own name and the clock."""
    root = Path(folder)
    kept = {str(path.relative_to(root)): path.read_bytes() for path in root.glob("checkpoints/*/*")}
    kept |= {str(path.relative_to(root)): path.read_bytes() for path in root.glob("model/*")}
    return kept | {"metrics": json.dumps(metrics_of(root)).encode()}


def assert_same_run(found: str | Path, expected: str | Path) -> None:
    ours, theirs = state_of(found), state_of(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.fixture(name="metrics_of")
def _metrics_of() -> Callable[[str | Path], list[dict[str, Any]]]:
    return metrics_of


@pytest.fixture(name="state_of")
def _state_of() -> Callable[[str | Path], dict[str, bytes]]:
    return state_of


@pytest.fixture(name="assert_same_run")
def _assert_same_run() -> Callable[[str | Path, str | Path], None]:
    return assert_same_run


@pytest.fixture
def watch() -> type[Watch]:
    """A progress line that keeps what it is told; `watch(die_at=3)` raises `watch.killed` after step 3."""
    return Watch
