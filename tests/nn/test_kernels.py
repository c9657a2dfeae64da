"""The CPU kernels against loops written out, in float64 and float32, and their ways of not being there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM, initialise
from loopwise.nn.kernels import (
    FewRowsLinear,
    fast_twin,
    gathered_attention,
    linear,
    load_cpu_kernels,
    paged_attention,
    why_no_cpu_kernels,
)
from loopwise.nn.kernels import cpu as cpu_module

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
needs_kernels = pytest.mark.skipif(load_cpu_kernels() is None, reason=f"no CPU kernels: {why_no_cpu_kernels()}")
attentions = pytest.mark.parametrize(
    "attention",
    [
        pytest.param(paged_attention, marks=needs_kernels, id="kernel"),
        pytest.param(gathered_attention, id="gathered"),
        pytest.param(partial(gathered_attention, most=2500), id="in slices"),
    ],
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def naive_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, rows: Tensor, lengths: Tensor, scale: float | None
) -> Tensor:
    q, keys, values = q.double(), keys.double(), values.double()
    group, out = q.shape[1] // keys.shape[1], torch.zeros_like(q)
    for n in range(len(q)):
        slots = table[rows[n], : lengths[n]].long()
        for h in range(q.shape[1]):
            if len(slots):
                scores = keys[slots, h // group] @ q[n, h] * (q.shape[2] ** -0.5 if scale is None else scale)
                out[n, h] = scores.softmax(0) @ values[slots, h // group]
    return out


def case(
    lengths: list[int], rows: list[int], *, heads: int, kv_heads: int, width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    sequences, columns = max(rows, default=0) + 1, max(lengths, default=0) + 3
    slots = sequences * columns
    table = torch.randperm(slots, generator=draw).view(sequences, columns).int()
    # Keys of some size: the maxima of the softmax then matter.
    keys, values = (torch.randn(slots, kv_heads, width, dtype=dtype, generator=draw) * 2 for _ in range(2))
    q = torch.randn(len(rows), heads, width, dtype=dtype, generator=draw) * 2
    return q, keys, values, table, torch.tensor(rows, dtype=torch.long), torch.tensor(lengths, dtype=torch.long)


CASES = {
    "one short row": ([1], [0]),
    "one long row, cut into parts": ([1500], [0]),
    "rows of very different lengths": ([3, 700, 64, 65, 128, 1, 31], [4, 2, 0, 1, 6, 3, 5]),
    "a prompt of two tiles, and two neighbours": ([*range(90, 115), 40, 7], [1] * 25 + [0, 2]),
    "rows of one sequence in any order": ([200, 3, 77, 200], [0, 0, 0, 0]),
    "a length of zero, alone and in a tile": ([0, 5, 0, 9], [1, 0, 0, 2]),
    "no rows": ([], []),
}


@attentions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 8, 64), (6, 2, 16), (4, 1, 80), (2, 2, 5)])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_loop_written_out(attention, name, heads, kv_heads, width, dtype) -> None:
    lengths, rows = CASES[name]
    drawn = case(lengths, rows, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype)
    for scale in (None, 0.3):
        out = attention(*drawn, scale)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), naive_attention(*drawn, scale), rtol=0, atol=TOLERANCE[dtype] * 10)


@attentions
@pytest.mark.parametrize("seed", range(20))
def test_attention_of_random_rows(attention, seed) -> None:
    draw = torch.Generator().manual_seed(1000 + seed)
    count = int(torch.randint(1, 40, (), generator=draw))
    rows = torch.randint(0, 5, (count,), generator=draw).sort().values.tolist()
    lengths = torch.randint(0, 300, (count,), generator=draw).tolist()
    drawn = case(lengths, rows, heads=4, kv_heads=2, width=24, dtype=torch.float64, seed=seed)
    torch.testing.assert_close(attention(*drawn), naive_attention(*drawn, None), rtol=0, atol=1e-11)


@attentions
def test_large_scores_do_not_overflow(attention) -> None:
    q, *rest = case([300, 70], [0, 1], heads=2, kv_heads=2, width=16, dtype=torch.float32)
    torch.testing.assert_close(
        attention(q * 1000, *rest).double(), naive_attention(q * 1000, *rest, None), rtol=0, atol=1e-4
    )


@attentions
def test_pools_may_be_interleaved_and_queries_strided(attention) -> None:
    q, keys, values, *rest = case([70, 9], [1, 0], heads=4, kv_heads=2, width=8, dtype=torch.float64)
    both = torch.stack((keys, values), dim=1)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    out = attention(turned, both[:, 0], both[:, 1], *rest)
    torch.testing.assert_close(out, naive_attention(q, keys, values, *rest, None), rtol=0, atol=1e-12)


@attentions
def test_what_stands_in_the_table_beyond_a_length_is_not_looked_at(attention) -> None:
    q, keys, values, table, rows, lengths = case([4, 6], [1, 0], heads=2, kv_heads=2, width=8, dtype=torch.float64)
    want = naive_attention(q, keys, values, table, rows, lengths, None)
    table[1, 4:], table[0, 6:] = -1, 2**30
    torch.testing.assert_close(attention(q, keys, values, table, rows, lengths), want, rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in self.given:
            self.numbers = max(self.numbers, out.numel())
        return out

    def __init__(self, given: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}


@pytest.mark.parametrize("rows", [[*range(64)], [0] * 64])
def test_copies_of_many_long_rows_stay_within_bounds(rows) -> None:
    drawn = case([200 + n for n in range(64)], rows, heads=4, kv_heads=2, width=16, dtype=torch.float64)
    want = naive_attention(*drawn, None)
    most = 20_000
    with Largest(drawn) as seen:
        out = gathered_attention(*drawn, most=most)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-11)
    assert seen.numbers <= most
    with Largest(drawn) as seen:
        gathered_attention(*drawn)
    if rows[1]:
        assert seen.numbers == 263 * 64 * 2 * 16
    else:  # neighbours of one sequence copy its keys once; a score for each query and head is the most
        assert seen.numbers <= 263 * 64 * 4


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_and_the_same_answer(threads) -> None:
    drawn = case([900, 4, 33], [2, 0, 1], heads=4, kv_heads=4, width=32, dtype=torch.float64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        out = paged_attention(*drawn)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, naive_attention(*drawn, None), rtol=0, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize(
    ("argument", "index", "value"),
    [(3, (1, 2), 10_000), (3, (0, 0), -1), (4, 0, 7), (4, 1, -1), (5, 0, 100), (5, 0, -1)],
)
def test_nothing_outside_table_and_pool_is_read(argument, index, value) -> None:
    drawn = case([4, 6], [1, 0], heads=2, kv_heads=2, width=8, dtype=torch.float32)
    drawn[argument][index] = value
    with pytest.raises(IndexError, match="outside a table of 2 by 9"):
        paged_attention(*drawn)


@attentions
def test_misfits_are_named(attention) -> None:
    q, *rest = case([4], [0], heads=3, kv_heads=2, width=8, dtype=torch.float32)
    with pytest.raises((ValueError, RuntimeError), match=r"do not fit|not .*divisible|heads"):
        attention(q, *rest)


def test_gradients_and_other_dtypes_take_the_way_of_torch() -> None:
    q, keys, values, *rest = case([4, 6], [1, 0], heads=2, kv_heads=2, width=8, dtype=torch.float64)
    with torch.enable_grad():
        q.requires_grad_()
        paged_attention(q, keys, values, *rest).sum().backward()
    assert q.grad is not None
    q = q.detach()
    half = paged_attention(q.bfloat16(), keys.bfloat16(), values.bfloat16(), *rest)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), naive_attention(q, keys, values, *rest, None), rtol=0, atol=0.1)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (1, 1), (3, 7), (33, 100), (130, 1500), (17, 3000)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 11, 16, 17, 40])
def test_linear_is_the_product(rows, outputs, inputs, dtype) -> None:
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, dtype=dtype, generator=draw)
    weight = torch.randn(outputs, inputs, dtype=dtype, generator=draw)
    want = x.double() @ weight.double().T
    error = (linear(x, weight, few=64).double() - want).abs().max()
    assert error <= inputs**0.5 * 32 * torch.finfo(dtype).eps


def test_linear_takes_the_way_of_torch_where_it_must() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(linear(x, weight.T.contiguous().T), F.linear(x, weight))
    torch.testing.assert_close(linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))
    torch.testing.assert_close(linear(x[:, :0], weight), x.new_zeros(2, 0, 5))
    with torch.enable_grad():
        weight.requires_grad_()
        assert linear(x, weight).requires_grad
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        linear(x[..., :7], weight)


@pytest.mark.parametrize("few", [None, 0, 16])
def test_a_twin_is_the_same_model_and_leaves_the_first_alone(few) -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8, bias=False)).double()
    twin = fast_twin(model, few)
    assert [type(m) for m in model.modules()] == [nn.Sequential, nn.Linear, nn.Tanh, nn.Linear]
    assert [type(m) for m in twin.modules()] == [nn.Sequential, FewRowsLinear, nn.Tanh, FewRowsLinear]
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    for x in (torch.randn(24, dtype=torch.float64), torch.randn(3, 50, 24, dtype=torch.float64)):
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=1e-12)
    model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()})
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=1e-12)


def test_a_looped_model_has_a_twin() -> None:
    config = LoopedLMConfig(
        vocab_size=50,
        width=32,
        heads=4,
        kv_heads=2,
        head_width=8,
        mlp_width=48,
        core_layers=2,
        loops=3,
        trained_loops=(1, 3),
        max_positions=64,
        gate=True,
    )
    model = LoopedLM(config).double()
    initialise(model, seed=0)
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(fast_twin(model)(tokens).logits, model(tokens).logits, rtol=0, atol=1e-12)


def run_python(code: str, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


WHY = "from loopwise.nn.kernels import *; print(load_cpu_kernels() is None, why_no_cpu_kernels())"


def test_they_can_be_turned_off() -> None:
    assert run_python(WHY, LOOPWISE_KERNELS="off") == "True LOOPWISE_KERNELS=off\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the reason is another")
def test_no_compiler_is_a_reason_and_so_is_a_bad_one() -> None:
    assert "no C++ compiler" in run_python(WHY, CXX="no-such-compiler")
    assert "failed" in run_python(WHY, CXX="false")


@needs_kernels
def test_the_cache_is_filled_once_and_holds_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cpu_module._compiled()
    made = first.stat().st_mtime_ns
    assert cpu_module._compiled() == first
    assert first.stat().st_mtime_ns == made
    assert list((tmp_path / "loopwise").iterdir()) == [first]


@needs_kernels
def test_the_process_keeps_one_openmp_and_its_denormals() -> None:
    out = run_python(
        "import torch\n"
        "from loopwise.nn.kernels import load_cpu_kernels\n"
        "assert load_cpu_kernels()\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({m for m in maps if 'omp' in m.rsplit('/')[-1] and '.so' in m}))\n"
        "print(float(torch.tensor(1e-310, dtype=torch.float64) * 0.5) > 0)\n"
    )
    assert out.split() == ["1", "True"]
