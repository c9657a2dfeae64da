"""A run with a compiled core: the numbers of the eager one, and a few graphs whatever the depths and shapes."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from loopwise.train.config import TrainConfig
from loopwise.train.run import train

pytestmark = pytest.mark.compiles


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def test_losses_equal_the_eager_run(tiny_run: Callable[..., TrainConfig], watch: Any, metrics_of: Any) -> None:
    eager, compiled = tiny_run(folder="eager"), tiny_run(folder="compiled", compile=True)
    train(eager, progress=watch())
    train(compiled, progress=watch())
    for found, wanted in zip(metrics_of(compiled.run), metrics_of(eager.run), strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("recipe", ["two stages of Ouro", "random depth by Muon"])
def test_depths_stages_and_validation_take_few_graphs(
    recipe: str, tiny_run: Callable[..., TrainConfig], watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    config = tiny_run(recipe, compile=True, validation_loops=(1, 2, 3), validation_rows=3)
    train(replace(config, stages=tuple(replace(stage, steps=8) for stage in config.stages)), progress=watch())
    assert 1 <= graphs.frame_count <= 6
