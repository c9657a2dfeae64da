"""Rules made from another rule."""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.loops.exits._base import (
    Device,
    ExitRule,
    Need,
    Observation,
    Tracker,
    check_count,
    parse_count,
    parse_number,
    wrong_number,
)
from loopwise.loops.exits._registry import parse_rule, rule

_AT_LEAST_ONE_LOOP = "a finite number, 1 or more"
_WHOLE = "a whole number, 1 or more"


@dataclass(frozen=True, kw_only=True)
class NestedRule(ExitRule):
    """A rule that asks another rule."""

    inner: ExitRule
    """The rule that is asked after every loop."""

    def __post_init__(self) -> None:
        if "allowance" in self.inner.needs:
            raise ConfigError(
                f"exit rule {self.form} was given '{self.inner}'; a budget goes outermost; "
                "type for example budget:2.5:patience:2:delta:0.03"
            )

    @property
    def needs(self) -> frozenset[Need]:
        return self.inner.needs

    @property
    def signal_kind(self) -> str | None:
        return self.inner.signal_kind

    def bind(self, signal_kind: str | None) -> ExitRule:
        return replace(self, inner=self.inner.bind(signal_kind))

    @property
    @abstractmethod
    def argument(self) -> str: ...


def _split(cls: type[ExitRule], argument: str) -> tuple[str, ExitRule]:
    number, colon, inner = argument.partition(":")
    if not colon:
        raise ConfigError(
            f"exit rule '{cls.name}:{argument}' lacks its inner rule ({cls.form}); type for example {cls.example}"
        )
    return number, parse_rule(inner)


@rule("patience")
@dataclass(frozen=True, kw_only=True)
class Patience(NestedRule):
    """The inner rule fired in K successive loops.

    PABEE (Zhou et al. 2020) stops when the predictions of successive internal classifiers agreed K times in a row
    (`stable:K`, which equals `patience:K:stable:1`); here any rule may take the place of "agreed".
    """

    count: int
    """Successive loops in which the inner rule has to fire."""

    form = "patience:K:RULE"
    formula = "RULE fired after each of the last K loops"
    source = "after PABEE, arXiv 2006.04152, which is `patience:K:stable:1`; the default is ours"
    default = example = "patience:2:delta:0.03"
    earliest = "K - 1 after RULE's"
    needs_in_words = "what RULE needs"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(type(self), self.count, _WHOLE)

    @classmethod
    def parse(cls, argument: str) -> ExitRule:
        number, inner = _split(cls, argument)
        return cls(count=parse_count(cls, number, _WHOLE), inner=inner)

    @property
    def argument(self) -> str:
        return f"{self.count}:{self.inner}"

    def track(self, units: int, device: Device = None) -> Tracker:
        return _PatienceTracker(self, units, device)


class _PatienceTracker(Tracker):
    def __init__(self, rule: Patience, units: int, device: Device) -> None:
        super().__init__(units, device)
        self._count = rule.count
        self._inner = rule.inner.track(units, device)
        self._streak = torch.zeros(units, dtype=torch.long, device=device)

    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        self._streak = torch.where(self._inner.update(observation), self._streak + 1, 0)
        return self._streak >= self._count


@rule("budget")
@dataclass(frozen=True, kw_only=True)
class Budget(NestedRule):
    """The inner rule, within a budget: a request earns MEAN loops with every unit it begins.

    A unit stops when its inner rule fires or when the request cannot pay another whole loop, so loops that easy
    units leave over are spent by later, harder ones and the mean never exceeds MEAN (unless `min_loops` forces it).
    Units of a request must be run in order, one after the other.
    """

    mean: float
    """Loops earned per unit, 1 or more, since every unit runs at least one."""

    form = "budget:MEAN:RULE"
    formula = "RULE fires, or fewer than 1 of the request's loops are left: MEAN * units begun - loops run < 1"
    source = "ours (a token bucket over loops)"
    default = example = "budget:2.5:hazard:0.6"
    needs_in_words = "allowance, and what RULE needs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.mean) or self.mean < 1:
            raise ConfigError(wrong_number(type(self), f"{self.mean:g}", _AT_LEAST_ONE_LOOP))
        object.__setattr__(self, "mean", float(self.mean))

    @property
    def needs(self) -> frozenset[Need]:
        return self.inner.needs | {"allowance"}

    @classmethod
    def parse(cls, argument: str) -> ExitRule:
        number, inner = _split(cls, argument)
        return cls(mean=parse_number(cls, number, _AT_LEAST_ONE_LOOP), inner=inner)

    @property
    def argument(self) -> str:
        return f"{self.mean!r}:{self.inner}"

    def allowance(self, units_begun: int, loops_run: Float[Tensor, " requests"]) -> Float[Tensor, " requests"]:
        """Loops each request may still run. `units_begun` counts the present unit, `loops_run` every loop so far."""
        return self.mean * units_begun - loops_run

    def track(self, units: int, device: Device = None) -> Tracker:
        return _BudgetTracker(self, units, device)


class _BudgetTracker(Tracker):
    def __init__(self, rule: Budget, units: int, device: Device) -> None:
        super().__init__(units, device)
        self._inner = rule.inner.track(units, device)

    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        return self._inner.update(observation) | (observation.read("allowance") < 1)
