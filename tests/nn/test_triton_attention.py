"""The GPU's kernel of paged attention against loops written out: on a GPU, or in Triton's interpreter on a CPU.

    pip install triton; pytest tests/nn/test_triton_attention.py

without a GPU, where it is not installed otherwise. How tiles are cut is tested everywhere.
"""

import importlib.util
import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwise.engine import still
from loopwise.engine.engine import Engine
from loopwise.engine.graphs import GraphedRows
from loopwise.engine.reference import generate
from loopwise.engine.request import Replay
from loopwise.engine.sampling import Sampling
from loopwise.nn.kernels import cut_tiles, paged_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when the kernel is defined. Code that jaxtyping checks is not affected.
    os.environ["TRITON_INTERPRET"] = "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")
kernels: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("test_kernels.py")))
tiny = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]
case, naive_attention, CASES = kernels["case"], kernels["naive_attention"], kernels["CASES"]
# Triton's interpreter (3.9) has no products of bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.02} | ({torch.bfloat16: 0.1} if DEVICE == "cuda" else {})


@pytest.mark.parametrize(
    ("rows", "group", "tiles"),
    [
        ([], 1, []),
        ([3], 1, [[0, 1]]),
        ([3, 4, 3], 1, [[0, 1], [1, 1], [2, 1]]),
        ([5, 5, 5, 2, 2, 7], 4, [[0, 3], [3, 2], [5, 1]]),
        ([1] * 40, 4, [[0, 16], [16, 16], [32, 8]]),
        ([1] * 3, 128, [[0, 1], [1, 1], [2, 1]]),
    ],
)
def test_neighbours_with_one_table_row_are_a_tile(rows: list[int], group: int, tiles: list[list[int]]) -> None:
    assert cut_tiles(rows, group).tolist() == tiles


@needs_triton
@pytest.mark.parametrize(
    ("programs", "columns", "parts"),
    [(8, 100, 1), (8, 256, 2), (8, 10**6, 32), (1, 10**6, 32), (64, 10**6, 4), (129, 10**6, 1), (3, 5000, 32)],
)
def test_few_programs_share_tiles_that_are_long(programs: int, columns: int, parts: int) -> None:
    from loopwise.nn.kernels.triton_attention import share_tiles

    assert share_tiles(programs, columns) == parts


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 16), (6, 2, 20), (8, 1, 64)])
@pytest.mark.parametrize("name", list(CASES))
def test_the_kernel_equals_loops_written_out(
    name: str, heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> None:
    from loopwise.nn.kernels.triton_attention import triton_attention

    lengths, rows = CASES[name]
    given = case(lengths, rows, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype)
    tiles = cut_tiles(rows, heads // kv_heads)
    there = [each.to(DEVICE) for each in given]
    wanted = naive_attention(*given, None)
    for parts in (1, 4, None):
        found = triton_attention(*there, tiles.to(DEVICE), width**-0.5, parts)
        assert found.dtype == dtype
        torch.testing.assert_close(found.cpu().double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    if DEVICE == "cuda":
        torch.testing.assert_close(paged_attention(*there), found)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="tests/engine/test_engine_gpu.py has it in real graphs")
@pytest.mark.parametrize("shape", ["ouro", "retrofitted-llama"])
def test_launches_of_padded_rows_take_it(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(still, "tiles_wanted", lambda device, dtype: True)
    model, prompts, settings = tiny(shape), [[1, 2, 3], [4, 5], [6]], Sampling(max_tokens=4)
    wanted = [generate(model, [prompt], settings)[0] for prompt in prompts]
    engine = Engine(model.float(), memory="4MiB", speculate="off")
    runner, runs = engine._core.runner, []
    runner._few = GraphedRows(runner.model, runner.memory, runner.seats, lambda: lambda run: runs.append(run) or run)
    replays = [Replay(tokens=answer.tokens, loops=answer.loops) for answer in wanted]
    for mine, theirs in zip(engine.generate(prompts, settings, replays=replays), wanted, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert runs
