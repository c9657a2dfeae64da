"""Root-mean-square normalisation (Zhang & Sennrich 2019)."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; statistics in float32, or in x's dtype when that is wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        on_cpu = x.device.type == "cpu" and x.dtype == wide.dtype == self.weight.dtype
        if torch.compiler.is_compiling() and torch.is_grad_enabled() and x.dim() == 3 and on_cpu:
            norm: Callable[..., Tensor] = CompiledNorm.apply
            return norm(x, self.weight, self.eps)
        return (wide * _scale(wide, self.eps)).to(x.dtype) * self.weight


def _scale(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class CompiledNorm(torch.autograd.Function):
    """The same for (B, T, D) with its gradients written out: the weight's is summed over the batch, then over tokens.

    For one sum over both, the compiler's code for a CPU walks down columns of the whole, which takes longer than all
    else in the way back of a norm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        weighted = grad * weight
        pull = (weighted * x).mean(-1, keepdim=True) * scale * scale * scale
        return weighted * scale - x * pull, (grad * (x * scale)).sum(0).sum(0), None
