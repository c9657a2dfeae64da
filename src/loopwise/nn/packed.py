"""Products with weights that are packed once and then multiplied in every loop.

A matrix product on a CPU first copies both factors into the order that its kernel reads. A looped model multiplies by
the same weights in every loop, so the weights' part of that copy is made once per batch (with MKL's packed format) and
serves every loop's forward and backward pass. At width 512 these products are 8 to 10% faster, and reach the rate of
large square ones.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One weight in MKL's order, good for products with a fixed number of rows and until the weight changes."""

    forward: Tensor
    """For x @ W.T; opaque."""
    backward: Tensor
    """For g @ W; opaque."""


class Linear(nn.Linear):
    """A linear map without bias that can be lent a packed copy of its weight."""

    packed: Packed | None

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=False)
        self.packed = None

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... out"]:
        packed = self.packed
        if packed is None:
            return F.linear(x, self.weight)
        out: Tensor = packed_linear(x, self.weight, packed.forward, packed.backward)
        return out


def pack(modules: Iterable[nn.Module], *, rows: int) -> dict[Linear, Packed]:
    """Packed copies of the weights of every `Linear` in `modules`, for products with `rows` rows.

    Empty where it would not help or is not to be had: without MKL, on other devices, in other dtypes than float32, and
    where no gradient is wanted.
    """
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not hasattr(torch.ops.mkl, "_mkl_linear"):
        return {}
    found = [module for module in modules if isinstance(module, Linear)]
    with torch.no_grad():
        return {
            linear: Packed(forward=_reorder(linear.weight, rows), backward=_reorder(linear.weight.t(), rows))
            for linear in found
            if linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32
        }


@contextmanager
def lent(packs: dict[Linear, Packed]) -> Iterator[None]:
    """Within, these linear maps use these packed weights."""
    for linear, packed in packs.items():
        linear.packed = packed
    try:
        yield
    finally:
        for linear in packs:
            linear.packed = None


def _reorder(weight: Tensor, rows: int) -> Tensor:
    packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), rows)
    return packed


# Operators of our own, because torch.compile knows MKL's only with weights that never change.
@torch.library.custom_op("loopwise::packed_product", mutates_args=())
def packed_product(x: Tensor, weight: Tensor, packed: Tensor) -> Tensor:
    """x @ weight.T, for (..., in) and (out, in); of `weight` only the shape is looked at. Not differentiable."""
    product: Tensor = torch.ops.mkl._mkl_linear(x, packed, weight, None, x.numel() // x.shape[-1])
    return product


@packed_product.register_fake
def _(x: Tensor, weight: Tensor, packed: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("loopwise::packed_linear", mutates_args=())
def packed_linear(x: Tensor, weight: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """x @ weight.T with the tensors of a `Packed`, differentiable in x and weight."""
    product: Tensor = torch.ops.mkl._mkl_linear(x, forward, weight, None, x.numel() // x.shape[-1])
    return product


@packed_linear.register_fake
def _(x: Tensor, weight: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, weight, _, backward = inputs
    ctx.save_for_backward(x, weight, backward)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight, backward = ctx.saved_tensors
    grad_x = packed_product(grad, weight.t(), backward) if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[1]:
        left, right = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        # Either order gives the gradient; a tall product writes far apart and is some 8% slower than a wide one.
        tall = left.shape[1] > right.shape[1]
        grad_weight = (right.t() @ left).t() if tall else left.t() @ right
    return grad_x, grad_weight, None, None


packed_linear.register_autograd(_gradients, setup_context=_keep)
