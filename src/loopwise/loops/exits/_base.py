"""What every exit rule is made of: an observation, a rule, and a tracker that remembers per unit."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.loops.hazard import widen

Need = Literal["state", "signal", "logits", "allowance"]
Device = torch.device | str | None


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What is known of N units after one loop. A rule reads only what its `needs` name; the rest may be None."""

    loop: int | Int[Tensor, " units"]
    """The loop that has just run, counted from 1; a tensor when units are at different loops."""
    state: Float[Tensor, " units *state"] | None = None
    """State after this loop."""
    previous: Float[Tensor, " units *state"] | None = None
    """State before this loop; at loop 1 the start state."""
    signal: Float[Tensor, " units"] | None = None
    """The model's signal, in float32 or wider."""
    logits: Float[Tensor, " units *places vocab"] | None = None
    """Readout of this loop; `places` are positions inside one unit, none for token models."""
    allowance: Float[Tensor, " units"] | None = None
    """Loops the unit may still run after this one. Only budget rules read it; it may be fractional or negative."""

    def read(self, name: Literal["state", "previous", "signal", "logits", "allowance"]) -> Tensor:
        """One field that must be there.

        Raises:
            InputError: the field is None.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise InputError(f"the exit rule reads {name!r}, which was not observed; pass {name}= in Observation(...)")
        return value


class Tracker(ABC):
    """Watches N units of one rule from their loop 1 on.

    Every tensor attribute has the units as its leading axis and every tracker attribute watches the same units:
    `keep` and `join` rely on it, so a subclass need not write them. A tensor that can only be sized at the first
    observation starts as None.
    """

    def __init__(self, units: int, device: Device = None) -> None:
        self.seen: Int[Tensor, " units"] = torch.zeros(units, dtype=torch.long, device=device)
        """Observations each unit has had before this one; 0 means that nothing is remembered of it."""

    @abstractmethod
    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        """Which units stop after this loop; also takes into memory what later loops compare with."""

    @torch.no_grad()
    def update(self, observation: Observation) -> Bool[Tensor, " units"]:
        """True for each unit that should stop after the observed loop. Call it once per loop, from loop 1 on.

        Raises:
            InputError: a needed field is missing, or holds another number of units than this tracker.
        """
        units = self.seen.shape[0]
        for name in ("state", "previous", "signal", "logits", "allowance"):
            tensor = getattr(observation, name)
            if tensor is not None and tensor.shape[0] != units:
                raise InputError(
                    f"observed {name} has {tensor.shape[0]} units, the tracker has {units}; "
                    "call tracker.keep(index) when units leave"
                )
        fired = self.judge(observation)
        self.seen = self.seen + 1
        return fired

    def keep(self, index: Int[Tensor, " kept"]) -> None:
        """Go on with the units in `index`, in that order, and forget the others."""
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value[index])
            elif isinstance(value, Tracker):
                value.keep(index)

    def join(self, other: "Tracker") -> None:
        """Take in the units of another tracker of the same rule, after one's own; they may be at other loops."""
        units, joining = self.seen.shape[0], other.seen.shape[0]
        for name, mine in list(vars(self).items()):
            theirs = getattr(other, name)
            if isinstance(mine, Tracker):
                mine.join(theirs)
            elif isinstance(mine, Tensor) or isinstance(theirs, Tensor):
                if mine is None:
                    mine = theirs.new_zeros(units, *theirs.shape[1:])
                if theirs is None:
                    theirs = mine.new_zeros(joining, *mine.shape[1:])
                setattr(self, name, torch.cat([mine, theirs]))


