"""Causal attention within documents: against loops written out, against torch's own attention, and by differences."""

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from loopwise.nn.attention import attend_dense
from loopwise.nn.kernels import why_no_cpu_kernels
from loopwise.nn.kernels.causal import causal_attention, load_causal_kernels, rotary_attention
from loopwise.nn.rotary import Rotary, RotaryLayout, rotary_tables, rotate

pytestmark = pytest.mark.skipif(load_causal_kernels() is None, reason=f"no CPU kernels: {why_no_cpu_kernels()}")


class Case(NamedTuple):
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    width: int
    begins: tuple[int, ...]
    """Where documents begin in the first row; the other rows are one document each."""


CASES = [
    Case(1, 1, 1, 1, 1, (0,)),
    Case(2, 1, 4, 2, 64, (0,)),
    Case(2, 7, 2, 2, 5, (0, 1, 2, 6)),
    Case(2, 16, 3, 1, 8, (0, 16)),
    Case(1, 49, 4, 4, 32, (0, 48)),
    Case(3, 50, 6, 2, 20, (0, 7, 13)),
    Case(2, 97, 2, 1, 128, (0, 33)),
    Case(1, 203, 2, 2, 64, (0, 97, 98, 194)),
    Case(1, 64, 2, 1, 33, tuple(range(64))),
]


def starts_of(case: Case) -> Tensor:
    begins = torch.tensor(case.begins)[:, None] <= torch.arange(case.tokens)
    starts = torch.zeros(case.batch, case.tokens, dtype=torch.int32)
    starts[0] = torch.tensor(case.begins)[begins.sum(0) - 1]
    return starts


