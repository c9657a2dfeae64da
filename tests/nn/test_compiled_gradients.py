"""Gradients that only a compiled core uses: against autograd's own, and by differences, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopwise.nn.kernels.turn import in_rows
from loopwise.nn.linear import TurnedProduct, WideLinear
from loopwise.nn.norms import CompiledNorm, RMSNorm


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


def test_norm_equals_the_eager_one_with_its_gradients() -> None:
    norm = RMSNorm(7, eps=1e-3).double()
    with torch.no_grad():
        norm.weight.copy_(draw(7))
    x, grad = draw(3, 5, 7).requires_grad_(), draw(3, 5, 7).flip(0)
    found, expected = CompiledNorm.apply(x, norm.weight, norm.eps), norm(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, (x, norm.weight), grad),
        torch.autograd.grad(expected, (x, norm.weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_are_differences() -> None:
    x, weight = draw(2, 3, 4).requires_grad_(), draw(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: CompiledNorm.apply(x, weight, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(TurnedProduct.apply, (x, draw(9, 4).requires_grad_()))


def test_turned_product_equals_linear_and_its_gradient_lies_transposed() -> None:
    x, weight, grad = draw(2, 5, 4).requires_grad_(), draw(9, 4).requires_grad_(), draw(2, 5, 9)
    found = torch.autograd.grad(TurnedProduct.apply(x, weight), (x, weight), grad)
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert found[1].t().is_contiguous()


def test_a_turned_gradient_is_laid_like_the_weight_after_several_loops() -> None:
    layer = WideLinear(32, 96).double()
    layer.turn_gradient()
    x = draw(4, 32)
    (TurnedProduct.apply(x, layer.weight).sum() + TurnedProduct.apply(3 * x, layer.weight).sum()).backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_contiguous()
    torch.testing.assert_close(layer.weight.grad, 4 * x.sum(0).expand(96, 32), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (16, 32), (48, 16), (2816, 512), (96, 80)])
def test_in_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = draw(*shape, dtype=dtype)
    turned = matrix.t().contiguous().t()
    found = in_rows(turned)
    assert found.is_contiguous()
    assert torch.equal(found, matrix)


def test_in_rows_leaves_alone_what_lies_right_and_what_autograd_watches() -> None:
    matrix = draw(32, 16)
    assert in_rows(matrix) is matrix
    watched = matrix.t().requires_grad_() * 1
    assert in_rows(watched) is watched
