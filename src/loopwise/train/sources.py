"""Where batches come from: a corpus of text, or questions made in code."""

import os
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.hub.tokenizer import Tokenizer
from loopwise.nn.noise import integer
from loopwise.tasks.corpus import Corpus
from loopwise.tasks.pointer_chasing import PointerChasing
from loopwise.train.batches import Batch
from loopwise.train.packing import Packing, shuffled
from loopwise.train.token_store import TokenStore, token_store

_VALIDATION_TOKENS = 8192


class PackedSource:
    """Text: rows of a token store in a new random order in each epoch.

    Args:
        train: the tokens to learn from.
        validation: the tokens held out, if any.
        vocab_size: the tokenizer's.
        length: T, tokens per row.
        seed: of the order.
        micros: micro-batches per step; with `rows` it decides which rows a step takes.
        first_row: rows that earlier stages have used up.

    Raises:
        InputError: `train` does not fill one row.
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        train: TokenStore,
        validation: TokenStore | None,
        vocab_size: int,
        length: int,
        seed: int = 0,
        micros: int = 1,
        first_row: int = 0,
    ) -> None:
        if micros < 1 or first_row < 0:
            raise ConfigError(f"micros={micros} and first_row={first_row}; give at least 1 and at least 0")
        self.vocab_size = vocab_size
        self.train = Packing(train, length)
        self.train.require_full_row()
        self.held_out = None if validation is None else Packing(validation, length)
        self.seed = seed
        self.micros = micros
        self.first_row = first_row

    @classmethod
    def open(
        cls,
        corpus: Corpus,
        tokenizer: Tokenizer,
        cache: str | os.PathLike[str],
        *,
        length: int,
        seed: int = 0,
        micros: int = 1,
        held_out: float = 0.05,
    ) -> "PackedSource":
        """Both parts of a corpus, from the token stores in `cache` or newly made there.

        Raises as `token_store` does.
        """
        train = token_store(corpus, tokenizer, cache, part="train", held_out=held_out)
        kept = token_store(corpus, tokenizer, cache, part="validation", held_out=held_out) if held_out > 0 else None
        return cls(
            train=train, validation=kept, vocab_size=tokenizer.vocab_size, length=length, seed=seed, micros=micros
        )

    def batch(self, step: int, micro: int, *, rows: int) -> Batch:
        """Rows that no other micro-batch of the epoch takes."""
        if not 0 <= micro < self.micros:
            raise ConfigError(f"micro-batch {micro} of {self.micros}; make the source with micros={micro + 1} or more")
        first = self.first_row + (step * self.micros + micro) * rows
        return self.train.rows(shuffled(torch.arange(first, first + rows), len(self.train), seed=self.seed))

    def validation(self, rows: int) -> list[Batch]:
        """Rows spread evenly over the held-out text."""
        if self.held_out is None:
            return []
        count = min(rows, len(self.held_out))
        indices = torch.arange(count) * len(self.held_out) // count
        return [self.held_out.rows(part) for part in _parts(indices, self.held_out.length)]

    def state(self) -> dict[str, Any]:
        """Digests of both stores and what cuts and orders the rows."""
        return {
            "kind": "packed",
            "train": self.train.store.facts.digest,
            "validation": None if self.held_out is None else self.held_out.store.facts.digest,
            "length": self.train.length,
            "seed": self.seed,
            "micros": self.micros,
            "first_row": self.first_row,
        }


class PointerChasingSource:
    """Questions made as they are needed; the loss of a k-hop question counts from loop k on.

    Args:
        task: what to ask.
        seed: of the questions.
    """

    def __init__(self, task: PointerChasing, *, seed: int = 0) -> None:
        self.task = task
        self.vocab_size = task.vocab_size
        self.seed = seed

    def batch(self, step: int, micro: int, *, rows: int) -> Batch:
        """New tables and questions in each micro-batch."""
        return self._questions(integer(self.seed, f"pointer chasing {step} {micro}"), torch.arange(rows))

    def validation(self, rows: int) -> list[Batch]:
        """Fixed questions with a seed of their own."""
        seed = integer(self.seed, "pointer chasing validation")
        return [self._questions(seed, part) for part in _parts(torch.arange(rows), self.task.length)]

    def state(self) -> dict[str, Any]:
        """The task's shape and the seed."""
        return {"kind": "pointer chasing", **vars(self.task.config), "seed": self.seed}

    def _questions(self, seed: int, indices: Int[Tensor, " rows"]) -> Batch:
        questions = self.task.generate(seed, indices)
        return Batch(
            tokens=questions.tokens,
            targets=questions.answers,
            documents=torch.zeros_like(questions.tokens),
            mask=questions.hops > 0,
            first_loop=questions.hops,
        )


def _parts(indices: Int[Tensor, " rows"], length: int) -> tuple[Tensor, ...]:
    """Validation rows in batches of about as many tokens whatever their length."""
    return torch.split(indices, max(1, _VALIDATION_TOKENS // length))
