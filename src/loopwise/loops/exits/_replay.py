"""What a rule would have decided on recorded loops: the naive reference for every driver and engine."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.loops.exits._base import ExitRule, Observation
from loopwise.loops.exits._nested import Budget
from loopwise.loops.exits._registry import parse_rule


def replay(
    rule: str | ExitRule,
    *,
    states: Float[Tensor, "..."] | None = None,
    signals: Float[Tensor, "..."] | None = None,
    logits: Float[Tensor, "..."] | None = None,
    min_loops: int = 1,
    start: Float[Tensor, "..."] | None = None,
    signal_kind: str | None = None,
    unit_axes: int | None = None,
) -> Int[Tensor, "..."]:
    """The loop at which each unit stops, counted from 1; R where the rule never fires.

    The rule watches from loop 1 on; it stops a unit at the first loop >= `min_loops` after which it fires. Budget
    rules take the last unit axis as one request, its units in order, and every other unit axis as requests.

    Args:
        states: states after each loop, (R, units..., *state).
        signals: (R, units...), of the kind the rule reads.
        logits: (R, units..., V), with positions inside a unit before V.
        min_loops: no unit stops earlier; 1 to R.
        start: the state before loop 1, (units..., *state). Without it the change made by loop 1 is unknown and
            rules that measure changes cannot judge it: they may stop a loop later than a driver would.
        signal_kind: what `signals` are; checks that they suit the rule. When it is not given, `certainty` takes
            them for certainties if there are no logits.
        unit_axes: number of unit axes after R. When it is not given, all axes of `signals`, or else all but the
            last of `states` or `logits`, are units.

    Raises:
        ConfigError: bad rule, `min_loops`, or a tensor that the rule needs is missing.
        InputError: tensors that do not fit each other.
    """
    rule = parse_rule(rule)
    if signal_kind is not None:
        rule = rule.bind(signal_kind)
    elif signals is not None and logits is None and "logits" in rule.needs:
        rule = rule.bind("certainty")
    recorded = {"state": states, "signal": signals, "logits": logits}
    for need, name in (("state", "states"), ("signal", "signals"), ("logits", "logits")):
        if need in rule.needs and recorded[need] is None:
            raise ConfigError(f"exit rule '{rule}' reads {name}, which were not recorded; pass {name}=")
    shape = _unit_shape(states, signals, logits, unit_axes)
    loops, units = shape[0], shape[1:]
    if not 1 <= min_loops <= loops:
        raise ConfigError(f"min_loops={min_loops}: allowed is 1 to {loops}, the number of recorded loops")
    if states is not None and start is not None and start.shape != states.shape[1:]:
        raise InputError(
            f"start has shape {tuple(start.shape)}; allowed is {tuple(states.shape[1:])}, that of states[0]"
        )

    # Without a start state the first change is NaN, which stops nothing.
    before = start if start is not None or states is None else torch.full_like(states[0], math.nan)
    recording = _Recording(states, before, signals, logits, axes=len(units))
    if "allowance" not in rule.needs:
        return recording.exits(rule, min_loops).view(units)
    if not isinstance(rule, Budget):
        raise ConfigError(f"exit rule '{rule}' reads an allowance, which replay knows only for budget:MEAN:RULE")
    return _replay_budget(rule, recording, units, min_loops)


class _Recording:
    """Recorded tensors with their unit axes flattened into one: (R, N, ...)."""

    def __init__(
        self, states: Tensor | None, start: Tensor | None, signals: Tensor | None, logits: Tensor | None, *, axes: int
    ) -> None:
        self.states = _flat(states, 1, axes)
        self.start = _flat(start, 0, axes)
        self.signals = _flat(signals, 1, axes)
        self.logits = _flat(logits, 1, axes)
        first = next(part for part in (self.states, self.signals, self.logits) if part is not None)
        self.loops, self.units, self.device = first.shape[0], first.shape[1], first.device

    def pick(self, index: Tensor) -> "_Recording":
        """The same of some units."""
        parts = [part if part is None else part[:, index] for part in (self.states, self.signals, self.logits)]
        start = None if self.start is None else self.start[index]
        return _Recording(parts[0], start, parts[1], parts[2], axes=1)

    def exits(self, rule: ExitRule, min_loops: int, earned: Tensor | None = None) -> Int[Tensor, " units"]:
        """First loop from `min_loops` on after which the rule fires. `earned`: loops each unit may run, (N,)."""
        exits = torch.full((self.units,), self.loops, dtype=torch.long, device=self.device)
        running = torch.ones_like(exits, dtype=torch.bool)
        tracker = rule.track(self.units, self.device)
        previous = self.start
        for loop in range(1, self.loops + 1):
            state = None if self.states is None else self.states[loop - 1]
            fired = tracker.update(
                Observation(
                    loop=loop,
                    state=state,
                    previous=previous,
                    signal=None if self.signals is None else self.signals[loop - 1],
                    logits=None if self.logits is None else self.logits[loop - 1],
                    allowance=None if earned is None else earned - loop,
                )
            )
            previous = state
            if loop >= min_loops:
                exits[running & fired] = loop
                running &= ~fired
        return exits


def _replay_budget(rule: Budget, recording: _Recording, units: torch.Size, min_loops: int) -> Tensor:
    length = units[-1] if units else 1
    requests = math.prod(units[:-1])
    index = torch.arange(requests * length, device=recording.device).view(requests, length)
    exits = torch.zeros_like(index)
    spent = exits.new_zeros(requests)
    for begun in range(1, length + 1):
        earned = rule.allowance(begun, spent.double())
        part = recording.pick(index[:, begun - 1])
        exits[:, begun - 1] = part.exits(rule, min_loops, earned)
        spent = exits[:, :begun].sum(dim=1)
    return exits.view(units)


def _unit_shape(
    states: Tensor | None, signals: Tensor | None, logits: Tensor | None, unit_axes: int | None
) -> torch.Size:
    """(R, units...), which all recorded tensors share."""
    given = {"states": states, "signals": signals, "logits": logits}
    present = {name: tensor for name, tensor in given.items() if tensor is not None}
    if not present:
        raise ConfigError("nothing to replay; pass states=, signals= or logits= of shape (R, units..., ...)")
    if unit_axes is None:
        unit_axes = signals.dim() - 1 if signals is not None else next(iter(present.values())).dim() - 2
    first, *others = present.items()
    for name, tensor in present.items():
        if unit_axes < 0 or tensor.dim() < 1 + unit_axes + (name != "signals"):
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}; allowed is (R, units..., ...) with {unit_axes} unit axes; "
                "pass unit_axes= if that is not their number"
            )
    shape = first[1].shape[: 1 + unit_axes]
    for name, tensor in others:
        if tensor.shape[: 1 + unit_axes] != shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}, {first[0]} has {tuple(first[1].shape)}; "
                f"their first {1 + unit_axes} axes (R, units...) must be equal"
            )
    return shape


def _flat(tensor: Tensor | None, before: int, axes: int) -> Tensor | None:
    """Merge the `axes` unit axes that follow the first `before` ones."""
    if tensor is None:
        return None
    head, units, tail = tensor.shape[:before], tensor.shape[before : before + axes], tensor.shape[before + axes :]
    return tensor.reshape(*head, math.prod(units), *tail)
