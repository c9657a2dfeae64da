"""Stopping by a draw: each unit leaves at a loop drawn from its own exit distribution.

PonderNet at inference (Banino et al. 2021, arXiv 2107.05407, section 2.3) tosses a coin with the hazard's chance after
every loop. That is the same as drawing one number u in (0, 1) per unit and leaving at the first loop at which the
chance of having left, 1 - prod (1 - hazard), reaches u, so one addressed number per unit is all that it takes.

The rule is an object and has no text, since what draws for the units of a run is no policy that a server could keep:
it needs to be told who the units are.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.loops.exits import ExitRule, Observation, Tracker
from loopwise.nn.noise import uniform


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampled(ExitRule):
    """For `run_until` with a model whose signal is a hazard."""

    name: ClassVar[str] = "sampled"
    form: ClassVar[str] = "Sampled(seed=S)"
    formula: ClassVar[str] = "1 - prod_{j<=i} (1 - hazard_j) >= u, with u uniform, one for each unit"
    source: ClassVar[str] = "PonderNet, arXiv 2107.05407, section 2.3"
    example: ClassVar[str] = "Sampled(seed=0)"
    needs = frozenset({"signal"})

    seed: int = 0
    """The draws are a function of it and of the units' numbers."""
    numbers: Int[Tensor, " units"] | None = None
    """A number for each unit, so that a unit's draw does not depend on its batch; None: 0, 1, 2, ..."""

    @property
    def signal_kind(self) -> str:
        return "hazard"

    @classmethod
    def parse(cls, argument: str) -> ExitRule:
        raise ConfigError(f"exit rule sampled:{argument} has no text; make one with {cls.example}")

    @property
    def argument(self) -> str:
        return str(self.seed)

    def track(self, units: int, device: torch.device | str | None = None) -> Tracker:
        numbers = torch.arange(units) if self.numbers is None else self.numbers.cpu()
        if len(numbers) != units:
            raise InputError(f"Sampled has numbers for {len(numbers)} units, and {units} run; give one for each")
        return _SampledTracker(uniform(self.seed, "sampled exit", numbers).to(device))


class _SampledTracker(Tracker):
    def __init__(self, thresholds: Tensor) -> None:
        super().__init__(len(thresholds), thresholds.device)
        self._thresholds = thresholds
        self._survival = torch.ones_like(thresholds)

    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        going_on = self._survival * (1 - observation.read("signal").double())
        # fmin passes over NaN, and no comparison with NaN holds.
        self._survival = torch.fmin(self._survival, going_on)
        return 1 - going_on >= self._thresholds
