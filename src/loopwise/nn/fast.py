"""A model's twin for serving on a CPU: the same weights, with the kernels of few rows wherever they can be had."""

from typing import TypeVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopwise.nn.attention import Attention, Plane
from loopwise.nn.gate import HazardGate
from loopwise.nn.kernels.linear import fast_twin
from loopwise.nn.kernels.rows import gate_rows, hazard_rows, norm_rows, rotate_rows
from loopwise.nn.mlp import GatedMLP
from loopwise.nn.norms import RMSNorm
from loopwise.nn.rotary import Rotary

Model = TypeVar("Model", bound=nn.Module)


class FastNorm(RMSNorm):
    """An `RMSNorm` in one call."""

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        out = norm_rows(x, self.weight, self.eps)
        return super().forward(x) if out is None else out


class FastMLP(GatedMLP):
    """A `GatedMLP` whose gate is one call."""

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        both: Tensor = self.gate_up(x)
        gated = gate_rows(both)
        if gated is None:
            gate, up = both.chunk(2, dim=-1)
            gated = F.silu(gate) * up
        out: Tensor = self.down(gated)
        return out


class FastAttention(Attention):
    """An `Attention` that rotates queries and keys where they lie, in one call."""

    def forward(self, x: Float[Tensor, "... width"], rotary: Rotary, plane: Plane) -> Float[Tensor, "... width"]:
        if x.dim() != 2 or self.q_norm is not None or self.qk_bias is not None:
            return super().forward(x, rotary, plane)
        qkv = self.qkv(x)
        turned = self.heads + self.kv_heads
        if rotate_rows(qkv, *rotary, heads=turned, interleaved=self.rotary_layout == "interleaved"):
            parts = qkv.view(len(x), -1, self.head_width)
            q, k, v = parts.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            answers = plane.attend(self.layer, q, k, v)
        else:
            answers = self._attend(qkv, rotary, plane)
        out: Tensor = self.out(answers.flatten(-2))
        return out


class FastGate(HazardGate):
    """A `HazardGate` in one call."""

    def hazard(self, seen: Float[Tensor, "... width"]) -> Float[Tensor, "..."]:
        out = hazard_rows(seen, self.weight, self.bias)
        return super().hazard(seen) if out is None else out


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: FastNorm,
    GatedMLP: FastMLP,
    Attention: FastAttention,
    HazardGate: FastGate,
}


def fast_model(model: Model) -> Model:
    """`fast_twin`, and norms, rotations and gates of few operations; elsewhere than on a CPU all is as it was."""
    twin = fast_twin(model)
    for module in twin.modules():
        module.__class__ = _FAST.get(type(module), type(module))
    return twin
