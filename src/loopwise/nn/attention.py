"""Self-attention that reads and writes keys and values only through a plane.

Axes: B batch, T tokens, H heads, G key-value heads, K head width, D width; "..." is (B, T) or a flat list of rows.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn

from loopwise.nn.kernels.causal import DTYPES, causal_attention, rotary_attention
from loopwise.nn.linear import WideLinear
from loopwise.nn.norms import RMSNorm
from loopwise.nn.rotary import Rotary, RotaryLayout, rotate


@runtime_checkable
class Plane(Protocol):
    """The keys and values of one loop index, as one kind of memory keeps them."""

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "... heads head_width"],
        k: Float[Tensor, "... kv_heads head_width"],
        v: Float[Tensor, "... kv_heads head_width"],
    ) -> Float[Tensor, "... heads head_width"]:
        """Write k and v of `layer`, then answer q from everything that it may read."""
        ...


def attend_dense(
    q: Float[Tensor, "batch queries heads head_width"],
    k: Float[Tensor, "batch keys kv_heads head_width"],
    v: Float[Tensor, "batch keys kv_heads head_width"],
    mask: Bool[Tensor, "#batch #one queries keys"] | Float[Tensor, "#batch #one queries keys"] | None,
) -> Float[Tensor, "batch queries heads head_width"]:
    """Softmax attention; `mask` is True where a query may read a key, or added to the scores; None: plain causal."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


class CausalMemory:
    """No memory at all: every pass sees the whole sequence at once, so each plane is what was just computed."""

    def __init__(
        self,
        mask: Bool[Tensor, "#batch one tokens tokens"] | Float[Tensor, "#batch one tokens tokens"] | None = None,
        starts: Int32[Tensor, "batch tokens"] | None = None,
    ) -> None:
        self.mask = mask
        """See `attend_dense`."""
        self.starts = starts
        """The same in fewer numbers, where the mask allows runs of tokens and the kernel can be had: see
        `causal_attention`."""

    def plane(self, loop: int) -> "CausalMemory":
        """The same object for every loop: a compiled core then never sees a loop index."""
        return self

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "batch tokens heads head_width"],
        k: Float[Tensor, "batch tokens kv_heads head_width"],
        v: Float[Tensor, "batch tokens kv_heads head_width"],
    ) -> Float[Tensor, "batch tokens heads head_width"]:
        # Autocast may leave queries and values in different dtypes.
        if self.starts is not None and q.dtype in DTYPES and q.dtype == k.dtype == v.dtype:
            return causal_attention(q, k, v, self.starts)
        return attend_dense(q, k, v, self.mask)


@runtime_checkable
class Memory(Protocol):
    """What a caller hands to a model: one plane per loop. Loop 0 belongs to prelude and coda."""

    def plane(self, loop: int) -> Plane: ...


class Attention(nn.Module):
    """Multi-head or grouped-query attention with rotary positions and one fused projection (rows: q, k, v)."""

    def __init__(
        self,
        *,
        layer: int,
        width: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        rotary: RotaryLayout,
        qk_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.rotary_layout: RotaryLayout = rotary
        self.qkv = WideLinear(width, (heads + 2 * kv_heads) * head_width)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(heads + kv_heads, head_width)) if qk_bias else None
        # OLMo-2 normalises queries and keys over all heads together, before they are split.
        self.q_norm = RMSNorm(heads * head_width, qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(kv_heads * head_width, qk_norm_eps) if qk_norm_eps is not None else None

    def forward(self, x: Float[Tensor, "... width"], rotary: Rotary, plane: Plane) -> Float[Tensor, "... width"]:
        qkv = self.qkv(x)
        starts = self._starts(qkv, rotary, plane)
        if starts is None:
            answers = self._attend(qkv, rotary, plane)
        else:
            heads = qkv.unflatten(-1, (-1, self.head_width))
            answers = rotary_attention(heads, rotary, starts, kv_heads=self.kv_heads, layout=self.rotary_layout)
        out: Tensor = self.out(answers.flatten(-2))
        return out

    def _starts(self, qkv: Tensor, rotary: Rotary, plane: Plane) -> Tensor | None:
        """Where documents begin, if one call may rotate and attend; else None."""
        if not isinstance(plane, CausalMemory) or self.q_norm is not None or self.qk_bias is not None:
            return None
        fits = qkv.dtype in DTYPES and qkv.dtype == rotary.cos.dtype and rotary.cos.shape[:-1] == qkv.shape[:-1]
        return plane.starts if fits else None

    def _attend(self, qkv: Tensor, rotary: Rotary, plane: Plane) -> Tensor:
        groups = [self.heads * self.head_width, self.kv_heads * self.head_width, self.kv_heads * self.head_width]
        q, k, v = torch.split(qkv, groups, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = torch.unflatten(q, -1, (self.heads, self.head_width))
        k = torch.unflatten(k, -1, (self.kv_heads, self.head_width))
        v = torch.unflatten(v, -1, (self.kv_heads, self.head_width))
        if self.qk_bias is not None:
            q, k = q + self.qk_bias[: self.heads], k + self.qk_bias[self.heads :]
        q, k = rotate(q, rotary, self.rotary_layout), rotate(k, rotary, self.rotary_layout)
        return plane.attend(self.layer, q, k, v)
