"""PonderNet's parity: a vector with some entries set to 1 or -1 and the others 0; are the ones odd in number?

Difficulty is how many entries are not 0. Training on 1 to k of them and testing on more asks whether a network carries
its procedure on (Banino et al. 2021, arXiv 2107.05407, section 3.1: of 96 entries 1 to 48 in training, 49 to 96 in the
test).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.tasks.problems import ExactTask, Problems, generator


@dataclass(frozen=True, kw_only=True)
class NonzeroParityConfig:
    """Sizes of the task."""

    entries: int = 64
    """Length of the vectors."""
    fewest: int = 1
    """Least number of entries that are not 0."""
    most: int | None = None
    """Largest number of entries that are not 0; None: all."""

    def __post_init__(self) -> None:
        if not 0 <= self.fewest <= self.largest <= self.entries or self.entries < 1:
            raise ConfigError(
                f"entries={self.entries}, fewest={self.fewest}, most={self.most}: "
                "allowed is 0 <= fewest <= most <= entries, such as entries=64 fewest=1 most=32"
            )

    @property
    def largest(self) -> int:
        """Largest number of entries that are not 0."""
        return self.entries if self.most is None else self.most


class NonzeroParity(ExactTask):
    """The task. Inputs are (N, entries) in float32, targets (N, 1) of classes 0, even, and 1, odd.

    How many entries are not 0 is uniform from `fewest` to `most`, where they stand is uniform, each is 1 or -1.
    """

    def __init__(self, config: NonzeroParityConfig) -> None:
        self.config = config

    def draw(self, seed: int, numbers: Int[Tensor, " problems"]) -> Problems:
        """The vectors with these numbers under `seed`."""
        config = self.config
        vectors = np.zeros((len(numbers), config.entries), dtype=np.float32)
        for vector, number in zip(vectors, numbers.tolist(), strict=True):
            random = generator(seed, "nonzero parity", number)
            count = int(random.integers(config.fewest, config.largest + 1))
            vector[random.permutation(config.entries)[:count]] = 2 * random.integers(0, 2, count) - 1
        drawn = torch.from_numpy(vectors)
        return Problems(
            inputs=drawn,
            targets=((drawn == 1).sum(1, keepdim=True) % 2).long(),
            difficulty=(drawn != 0).sum(1),
        )
