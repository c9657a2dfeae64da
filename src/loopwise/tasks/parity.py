"""Cumulative parity (Darlow et al. 2025, arXiv 2505.05522, section 5.1): at every place, how many -1s so far, mod 2?

Input: (N, length) of +1 and -1. Target at place p: 1 if an odd number of -1s stands at places up to p, else 0. All
places are seen at once, so that what a sequence model does by walking must be done by thinking.

Difficulty: the number of -1s, which is how often the answer changes along the sequence.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.nn.noise import uniform
from loopwise.tasks.problems import ExactTask, Problems


@dataclass(frozen=True, kw_only=True)
class CumulativeParity(ExactTask):
    """The task; each sign is drawn on its own."""

    length: int = 16
    """Places. The paper has 64."""
    negatives: tuple[float, float] = (0.5, 0.5)
    """Chance of a -1. Where the two ends differ, each problem draws its own chance between them, which spreads
    difficulties widely; the paper's is one half for all."""

    def __post_init__(self) -> None:
        low, high = self.negatives
        if self.length < 1:
            raise ConfigError(f"length={self.length}; give 1 or more places")
        if not 0.0 <= low <= high <= 1.0:
            raise ConfigError(f"negatives={self.negatives}; give two chances from 0 to 1, the lower one first")

    def draw(self, seed: int, numbers: Int[Tensor, " problems"]) -> Problems:
        rows = numbers.reshape(-1, 1)
        low, high = self.negatives
        chance = low + (high - low) * uniform(seed, "parity chance", rows)
        negative = uniform(seed, "parity signs", rows, torch.arange(self.length)) < chance
        return Problems(
            inputs=1.0 - 2.0 * negative.float(),
            targets=negative.long().cumsum(1) % 2,
            difficulty=negative.sum(1),
        )