def draw(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values, and a gradient of the answers; the values as a part of something wider."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.heads, case.kv_heads, 2 * case.kv_heads, case.heads)
    drawn = [
        torch.randn(case.batch, case.tokens, count, case.width, generator=generator, dtype=torch.float64).to(dtype)
        for count in heads
    ]
    drawn[2] = drawn[2][:, :, case.kv_heads :]
    return drawn


def naive(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    out = torch.empty_like(q)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for h in range(q.shape[2]):
                read = slice(int(starts[b, t]), t + 1)
                scores = k[b, read, h // group] @ q[b, t, h] / q.shape[3] ** 0.5
                out[b, t, h] = torch.softmax(scores, 0) @ v[b, read, h // group]
    return out


def torchs(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    places = torch.arange(q.shape[1])
    mask = (places[:, None] >= places) & (places >= starts[:, :, None])
    return attend_dense(q, k, v, mask[:, None])


def with_gradients(attention, inputs: list[Tensor], starts: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attention(*leaves, starts)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_loops_written_out(case: Case) -> None:
    inputs, starts = draw(case, torch.float64), starts_of(case)
    torch.testing.assert_close(
        causal_attention(*inputs[:3], starts), naive(*inputs[:3], starts), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_torch_with_its_gradients(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    inputs, starts = draw(case, dtype), starts_of(case)
    found, expected = (with_gradients(attention, inputs, starts) for attention in (causal_attention, torchs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_gradients_are_differences() -> None:
    case = Case(2, 9, 4, 2, 3, (0, 1, 6))
    inputs = [x.detach().requires_grad_() for x in draw(case, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, starts_of(case)), inputs)


def turned(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Rotary]:
    """A fused projection as a part of something wider, and the tables of some positions."""
    q, k, v, _ = draw(case, dtype)
    wide = torch.cat((q, k, v, v), dim=2)
    positions = torch.arange(3, 3 + case.batch * case.tokens).view(case.batch, case.tokens)
    return wide[:, :, : case.heads + 2 * case.kv_heads], rotary_tables(positions, case.width, 1e4, dtype)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("case", [case for case in CASES if case.width % 2 == 0], ids=str)
def test_rotating_within_equals_rotating_before(case: Case, layout: RotaryLayout) -> None:
    (qkv, rotary), starts, grad = turned(case), starts_of(case), draw(case, torch.float64)[3]
    leaf = qkv.detach().requires_grad_()
    q, k, v = leaf.split((case.heads, case.kv_heads, case.kv_heads), dim=2)
    before = causal_attention(rotate(q, rotary, layout), rotate(k, rotary, layout), v, starts)
    within = rotary_attention(leaf, rotary, starts, kv_heads=case.kv_heads, layout=layout)
    torch.testing.assert_close(within, before, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(out, leaf, grad)[0] for out in (within, before))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_gradients_through_rotations_are_differences(layout: RotaryLayout) -> None:
    case = Case(2, 7, 4, 2, 4, (0, 1, 5))
    qkv, rotary = turned(case)
    leaf, starts = qkv.detach().requires_grad_(), starts_of(case)
    assert torch.autograd.gradcheck(
        lambda qkv: rotary_attention(qkv, rotary, starts, kv_heads=case.kv_heads, layout=layout), leaf
    )


def test_refuses_tables_of_other_shapes_and_dtypes() -> None:
    case = Case(2, 7, 4, 2, 4, (0,))
    (qkv, rotary), starts = turned(case), starts_of(case)
    with pytest.raises(ValueError, match="do not fit"):
        rotary_attention(qkv, Rotary(*(x[:, 1:] for x in rotary)), starts, kv_heads=2, layout="half")
    with pytest.raises(ValueError, match="dtypes differ"):
        rotary_attention(qkv, Rotary(*(x.float() for x in rotary)), starts, kv_heads=2, layout="half")


def test_any_layout_of_heads() -> None:
    case = Case(2, 11, 4, 2, 8, (0, 4))
    inputs, starts = draw(case, torch.float64), starts_of(case)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    apart = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs]
    expected = with_gradients(causal_attention, inputs, starts)
    for other in (turned, apart):
        for one, reference in zip(with_gradients(causal_attention, other, starts), expected, strict=True):
            assert torch.equal(one, reference)


def test_large_scores_stay_finite() -> None:
    case = Case(1, 40, 2, 2, 16, (0, 20))
    inputs, starts = draw(case, torch.float32), starts_of(case)
    inputs[0] = inputs[0] * 1e4
    found, expected = (with_gradients(attention, inputs, starts) for attention in (causal_attention, torchs))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in found)


def test_what_is_not_finite_is_not_hidden() -> None:
    case = Case(1, 40, 2, 2, 16, (0, 20))
    inputs, starts = draw(case, torch.float32), starts_of(case)
    for what in (0, 1, 2, 3):
        for value in (torch.nan, torch.inf):
            broken = [x.clone() for x in inputs]
            broken[what][0, 5, 1, 3] = value
            found = with_gradients(causal_attention, broken, starts)
            assert not all(x.isfinite().all() for x in found)
            assert all(x[:, 20:].isfinite().all() for x in found)


def test_a_document_does_not_see_its_neighbours_nor_threads() -> None:
    case = Case(2, 150, 4, 2, 32, (0, 60))
    inputs, starts = draw(case, torch.float32), starts_of(case)
    whole = with_gradients(causal_attention, inputs, starts)
    part = [x[:1, 60:] for x in inputs]
    alone = with_gradients(causal_attention, part, torch.zeros(1, 90, dtype=torch.int32))
    for one, other in zip(alone, whole, strict=True):
        assert torch.equal(one, other[:1, 60:])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for one, other in zip(with_gradients(causal_attention, inputs, starts), whole, strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("starts", [[0, 0, 1], [1, 1, 2], [0, 2, 2], [0, 1, 0], [0, -1, 2]])
def test_refuses_starts_that_are_no_documents(starts: list[int]) -> None:
    q = torch.zeros(1, 3, 1, 4)
    with pytest.raises(ValueError, match="starts are not those of documents"):
        causal_attention(q, q, q, torch.tensor([starts], dtype=torch.int32))


def test_refuses_shapes_that_do_not_fit() -> None:
    q, starts = torch.zeros(1, 3, 3, 4), torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit"):
        causal_attention(q, q[:, :, :2], q[:, :, :2], starts)


def test_refuses_dtypes_that_differ() -> None:
    q, starts = torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="dtypes differ"):
        causal_attention(q, q, q.bfloat16(), starts)


def test_the_switch_turns_it_off() -> None:
    script = "from loopwise.nn.kernels.causal import load_causal_kernels; print(load_causal_kernels())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={"LOOPWISE_KERNELS": "off"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "None\n"
