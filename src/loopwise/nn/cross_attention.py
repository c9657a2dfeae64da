"""Attention of one query per row over features that stay the same from loop to loop.

Keys and values are projected once, when the features are known. The layers are those of torch's
`nn.MultiheadAttention`, which would project them again at every call.

Axes: N rows, S places, F width, H heads, K head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Memories:
    """Features as they are attended to."""

    keys: Float[Tensor, "rows heads places head_width"]
    values: Float[Tensor, "rows heads places head_width"]


class CrossAttention(nn.Module):
    """Multi-head attention with biases, one query at a time."""

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        # As nn.MultiheadAttention begins: one Glorot draw for the stacked three, and no biases.
        limit = (6.0 / (4 * width)) ** 0.5
        for layer in (self.query, self.key, self.value):
            nn.init.uniform_(layer.weight, -limit, limit)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.zeros_(layer.bias)
        self.dropout = dropout

    def remember(self, features: Float[Tensor, "rows places width"]) -> Memories:
        """Keys and values of the features, once for all loops."""
        keys, values = (
            layer(features).unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous()
            for layer in (self.key, self.value)
        )
        return Memories(keys=keys, values=values)

    def weights(self, query: Float[Tensor, "rows width"], memories: Memories) -> Float[Tensor, "rows heads places"]:
        """How much of each place a head takes; sums to 1 over places."""
        asked = self.query(query).unflatten(-1, (self.heads, -1))
        scores = (memories.keys @ asked[..., None])[..., 0] * asked.shape[-1] ** -0.5
        return torch.softmax(scores, dim=-1)

    def forward(self, query: Float[Tensor, "rows width"], memories: Memories) -> Float[Tensor, "rows width"]:
        """What the heads take, projected."""
        weights = F.dropout(self.weights(query, memories), self.dropout, self.training)
        taken = (weights[:, :, None] @ memories.values)[:, :, 0]
        out: Tensor = self.out(taken.flatten(1))
        return out
