"""Blocks over a fixed set of places that all see each other: attention without a mask, or an MLP across places.

They are normalised after each branch and their norms have no weights (TRM and HRM). Axes: B batch, P places, D width.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopwise.nn.attention import Attention
from loopwise.nn.mlp import GatedMLP
from loopwise.nn.rotary import Rotary

Mixing = Literal["attention", "mlp"]


class OpenPlane:
    """Keys and values of this pass alone, all of them open to every query."""

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "batch places heads head_width"],
        k: Float[Tensor, "batch places kv_heads head_width"],
        v: Float[Tensor, "batch places kv_heads head_width"],
    ) -> Float[Tensor, "batch places heads head_width"]:
        grouped = q.shape[2] != k.shape[2]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=grouped
        )
        return out.transpose(1, 2)


class PostNormBlock(nn.Module):
    """n(x + mix(x)), then n(x + mlp(x)), where n divides by the root mean square.

    After an MLP across places the mean square is taken over the places too, feature by feature, as the authors do
    (TinyRecursiveModels, `mlp_t`).
    """

    def __init__(
        self, *, mixing: Mixing, places: int, width: int, heads: int, mlp_width: int, mixing_width: int, eps: float
    ) -> None:
        super().__init__()
        self.eps = eps
        self.attention: Attention | None = None
        self.across: GatedMLP | None = None
        if mixing == "attention":
            head_width = width // heads
            self.attention = Attention(
                layer=0, width=width, heads=heads, kv_heads=heads, head_width=head_width, rotary="half"
            )
        else:
            self.across = GatedMLP(places, mixing_width)
        self.mlp = GatedMLP(width, mlp_width)

    def forward(self, x: Float[Tensor, "batch places width"], rotary: Rotary) -> Float[Tensor, "batch places width"]:
        if self.attention is not None:
            x = unit_rms(x + self.attention(x, rotary, OpenPlane()), self.eps)
        elif self.across is not None:
            by_feature = x.transpose(1, 2)
            x = unit_rms(by_feature + self.across(by_feature), self.eps).transpose(1, 2)
        return unit_rms(x + self.mlp(x), self.eps)


def unit_rms(x: Float[Tensor, "... width"], eps: float) -> Float[Tensor, "... width"]:
    """x / rms(x) over the last axis; statistics in float32, or in x's dtype when that is wider."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)
