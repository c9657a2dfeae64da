"""One transformer block with the five norm layouts that looped checkpoints use, and a stack of them."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from loopwise.nn.attention import Attention, Plane
from loopwise.nn.mlp import GatedMLP
from loopwise.nn.norms import RMSNorm
from loopwise.nn.rotary import Rotary

NormLayout = Literal["pre", "post", "branch", "pre_branch", "pre_post"]
"""Where a branch f is normalised:

pre         x + f(n1(x))           Llama
post        n1(x + f(x))           the original transformer
branch      x + n1(f(x))           OLMo-2
pre_branch  x + n2(f(n1(x)))       Ouro ("sandwich")
pre_post    n2(x + f(n1(x)))       Huginn ("sandwich")
"""

NORM_LAYOUTS: tuple[NormLayout, ...] = ("pre", "post", "branch", "pre_branch", "pre_post")


class Residual(nn.Module):
    """One branch (attention or MLP) with its norms around it."""

    def __init__(self, branch: nn.Module, layout: NormLayout, width: int, eps: float) -> None:
        super().__init__()
        self.branch = branch
        self.layout = layout
        self.norm_in = RMSNorm(width, eps) if layout in ("pre", "pre_branch", "pre_post") else None
        self.norm_out = RMSNorm(width, eps) if layout != "pre" else None

    def forward(self, x: Float[Tensor, "... width"], *args: object) -> Float[Tensor, "... width"]:
        out: Tensor = self.branch(x if self.norm_in is None else self.norm_in(x), *args)
        if self.norm_out is None:
            return x + out
        normed: Tensor = x + self.norm_out(out) if self.layout in ("branch", "pre_branch") else self.norm_out(x + out)
        return normed


class Block(nn.Module):
    """Attention, then MLP."""

    def __init__(self, attention: Attention, mlp: GatedMLP, layout: NormLayout, width: int, eps: float) -> None:
        super().__init__()
        self.attention = Residual(attention, layout, width, eps)
        self.mlp = Residual(mlp, layout, width, eps)

    def forward(self, x: Float[Tensor, "... width"], rotary: Rotary, plane: Plane) -> Float[Tensor, "... width"]:
        out: Tensor = self.mlp(self.attention(x, rotary, plane))
        return out


class Stack(nn.ModuleList):
    """Blocks applied one after the other."""

    def forward(self, x: Float[Tensor, "... width"], rotary: Rotary, plane: Plane) -> Float[Tensor, "... width"]:
        for block in self:
            x = block(x, rotary, plane)
        return x
