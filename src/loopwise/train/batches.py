"""What training reads: batches that are a function of (seed, step, micro-batch)."""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of tokens with what should be predicted."""

    tokens: Int[Tensor, "rows tokens"]
    """Token ids that the model reads."""
    targets: Int[Tensor, "rows tokens"]
    """The right id at each position."""
    documents: Int[Tensor, "rows tokens"]
    """Attention stays within equal numbers, and positions restart with each."""
    mask: Bool[Tensor, "rows tokens"]
    """Whether a position's loss counts."""
    first_loop: Int[Tensor, "rows tokens"] | None = None
    """The loss counts from this loop on; `None`: at every loop."""

    def to(self, device: str | torch.device) -> "Batch":
        """The same batch on a device."""
        first_loop = None if self.first_loop is None else self.first_loop.to(device)
        return replace(
            self,
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            documents=self.documents.to(device),
            mask=self.mask.to(device),
            first_loop=first_loop,
        )


@runtime_checkable
class BatchSource(Protocol):
    """An endless supply of batches; all methods are pure functions of the source and their arguments."""

    vocab_size: int
    """Ids run from 0 to this number less one."""

    def batch(self, step: int, micro: int, *, rows: int) -> Batch:
        """The batch of a micro-batch of a step; steps count from 0 at the beginning of this source."""
        ...

    def validation(self, rows: int) -> list[Batch]:
        """The same at most `rows` rows each time, none of them in training; empty where nothing is held out."""
        ...

    def state(self) -> dict[str, Any]:
        """What decides the batches, as JSON: a resumed run must find the same."""
        ...
