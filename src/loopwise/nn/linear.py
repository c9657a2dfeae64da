"""A linear layer with more outputs than inputs, and how its weight takes its gradient on a CPU.

Axes: "..." are rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopwise.nn.kernels.turn import in_rows


class WideLinear(nn.Linear):
    """`nn.Linear` without a bias. A compiled core on a CPU computes the gradient of a tall weight transposed.

    As (inputs, outputs) MKL computes it some 10% faster than as (outputs, inputs). What several loops give is added up
    as it lies, and `turn_gradient` turns the sum.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        on_cpu = input.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        tall = self.out_features > self.in_features
        if torch.compiler.is_compiling() and torch.is_grad_enabled() and on_cpu and tall:
            product: Callable[..., Tensor] = TurnedProduct.apply
            return product(input, self.weight)
        return super().forward(input)

    def turn_gradient(self) -> None:
        """From now on a transposed gradient is laid like the weight by all threads; autograd does it with one."""
        self.weight.register_hook(in_rows)  # type: ignore[no-untyped-call]


class TurnedProduct(torch.autograd.Function):
    """x W^T; the gradient of W is the transposed view of one that lies as (inputs, outputs)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, (x.flatten(0, -2).t() @ grad.flatten(0, -2)).t()
