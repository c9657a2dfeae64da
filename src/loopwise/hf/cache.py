"""Keys and values in a transformers cache: one slot per loop and core layer, one per prelude and coda layer.

Axes: B batch, T new tokens, P tokens seen with the new ones, H heads, G key-value heads, K head width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache

from loopwise.errors import ConfigError
from loopwise.models.config import LoopedLMConfig
from loopwise.nn.attention import attend_dense


class LoopedCache(DynamicCache):
    """A `DynamicCache` that grows a slot when a loop first needs it, and that belongs to one number of loops."""

    def __init__(self) -> None:
        super().__init__()
        self.num_loops: int | None = None
        """Loops of the passes that filled it."""

    def claim(self, num_loops: int) -> None:
        """Note the loops of the pass that begins.

        Raises:
            ConfigError: when earlier tokens were run for another number: their deeper planes would be missing or old.
        """
        if self.get_seq_length() and self.num_loops != num_loops:
            raise ConfigError(
                f"num_loops={num_loops}: this cache was filled with num_loops={self.num_loops}; "
                "go on with that, or start with a new cache"
            )
        self.num_loops = num_loops


@dataclass(frozen=True, kw_only=True)
class CachedMemory:
    """The memory of a pass over new tokens: reads and writes a `LoopedCache`."""

    cache: LoopedCache
    config: LoopedLMConfig
    mask: Bool[Tensor, "batch one new seen"] | None
    """Which new token may read which seen one; None means plain causal, for a pass that begins the sequence."""

    def plane(self, loop: int) -> "CachedPlane":
        return CachedPlane(self, loop)

    def slot(self, layer: int, loop: int) -> int:
        """Prelude, coda, then the core layers of loop 1, of loop 2 and so on."""
        config = self.config
        if layer < config.prelude_layers:
            return layer
        if layer >= config.prelude_layers + config.core_layers:
            return layer - config.core_layers
        return config.coda_layers + layer + (loop - 1) * config.core_layers


@dataclass(frozen=True)
class CachedPlane:
    """One loop of a `CachedMemory`."""

    memory: CachedMemory
    loop: int

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "batch new heads head_width"],
        k: Float[Tensor, "batch new kv_heads head_width"],
        v: Float[Tensor, "batch new kv_heads head_width"],
    ) -> Float[Tensor, "batch new heads head_width"]:
        slot = self.memory.slot(layer, self.loop)
        keys, values = self.memory.cache.update(k.transpose(1, 2), v.transpose(1, 2), slot)
        return attend_dense(q, keys.transpose(1, 2), values.transpose(1, 2), self.memory.mask)


def cached_mask(
    new: int, seen: int, real: Bool[Tensor, "batch seen"] | None, device: torch.device
) -> Bool[Tensor, "#batch one new seen"] | None:
    """True where a new token may read a seen one; None when plain causal attention says it all.

    Args:
        new: tokens of this pass, the last ones.
        seen: tokens of this pass and of those before it.
        real: False at padding; None when there is none.
    """
    if real is None and new == seen:
        return None
    columns = torch.arange(seen, device=device)
    rows = columns[seen - new :, None]
    mask = (columns <= rows)[None]
    if real is not None:
        # Padding reads itself: a row of softmax without any key would be NaN.
        mask = (mask & real[:, None, :]) | (columns == rows)
    return mask[:, None]
