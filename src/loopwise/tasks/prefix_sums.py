"""Prefix sums: at each bit of a string, are the ones up to and including it odd in number?

    bits     1 0 1 1 0
    answers  1 1 0 1 1

The last answer depends on the first bit, so a network that sees w places further with each loop needs about length / w
loops (Schwarzschild et al. 2021, arXiv 2106.04537, who train on 32 bits and test on 512). Bits come in as -0.5 and 0.5.
Difficulty is the length of the string: it is how far the first bit's news must travel.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.tasks.problems import ExactTask, Problems, generator


@dataclass(frozen=True, kw_only=True)
class PrefixSumsConfig:
    """The size of the task."""

    bits: int = 32
    """Length of every string."""

    def __post_init__(self) -> None:
        if self.bits < 1:
            raise ConfigError(f"bits={self.bits}: allowed is 1 or more, such as bits=32")


class PrefixSums(ExactTask):
    """The task. Inputs are (N, 1, bits) in float32, targets (N, bits) of classes 0, even, and 1, odd."""

    def __init__(self, config: PrefixSumsConfig) -> None:
        self.config = config

    def draw(self, seed: int, numbers: Int[Tensor, " problems"]) -> Problems:
        """The strings with these numbers under `seed`; each bit is 0 or 1, both as often."""
        bits = self.config.bits
        strings = np.zeros((len(numbers), bits), dtype=np.int64)
        for string, number in zip(strings, numbers.tolist(), strict=True):
            string[:] = generator(seed, "prefix sums", number).integers(0, 2, bits)
        drawn = torch.from_numpy(strings)
        return Problems(
            inputs=drawn.unsqueeze(1).float() - 0.5,
            targets=drawn.cumsum(1) % 2,
            difficulty=torch.full((len(numbers),), bits),
        )
