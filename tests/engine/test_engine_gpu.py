"""The promise on a GPU: its engine equals the readable generator of a CPU. Skipped where there is none."""

import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwise.engine.engine import Engine
from loopwise.engine.graphs import CudaCapture, GraphedRows
from loopwise.engine.request import Replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
matrix: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("test_engine_matrix.py")))
tiny, settings, reference, prompts = (matrix[name] for name in ("tiny", "settings", "reference", "prompts"))


@pytest.mark.parametrize("graphs", [False, True], ids=["modules", "graphs"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", matrix["POLICIES"])
@pytest.mark.parametrize(("name", "rule"), matrix["FEW"])
def test_in_float64_a_gpu_answers_as_a_cpu(
    name: str, rule: str | None, policy: str, sampled: bool, graphs: bool
) -> None:
    """Graphs here have attention in torch's operations: the kernel has no float64."""
    model, mine = tiny(name), settings(rule, sampled=sampled)
    wanted = reference(model, mine, policy)
    for way in ("together", *matrix["SHORT"]):
        options = dict(matrix["WAYS"][way])
        if "memory" in options:
            options["memory"] = matrix["few_pages"](model)
        engine = Engine(model.to("cuda"), policy, max_loops=matrix["LOOPS"], **options)
        if graphs:
            runner = engine._core.runner
            captures = partial(CudaCapture, runner.device)
            runner._few = GraphedRows(runner.model, runner.memory, runner.seats, captures)
        for _ in range(2):  # once more, so that prefixes are found and graphs there already
            matrix["check_same"](engine.generate(prompts(model), mine), wanted)
        engine.check_idle()
        model.to("cpu")


@pytest.mark.parametrize("graphs", [False, True], ids=["modules", "graphs"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("policy", matrix["POLICIES"])
@pytest.mark.parametrize(("name", "rule"), matrix["FEW"])
def test_narrower_it_follows_the_same_answer(
    name: str,
    rule: str | None,
    policy: str,
    dtype: torch.dtype,
    tolerance: float,
    graphs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here the kernel runs: the tokens and loops of float64 followed, log-probabilities compared."""
    if not graphs:
        monkeypatch.setenv("LOOPWISE_GRAPHS", "off")
    model, mine = tiny(name), settings(rule, sampled=True)
    wanted = reference(model, mine, policy)
    engine = Engine(model.to("cuda", dtype), policy, max_loops=matrix["LOOPS"], speculate="off")
    assert isinstance(engine._core.runner._few, GraphedRows) == graphs
    replays = [Replay(tokens=answer.tokens, loops=answer.loops) for answer in wanted]
    for mine_now, theirs in zip(engine.generate(prompts(model), mine, replays=replays), wanted, strict=True):
        assert mine_now.tokens == theirs.tokens
        assert mine_now.logprobs == pytest.approx(theirs.logprobs, abs=tolerance)
