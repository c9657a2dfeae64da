"""Rows of a fixed length, cut from a token store, in an order that is a function of (seed, epoch).

The documents stand one after the other, and row i predicts tokens i*T + 1 to i*T + T of that stream, each token in
exactly one row. Each row says which document a token belongs to, so that attention stays within documents, and the
loss is masked where the target is the first token of the next document. The last row is padded.
"""

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.nn.noise import uniform
from loopwise.train.batches import Batch
from loopwise.train.token_store import TokenStore

_ROUNDS = 4


class Packing:
    """A token store seen as rows.

    Args:
        store: the tokens.
        length: T, tokens per row.

    Raises:
        ConfigError: the length is not positive.
        InputError: the store does not hold two tokens.
    """

    def __init__(self, store: TokenStore, length: int) -> None:
        if length < 1:
            raise ConfigError(f"rows of {length} tokens hold nothing; give a length of at least 1")
        if store.facts.tokens < 2:
            raise InputError(f"{store.folder} holds {store.facts.tokens} token; give more text")
        self.store = store
        self.length = length

    def __len__(self) -> int:
        return -(-(self.store.facts.tokens - 1) // self.length)

    def require_full_row(self) -> None:
        """Refuses a store that does not fill one row.

        Raises:
            InputError: it says how many tokens there are and which length would do.
        """
        tokens = self.store.facts.tokens
        if tokens <= self.length:
            raise InputError(
                f"the corpus makes {tokens} tokens, too few for one row of {self.length} and its last target; "
                f"give a length of at most {tokens - 1}, or more text"
            )

    def rows(self, indices: Int[Tensor, " rows"]) -> Batch:
        """The rows with these numbers, from 0 to `len(self) - 1`; `documents` counts padding as one more."""
        positions: NDArray[np.int64] = indices.numpy()[:, None] * self.length + np.arange(self.length)
        real = positions < self.store.facts.tokens - 1
        positions = np.where(real, positions, 0)
        documents = np.searchsorted(self.store.starts, positions.astype(np.uint64), side="right")
        following = np.searchsorted(self.store.starts, (positions + 1).astype(np.uint64), side="right")
        padding = self.store.facts.documents + 1
        return Batch(
            tokens=torch.from_numpy(np.where(real, self.store.tokens[positions], 0).astype(np.int64)),
            targets=torch.from_numpy(np.where(real, self.store.tokens[positions + 1], 0).astype(np.int64)),
            documents=torch.from_numpy(np.where(real, documents, padding).astype(np.int64) - 1),
            mask=torch.from_numpy(real & (documents == following)),
        )


def shuffled(positions: Int[Tensor, " rows"], size: int, *, seed: int) -> Int[Tensor, " rows"]:
    """Where endless passes over `size` rows, each in its own random order, stand at these positions.

    Position p is place p % size of pass p // size. Each pass is a permutation of all rows: a Feistel network over the
    next power of four, walked until it falls inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    It needs no memory, and any position is found without those before it.
    """
    epochs, place = positions // size, positions % size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    row = _feistel(place, epochs, half, seed)
    while bool((row >= size).any()):
        row = torch.where(row >= size, _feistel(row, epochs, half, seed), row)
    return row


def _feistel(value: Int[Tensor, " rows"], epochs: Int[Tensor, " rows"], half: int, seed: int) -> Int[Tensor, " rows"]:
    left, right = value >> half, value & ((1 << half) - 1)
    for turn in range(_ROUNDS):
        noise = uniform(seed, "row order", epochs, torch.tensor(turn), right)
        left, right = right, left ^ (noise * (1 << half)).long()
    return (left << half) | right
