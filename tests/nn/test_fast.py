"""Norms, rotations, gates, hazards and choices of few rows, each one call, against torch's operations; fast twins."""

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from loopwise.engine.choosing import Draw, choose_batch, pick
from loopwise.engine.layout import layout_of
from loopwise.engine.sampling import Sampling
from loopwise.loops.planes import parse_policy
from loopwise.memory.paged import PagedMemory
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.fast import FastAttention, FastGate, FastMLP, FastNorm, fast_model
from loopwise.nn.gate import HazardGate
from loopwise.nn.kernels import why_no_cpu_kernels
from loopwise.nn.kernels.rows import gate_rows, hazard_rows, load_row_kernels, norm_rows, pick_rows, rotate_rows
from loopwise.nn.mlp import GatedMLP
from loopwise.nn.norms import RMSNorm
from loopwise.nn.rotary import rotary_tables, rotate

tiny: Callable[..., LoopedLM] = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
pytestmark = pytest.mark.skipif(not load_row_kernels(), reason=f"no kernels: {why_no_cpu_kernels()}")
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (70, 512)])
def test_norms_and_gates_are_those_of_the_modules(rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, width, dtype=dtype) * 3
    norm = RMSNorm(width, 1e-5).to(dtype)
    norm.weight.copy_(torch.randn(width))
    torch.testing.assert_close(norm_rows(x, norm.weight, 1e-5), norm(x), rtol=0, atol=TOLERANCE[dtype] * 10)
    both = torch.randn(rows, 2 * width, dtype=dtype) * 9
    opens, up = both.chunk(2, dim=-1)
    wanted = torch.nn.functional.silu(opens) * up
    torch.testing.assert_close(gate_rows(both), wanted, rtol=0, atol=TOLERANCE[dtype] * 100)


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (70, 512)])
def test_hazards_are_those_of_the_gate(rows: int, width: int, dtype: torch.dtype) -> None:
    gate = HazardGate(width).to(dtype)
    x = torch.randn(2, rows, width, dtype=dtype)
    x[0, 0], x[1, 0] = 1e4 * gate.weight[0].sign(), -1e4 * gate.weight[0].sign()
    found = hazard_rows(x, gate.weight, gate.bias)
    assert found is not None
    torch.testing.assert_close(found, gate.hazard(x), rtol=0, atol=TOLERANCE[dtype])
    # No rule stops for what is not a number, so it must not become one.
    assert bool(hazard_rows(torch.full_like(x, torch.nan), gate.weight, gate.bias).isnan().all())  # type: ignore[union-attr]


@dtypes
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotations_leave_what_follows_alone(layout: str, dtype: torch.dtype) -> None:
    rotary = rotary_tables(torch.tensor([0, 5, 900]), 8, 10000.0, dtype)
    x = torch.randn(3, 7 * 8, dtype=dtype)
    heads = x.view(3, 7, 8).clone()
    assert rotate_rows(x, *rotary, heads=5, interleaved=layout == "interleaved")
    wanted = torch.cat((rotate(heads[:, :5], rotary, layout), heads[:, 5:]), dim=1)  # type: ignore[arg-type]
    torch.testing.assert_close(x.view(3, 7, 8), wanted, rtol=0, atol=TOLERANCE[dtype])


@dtypes
def test_of_equals_the_first_is_picked(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 1000, dtype=dtype)
    logits[0, [7, 300]] = logits[3, [0, 999]] = 9.0
    noisy = torch.randn(4, 1000, dtype=torch.float64)
    noisy[1, [3, 4]] = 9.0
    chances = torch.log_softmax(logits, dim=-1)
    for given, by in ((None, logits), (noisy, noisy)):
        found = pick_rows(logits, given)
        assert found is not None
        assert found[0] == by.argmax(-1).tolist()
        wanted = chances[range(4), found[0]]
        torch.testing.assert_close(torch.tensor(found[1], dtype=dtype), wanted, rtol=0, atol=TOLERANCE[dtype])


@dtypes
def test_what_is_not_a_number_still_gives_a_token(dtype: torch.dtype) -> None:
    found = pick_rows(torch.full((2, 5), torch.nan, dtype=dtype), None)
    assert found is not None
    assert all(0 <= token < 5 for token in found[0])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("seeds", [[1, 1, 1], [1, 2, 3]])
def test_picked_tokens_are_those_of_the_batch(temperature: float, seeds: list[int]) -> None:
    logits = torch.randn(3, 50, dtype=torch.float64)
    rows = [
        Draw(sampling=Sampling(temperature=temperature, seed=seed), position=9 + place)
        for place, seed in enumerate(seeds)
    ]
    found, wanted = pick(logits, rows), choose_batch(logits, rows)
    assert found is not None
    assert found[0] == wanted.tokens.tolist()
    assert found[1] == pytest.approx(wanted.logprobs.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        [Sampling(temperature=1.0, top_k=2)],
        [Sampling(logprobs=1)],
        [Sampling(repetition_penalty=1.5)],
        [Sampling(), Sampling(temperature=1.0)],
    ],
)
def test_rows_that_want_more_are_left_to_the_batch(settings: list[Sampling]) -> None:
    logits = torch.randn(len(settings), 5)
    assert pick(logits, [Draw(sampling=one, position=3) for one in settings]) is None


def test_other_dtypes_and_gradients_are_left_to_torch() -> None:
    x, weight = torch.randn(2, 6), torch.ones(6)
    assert norm_rows(x.bfloat16(), weight.bfloat16(), 1e-6) is None
    assert norm_rows(x.t(), torch.ones(2), 1e-6) is None
    assert pick_rows(x.bfloat16(), None) is None
    assert hazard_rows(x.bfloat16(), torch.ones(1, 6), torch.ones(1)) is None
    with torch.enable_grad():
        assert gate_rows(x) is None
        assert not rotate_rows(x, torch.ones(2, 1), torch.ones(2, 1), heads=3, interleaved=False)


@pytest.mark.parametrize("shape", ["ouro", "huginn"])
def test_a_fast_model_is_the_same_model(shape: str) -> None:
    model = tiny(shape)
    twin = fast_model(model)
    kinds = {type(module) for module in twin.modules()}
    assert {FastNorm, FastMLP, FastAttention} <= kinds
    assert not {RMSNorm, GatedMLP} & kinds
    assert {type(module) for module in model.modules()} >= {RMSNorm, GatedMLP}
    assert (FastGate in kinds) == model.config.gate
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    found, wanted = (each(tokens, collect=("signals",)) for each in (twin, model))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.loop_signals, wanted.loop_signals, rtol=0, atol=1e-12)


def test_where_no_kernel_serves_each_product_runs_once() -> None:
    model = tiny("ouro")
    twin = fast_model(model.bfloat16())
    ran: list[nn.Module] = []
    for module in twin.core.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    memory = PagedMemory(
        layout_of(model), parse_policy("per_loop"), planes=1, budget=2**20, seats=1, device=torch.device("cpu")
    )
    where = np.zeros(1, dtype=np.int64)
    memory.bind(where, where + 1, where, torch.device("cpu"))
    x, rotary = torch.randn(1, model.config.width).bfloat16(), model.rotary(torch.zeros(1, dtype=torch.long))
    found = twin.core(x, rotary, memory)
    torch.testing.assert_close(found, model.core(x, rotary, memory))
    assert len(ran) == len(set(ran)) == 4 * len(twin.core)