class ExitRule(ABC):
    """A policy that decides, unit by unit, whether a loop was the last one. Rules are immutable and hashable.

    `str(rule)` is its canonical text and `parse_rule(str(rule)) == rule`.
    """

    name: ClassVar[str]
    """First word of the rule's text; set by the decorator `rule`."""
    form: ClassVar[str]
    """The rule's text with letters for its numbers."""
    formula: ClassVar[str]
    """When it fires after loop i."""
    source: ClassVar[str]
    """Paper and equation, or whose idea it is."""
    example: ClassVar[str]
    """A text that parses."""
    default: ClassVar[str | None] = None
    """What the bare name stands for; None when a number has to be given."""
    earliest: ClassVar[str] = "1"
    """First loop at which it can fire."""
    needs_in_words: ClassVar[str | None] = None
    """Replaces the list of `needs` in documentation, where that depends on the model or on an inner rule."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """What an observation must hold, so that a driver computes nothing else."""

    @property
    def signal_kind(self) -> str | None:
        """The only kind of signal this rule can read; None when it reads none or any."""
        return None

    @classmethod
    @abstractmethod
    def parse(cls, argument: str) -> "ExitRule":
        """The rule from what follows `name:` in its text.

        Raises:
            ConfigError: not a number, or out of range.
        """

    @property
    @abstractmethod
    def argument(self) -> str:
        """What follows `name:` in the canonical text."""

    @abstractmethod
    def track(self, units: int, device: Device = None) -> Tracker:
        """Start watching `units` units, all before their loop 1."""

    def bind(self, signal_kind: str | None) -> "ExitRule":
        """This rule for a model whose signal is of the given kind (None: it has no signal).

        Raises:
            ConfigError: the rule reads another kind of signal.
        """
        if "signal" in self.needs and (signal_kind is None or self.signal_kind not in (None, signal_kind)):
            raise ConfigError(
                f"exit rule '{self}' reads a {self.signal_kind or 'signal'}; this model's signal is "
                f"{signal_kind or 'none'}; type for example delta:0.03, which reads states only"
            )
        return self

    def __str__(self) -> str:
        return f"{self.name}:{self.argument}"


@dataclass(frozen=True, kw_only=True)
class ThresholdRule(ExitRule):
    """A rule with one finite number."""

    threshold: float
    """Compared with what the rule measures."""

    allowed: ClassVar[str] = "any finite number"

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold) or not self.permits(self.threshold):
            raise ConfigError(wrong_number(type(self), f"{self.threshold:g}", self.allowed))
        object.__setattr__(self, "threshold", float(self.threshold))

    @staticmethod
    def permits(threshold: float) -> bool:
        """Whether a finite threshold is in range; `allowed` says the same in words."""
        return True

    @classmethod
    def parse(cls, argument: str) -> "ExitRule":
        return cls(threshold=parse_number(cls, argument, cls.allowed))

    @property
    def argument(self) -> str:
        return repr(self.threshold)


@dataclass(frozen=True, kw_only=True)
class InstantRule(ThresholdRule):
    """A rule with one number and no memory: it judges each loop by itself."""

    @abstractmethod
    def fires(self, observation: Observation) -> Bool[Tensor, " units"]:
        """Which units stop after this loop."""

    def track(self, units: int, device: Device = None) -> Tracker:
        return _Instant(self.fires, units, device)


class _Instant(Tracker):
    def __init__(self, fires: Callable[[Observation], Tensor], units: int, device: Device) -> None:
        super().__init__(units, device)
        self._fires = fires

    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        return self._fires(observation)


@dataclass(frozen=True, kw_only=True)
class CountRule(ExitRule):
    """A rule with one whole number of loops."""

    count: int
    """Loops, 1 or more."""

    allowed: ClassVar[str] = "a whole number, 1 or more"

    def __post_init__(self) -> None:
        check_count(type(self), self.count, self.allowed)

    @classmethod
    def parse(cls, argument: str) -> "ExitRule":
        return cls(count=parse_count(cls, argument, cls.allowed))

    @property
    def argument(self) -> str:
        return str(self.count)


def wrong_number(rule: type[ExitRule], given: str, allowed: str) -> str:
    """The one-line message for a number a rule cannot take."""
    return f"exit rule {rule.form} was given {given!r}; allowed is {allowed}; type for example {rule.example}"


def parse_number(rule: type[ExitRule], text: str, allowed: str) -> float:
    """A number out of a rule's text; ConfigError when it is none."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(wrong_number(rule, text, allowed)) from None


def parse_count(rule: type[ExitRule], text: str, allowed: str) -> int:
    """A whole number out of a rule's text; ConfigError when it is none."""
    try:
        return int(text)
    except ValueError:
        raise ConfigError(wrong_number(rule, text, allowed)) from None


def check_count(rule: type[ExitRule], count: object, allowed: str) -> None:
    """Refuse what is not a whole number from 1 on."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(wrong_number(rule, str(count), allowed))


def features(tensor: Tensor) -> Float[Tensor, " units features"]:
    """A unit's numbers as one row, in float32 or wider; works for no units and for one number per unit."""
    return widen(tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1))
