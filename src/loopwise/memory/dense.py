"""The readable memory: one dense table of keys and values per loop and layer, for one sequence.

It is the reference that paged planes are tested against. Axes: R loops, T positions, N rows, H heads,
G key-value heads, K head width.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.nn.attention import attend_dense

DensePolicy = Literal["per_loop", "last_exited"]
"""Which plane a reader at loop d finds of a token that stopped at loop e.

per_loop     plane d, as trained: a stopped token runs on to fill its planes. Saves latency, not work.
last_exited  plane min(d, e): a stopped token does not run on. Saves work, changes numbers.
"""


def check_policy(policy: str) -> DensePolicy:
    """The policy of this name.

    Raises:
        ConfigError: when there is none.
    """
    for allowed in get_args(DensePolicy):
        if policy == allowed:
            return allowed  # type: ignore[no-any-return]  # one of the literals
    raise ConfigError(f"policy={policy!r}: allowed are {', '.join(get_args(DensePolicy))}")


class DenseMemory:
    """Keys and values of one growing sequence, a plane per loop; loop 0 holds prelude and coda layers."""

    def __init__(self, *, loops: int, capacity: int) -> None:
        self.loops = loops
        self.capacity = capacity
        self.positions: Int[Tensor, " rows"] = torch.zeros(0, dtype=torch.long)
        """Positions of the rows that run now; set by the caller before each pass."""
        self._tables: dict[int, Float[Tensor, "2 loops positions kv_heads head_width"]] = {}
        """By layer; keys, then values."""
        self._looped: set[int] = set()

    def plane(self, loop: int) -> "DensePlane":
        return DensePlane(self, loop)

    def settle(self, position: int, loop: int) -> None:
        """Let readers of the planes after `loop` find that plane at `position` (policy `last_exited`)."""
        if loop < self.loops:
            for layer in self._looped:
                table = self._tables[layer]
                table[:, loop:, position] = table[:, loop - 1 : loop, position]

    def write(self, layer: int, loop: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (N, G, K) of the running rows; return everything up to their last position."""
        if layer not in self._tables:
            planes = self.loops if loop else 1
            self._tables[layer] = k.new_zeros(2, planes, self.capacity, *k.shape[1:])
            if loop:
                self._looped.add(layer)
        keys, values = self._tables[layer][:, max(loop - 1, 0)]
        keys[self.positions] = k
        values[self.positions] = v
        seen = int(self.positions[-1]) + 1
        return keys[:seen], values[:seen]

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(table.nbytes for table in self._tables.values())


@dataclass(frozen=True)
class DensePlane:
    """One loop of a `DenseMemory`."""

    memory: DenseMemory
    loop: int

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "rows heads head_width"],
        k: Float[Tensor, "rows kv_heads head_width"],
        v: Float[Tensor, "rows kv_heads head_width"],
    ) -> Float[Tensor, "rows heads head_width"]:
        keys, values = self.memory.write(layer, self.loop, k, v)
        columns = torch.arange(len(keys), device=q.device)
        mask = columns[None, :] <= self.memory.positions[:, None]
        return attend_dense(q[None], keys[None], values[None], mask[None, None])[0]
