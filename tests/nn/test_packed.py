"""Packed weights give the products and gradients of plain ones."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from loopwise.loops.drivers import unroll
from loopwise.nn.packed import Linear, lent, pack

tiny = runpy.run_path(str(Path(__file__).parent.parent / "models" / "naive_lm.py"))["tiny"]

needs_mkl = pytest.mark.skipif(not hasattr(torch.ops.mkl, "_mkl_linear"), reason="this torch was built without MKL")


def gradients(linear: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = linear(x)
    factors = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * factors).sum().backward()
    return out.detach(), x.grad, linear.weight.grad


@needs_mkl
@pytest.mark.parametrize(("width", "out"), [(24, 40), (40, 24)])
def test_equals_the_plain_product_in_float64(width: int, out: int) -> None:
    torch.manual_seed(0)
    linear = Linear(width, out)
    reference = copy.deepcopy(linear).double()
    x = torch.randn(3, 5, width)
    packs = pack([linear], rows=15)
    assert list(packs) == [linear]
    with lent(packs):
        found = gradients(linear, x)
    assert linear.packed is None
    for mine, theirs in zip(found, gradients(reference, x.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-6)


def test_nothing_is_packed_where_it_would_not_help() -> None:
    assert not pack([Linear(8, 8).double(), nn.Linear(8, 8)], rows=4)
    with torch.no_grad():
        assert not pack([Linear(8, 8)], rows=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not pack([Linear(8, 8)], rows=4)


@needs_mkl
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("backprop", [None, 2])
def test_a_packed_model_learns_the_same(backprop: int | None, checkpoint: bool) -> None:
    model = tiny("ouro", seed=1).float()
    reference = copy.deepcopy(model).double()
    tokens = torch.randint(23, (2, 6), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])
    for each in (model, reference):
        context = each.pack(each.encode(tokens, documents=documents))
        assert bool(context.packs) == (each is model)
        out = unroll(each, context, loops=3, backprop=backprop, checkpoint=checkpoint, collect=("logits",))
        out.logits[-1].log_softmax(-1)[..., 3].mean().backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if wanted[name].grad is not None:
            torch.testing.assert_close(parameter.grad.double(), wanted[name].grad, rtol=1e-4, atol=1e-5)
