"""Mano: modular arithmetic in prefix form, how much of a tree a model can evaluate in its head.

An expression of l operations is written operator first, and the answer is one number; nothing of the working is
written down, so depth must come from layers or from loops. Source: Physics of Language Models 4 (Mano), as Ouro uses
it (arXiv 2510.25741, section 6 and appendix B): modulus 23, training lengths uniform in 1..L, test at exactly L.

A node with l operations takes an operator uniformly, gives its left child a uniform 0..l-1 of the other operations and
its right child the rest; leaves are uniform. One row, here with modulus 7 and L = 3 (`(3 - 5) * 6` is 2 mod 7):

    bos  2  *  -  3  5  6  =  ·  ·        target at `=`: 2

Token ids, with modulus m and longest expression L:

    0 .. m-1       numbers
    m, m+1, m+2    + - *
    m+3            bos, at the beginning
    m+4            =, where the answer is read
    m+5            padding after it, which a causal model cannot see from there
    m+6 .. m+5+L   "l operations follow", l from 1 to L

The difficulty of a problem is l, its number of operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.problems import IGNORED, ExactTask, Problems, generator

_SIGNS = "+-*"


@dataclass(frozen=True, kw_only=True)
class ManoConfig:
    """The size of the task."""

    modulus: int = 23
    """m: numbers are 0..m-1."""
    operations: int = 10
    """L, the most operations of an expression."""
    shortest: int = 1
    """Fewest operations; each number from here to L is equally likely. L itself makes the paper's test."""
    asked: str = "answer"
    """`answer`: the value of the whole, at `=` alone (the paper). `parts`: besides, at each token that ends a part of
    the expression, the value of the largest part that ends there. Many more answers a row, so a small model learns
    sooner; what is asked at `=` is the same."""

    def __post_init__(self) -> None:
        if self.asked not in ("answer", "parts"):
            raise ConfigError(f"asked={self.asked!r} is unknown; give answer or parts")
        if not 1 <= self.shortest <= self.operations:
            raise ConfigError(
                f"mano with shortest={self.shortest} and operations={self.operations}; "
                f"give shortest from 1 to operations"
            )
        if self.modulus < 2 or self.operations < 1:
            raise ConfigError(
                f"mano with modulus={self.modulus} and operations={self.operations} asks nothing; "
                "give a modulus of at least 2 and at least 1 operation"
            )


class Mano(ExactTask):
    """The task: its tokens, its problems, and the truth about them."""

    def __init__(self, config: ManoConfig) -> None:
        self.config = config
        first = config.modulus + len(_SIGNS)
        self.bos, self.equals, self.padding, self.first_length = first, first + 1, first + 2, first + 3
        self.vocab_size = self.first_length + config.operations
        self.length = 2 * config.operations + 4
        """Tokens of a row: bos, length, 2L + 1 of the longest expression, equals."""

    def draw(self, seed: int, numbers: Int[Tensor, " problems"]) -> Problems:
        rows = np.full((len(numbers), self.length), self.padding, dtype=np.int64)
        targets = np.full_like(rows, IGNORED)
        counts = np.empty(len(numbers), dtype=np.int64)
        for row, number in enumerate(numbers.tolist()):
            expression = self._expression(generator(seed, "mano", number))
            counts[row] = len(expression) // 2
            end = 2 + len(expression)
            rows[row, :2] = self.bos, self.first_length + counts[row] - 1
            rows[row, 2:end] = expression
            rows[row, end] = self.equals
            values = self.parts(expression)
            if self.config.asked == "parts":
                targets[row, 2:end] = values
            targets[row, end] = values[-1]
        return Problems(
            inputs=torch.from_numpy(rows), targets=torch.from_numpy(targets), difficulty=torch.from_numpy(counts)
        )

    def _expression(self, random: np.random.Generator) -> list[int]:
        modulus, config = self.config.modulus, self.config
        count = int(random.integers(config.shortest, config.operations + 1))
        operators = random.integers(modulus, modulus + len(_SIGNS), count).tolist()
        leaves = random.integers(0, modulus, count + 1).tolist()
        splits = random.random(count).tolist()
        expression: list[int] = []
        pending = [count]
        while pending:
            here = pending.pop()
            if here == 0:
                expression.append(leaves.pop())
                continue
            expression.append(operators.pop())
            left = int(splits.pop() * here)
            pending += [here - 1 - left, left]
        return expression

    def solve(self, expression: Sequence[int]) -> int:
        """The value of a prefix expression of number and operator ids. Raises as `parts` does."""
        return self.parts(expression)[-1]

    def parts(self, expression: Sequence[int]) -> list[int]:
        """At each token the value of the largest part that ends there, `IGNORED` at operators; the whole's comes last.

        Raises:
            InputError: the tokens are not one whole expression.
        """
        modulus = self.config.modulus
        values = [IGNORED] * len(expression)
        # Operators that wait, each with the value of its left side once that is known.
        waiting: list[tuple[int, int | None]] = []
        whole = False
        for place, token in enumerate(expression):
            if whole or not 0 <= token < modulus + len(_SIGNS):
                whole = False
                break
            if token >= modulus:
                waiting.append((token - modulus, None))
                continue
            value = int(token)
            while waiting and waiting[-1][1] is not None:
                sign, left = waiting.pop()
                assert left is not None
                value = (left + value, left - value, left * value)[sign] % modulus
            if waiting:
                waiting[-1] = (waiting[-1][0], value)
            whole = not waiting
            values[place] = value
        if not whole:
            raise InputError(
                f"these {len(expression)} tokens are not one prefix expression; give an operator before its two sides, "
                f"such as {modulus} 1 2 for 1 + 2"
            )
        return values

    def text(self, tokens: Sequence[int]) -> str:
        """A row for people: `<2> * - 3 5 6 =`.

        Raises:
            InputError: an id outside the vocabulary.
        """
        return " ".join(filter(None, (self._piece(int(token)) for token in tokens)))

    def _piece(self, token: int) -> str:
        if not 0 <= token < self.vocab_size:
            raise InputError(
                f"token id {token} is outside the task's vocabulary; ids run from 0 to {self.vocab_size - 1}"
            )
        if token < self.config.modulus:
            return str(token)
        if token < self.bos:
            return _SIGNS[token - self.config.modulus]
        if token >= self.first_length:
            return f"<{token - self.first_length + 1}>"
        return "=" if token == self.equals else ""
