"""Memory for running many tokens of many sequences through the loops together while tokens leave one by one.

All tokens start at loop 1 at once, so one buffer per layer is enough: a token overwrites its keys and values at
every loop until it stops, and a reader at loop d finds loop min(d, e) of a token that stopped at e. That is the
plane policy `last_exited`. Axes: B batch, T tokens, N rows, H heads, G key-value heads, K head width.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.nn.attention import attend_dense


@dataclass
class LockstepMemory:
    """Keys and values of whole sequences, written by the rows that are still running."""

    mask: Bool[Tensor, "batch tokens tokens"]
    """Which earlier token each token may read."""
    batch: Int[Tensor, " rows"]
    """Sequence of each running row; rows are sorted by (sequence, position)."""
    token: Int[Tensor, " rows"]
    """Index of each running row in its sequence."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """(B, T, G, K) by layer."""
    values: dict[int, Tensor] = field(default_factory=dict)

    def plane(self, loop: int) -> "LockstepMemory":
        return self

    def keep(self, index: Int[Tensor, " kept"]) -> "LockstepMemory":
        """The same buffers, written and read by fewer rows."""
        return LockstepMemory(self.mask, self.batch[index], self.token[index], self.keys, self.values)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "rows heads head_width"],
        k: Float[Tensor, "rows kv_heads head_width"],
        v: Float[Tensor, "rows kv_heads head_width"],
    ) -> Float[Tensor, "rows heads head_width"]:
        sequences, tokens, _ = self.mask.shape
        if layer not in self.keys:
            self.keys[layer] = k.new_zeros(sequences, tokens, *k.shape[1:])
            self.values[layer] = v.new_zeros(sequences, tokens, *v.shape[1:])
        self.keys[layer][self.batch, self.token] = k
        self.values[layer][self.batch, self.token] = v

        counts = torch.bincount(self.batch, minlength=sequences)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(self.batch), device=q.device) - first[self.batch]
        queries = q.new_zeros(sequences, int(counts.max()), *q.shape[1:])
        queries[self.batch, place] = q
        # Empty places read everything: a row of softmax without any key would be NaN.
        readable = torch.ones(sequences, queries.shape[1], tokens, dtype=torch.bool, device=q.device)
        readable[self.batch, place] = self.mask[self.batch, self.token]
        out = attend_dense(queries, self.keys[layer], self.values[layer], readable[:, None])
        return out[self.batch, place]
