"""What every task made in code shares: problems with exact answers, a stated difficulty, and a verifier.

A problem is a function of (seed, its own number) alone: no order of drawing, no batch size and no worker changes it,
so that a training run that was killed goes on with the same data, and train and test sets are two seeds.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int, Real
from torch import Tensor

IGNORED = -100
"""The target of a place where nothing is asked; torch's cross-entropy passes over it."""


@dataclass(frozen=True, kw_only=True)
class Problems:
    """N problems with their answers."""

    inputs: Any
    """What the model's `encode` takes: a tensor (N, ...) or a nest of them, N leading."""
    targets: Int[Tensor, "problems *places"]
    """The right class at each place that is asked, `IGNORED` elsewhere; where several are right, one of them."""
    difficulty: Real[Tensor, " problems"]
    """How hard each problem is; the task says in which unit."""

    def __len__(self) -> int:
        return len(self.targets)


@runtime_checkable
class Task(Protocol):
    """A generator of problems with a verifier, which later serves as a reward."""

    def draw(self, seed: int, numbers: Int[Tensor, " problems"]) -> Problems:
        """The problems with these numbers under `seed`."""
        ...

    def verify(self, problems: Problems, answers: Int[Tensor, "problems *places"]) -> Bool[Tensor, " problems"]:
        """Whether each answer, one class per place, is right as a whole; places that are not asked do not count."""
        ...


class ExactTask(ABC):
    """Base of tasks whose problems have one right answer each."""

    @abstractmethod
    def draw(self, seed: int, numbers: Int[Tensor, " problems"]) -> Problems:
        """The problems with these numbers under `seed`."""

    def verify(self, problems: Problems, answers: Int[Tensor, "problems *places"]) -> Bool[Tensor, " problems"]:
        """Whether each answer equals the target at every place that is asked."""
        same = (answers == problems.targets) | (problems.targets == IGNORED)
        return same.reshape(len(same), -1).all(1)


def generator(seed: int, domain: str, number: int) -> np.random.Generator:
    """A stream of random numbers for one problem, the same on every machine."""
    words = [part for text in (domain,) for part in text.encode()]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number, *words])))


def numbers(start: int, count: int) -> Int[Tensor, " problems"]:
    """Problem numbers start, start + 1, ...: what `draw` takes."""
    return torch.arange(start, start + count)
