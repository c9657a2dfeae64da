"""A looped model of which everything is known: it finds a number after as many loops as the number says.

`Countdown` reads numbers 1 to K, one per problem, or several places of them; after loop r its answer is right at every
place whose number is at most r, and it answers class 0 elsewhere. Its certainty is the share of places found.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopwise.loops.protocol import LoopFacts, LoopModel
from loopwise.tasks.problems import ExactTask, Problems


@dataclass(frozen=True, kw_only=True)
class Numbers(ExactTask):
    """Problems: `places` numbers from 1 to `most`; the difficulty is the largest."""

    most: int = 4
    places: int = 1

    def draw(self, seed: int, numbers: Tensor) -> Problems:
        spread = numbers[:, None] * 7 + torch.arange(self.places) * 3 + seed
        drawn = 1 + (spread * 2654435761 % 4294967296) // 65536 % self.most
        targets = drawn if self.places > 1 else drawn[:, 0]
        return Problems(inputs=drawn.double(), targets=targets, difficulty=drawn.max(1).values.double())


class Countdown(LoopModel):
    """See above. The state is the number of loops and a copy of the numbers."""

    def __init__(self, *, most: int = 4, sharp: float = 3.0, single: bool = True) -> None:
        super().__init__()
        self.most, self.sharp, self.single = most, sharp, single
        self.facts = LoopFacts(
            unit="sample",
            signal="certainty",
            anytime=True,
            trained_loops=(1, most),
            random_start=False,
            loop_dependent=False,
            readout_mixes=False,
        )

    def encode(self, inputs: Tensor, **options: Any) -> Mapping[str, Tensor]:
        return {"numbers": inputs}

    def initial_state(self, context: Mapping[str, Tensor], start: Any = None) -> Tensor:
        return torch.zeros(len(context["numbers"]), 1, dtype=torch.float64)

    def step(self, state: Tensor, context: Mapping[str, Tensor], loop: int) -> Tensor:
        return state + 1

    def readout(self, state: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        numbers = context["numbers"].long()
        known = torch.where(numbers <= state, numbers, 0)
        logits = self.sharp * torch.nn.functional.one_hot(known, self.most + 1).double()
        return logits[:, 0] if self.single else logits

    def signal(self, state: Tensor, prediction: Tensor | None) -> Tensor:
        return (state / self.most).clamp(max=1).flatten().double()
