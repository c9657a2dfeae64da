"""Three ways to run any looped model: a fixed number of loops, until a rule says stop, and in segments.

`unroll` is the naive reference that every faster path is tested against. R loops come first in collected tensors.
"""

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from loopwise.errors import ConfigError, LoopRangeWarning
from loopwise.loops.exits import ExitRule, Observation, parse_rule
from loopwise.loops.protocol import LoopModel, first_tensor, flat_state, scatter, select, stack, tree_map

Collect = Literal["states", "signals", "logits"]
_COLLECTABLE = ("states", "signals", "logits")


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """What a fixed number of loops left behind."""

    state: Any
    """The state after the last loop."""
    states: Any | None
    """States after each loop, (R, ...) in every tensor; None unless collected."""
    signals: Tensor | None
    """Signals after each loop, (R, units...); None unless collected, or when the model has no signal."""
    logits: Tensor | None
    """Readouts after each loop, (R, ...); None unless collected."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What running until a rule stops left behind."""

    prediction: Tensor
    """The readout of every unit from the state it stopped at."""
    state: Any
    """The state every unit stopped at."""
    loops: Int[Tensor, "..."]
    """Loops each unit ran, counted from 1 (0 for padding)."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One stretch of loops; its state carries gradient only from within the stretch."""

    index: int
    """Counted from 1."""
    state: Any
    prediction: Tensor
    signal: Tensor | None


def check_loops(model: LoopModel, loops: int) -> None:
    """Refuse a loop count that makes no sense and warn about one that was never trained."""
    if loops < 1:
        raise ConfigError(f"loops={loops}: allowed is 1 or more")
    most = model.facts.trained_loops[1]
    if loops > most:
        warnings.warn(
            f"loops={loops} is beyond the {most} loops seen in training; quality usually falls",
            LoopRangeWarning,
            stacklevel=3,
        )


def unroll(
    model: LoopModel,
    context: Any,
    *,
    loops: int,
    start: Any = None,
    backprop: int | None = None,
    collect: Collection[Collect] = (),
    checkpoint: bool = False,
    visit: Callable[[int, Any], None] | None = None,
) -> Unrolled:
    """Run every unit for `loops` loops.

    Args:
        context: what `model.encode` returned.
        backprop: only the last `backprop` loops carry gradient (truncated backpropagation); None means all of them.
        collect: which of "states", "signals" and "logits" to keep after each loop.
        checkpoint: forget what happens inside a loop and recompute it in the backward pass.
        visit: called with each loop index and the state after it; keeps what it likes without a stacked copy.

    Raises:
        ConfigError: for a loop count below 1, a negative `backprop` or an unknown thing to collect.
    """
    check_loops(model, loops)
    unknown = set(collect) - set(_COLLECTABLE)
    if unknown:
        raise ConfigError(f"collect={sorted(unknown)}: allowed are {', '.join(_COLLECTABLE)}")
    if backprop is not None and backprop < 0:
        raise ConfigError(f"backprop={backprop}: allowed is 0 or more loops, or None for all of them")
    grad = torch.is_grad_enabled()
    state = model.initial_state(context, start)
    states: list[Any] = []
    signals: list[Tensor] = []
    logits: list[Tensor] = []
    for loop in range(1, loops + 1):
        with torch.set_grad_enabled(grad and (backprop is None or loop > loops - backprop)):
            if checkpoint and torch.is_grad_enabled():
                state = recompute(model.step, state, context, loop, use_reentrant=False, preserve_rng_state=False)
            else:
                state = model.step(state, context, loop)
            if visit is not None:
                visit(loop, state)
            if "states" in collect:
                states.append(state)
            reads = "signals" in collect and model.facts.signal_reads == "prediction"
            prediction = model.readout(state, context) if "logits" in collect or reads else None
            if "logits" in collect and prediction is not None:
                logits.append(prediction)
            if "signals" in collect:
                signal = model.signal(state, prediction)
                if signal is not None:
                    signals.append(signal)
    return Unrolled(
        state=state,
        states=stack(states) if states else None,
        signals=torch.stack(signals) if signals else None,
        logits=torch.stack(logits) if logits else None,
    )


@torch.no_grad()
def run_until(
    model: LoopModel,
    context: Any,
    rule: str | ExitRule,
    *,
    max_loops: int,
    min_loops: int = 1,
    start: Any = None,
) -> Outcome:
    """Run every unit until `rule` stops it; a unit that stops is removed from the computation, not masked.

    For token models this is the `skip` semantics: a later token at loop d reads loop min(d, e) of a token that
    stopped at e. Every unit stops at `max_loops` at the latest and none before `min_loops`.

    Raises:
        ConfigError: when the rule needs a signal the model has not, a budget, or a readout that mixes units.
    """
    check_loops(model, max_loops)
    rule = bind_rule(model, rule)
    if not 1 <= min_loops <= max_loops:
        raise ConfigError(f"min_loops={min_loops}: allowed is 1 to max_loops={max_loops}")
    needs_state, needs_logits = "state" in rule.needs, "logits" in rule.needs
    reads = needs_logits or ("signal" in rule.needs and model.facts.signal_reads == "prediction")

    rows, opened = model.open_rows(model.initial_state(context, start), context)
    here = first_tensor(rows)
    units, device = here.shape[0], here.device
    final = tree_map(torch.clone, rows)
    loops = torch.full((units,), max_loops, dtype=torch.long, device=device)
    alive = torch.arange(units, device=device)
    tracker = rule.track(units, device)
    for loop in range(1, max_loops + 1):
        previous = rows
        rows = model.step(rows, opened, loop)
        prediction = model.readout(rows, opened) if reads else None
        stop = tracker.update(
            Observation(
                loop=loop,
                state=flat_state(rows) if needs_state else None,
                previous=flat_state(previous) if needs_state else None,
                signal=model.signal(rows, prediction) if "signal" in rule.needs else None,
                logits=prediction if needs_logits else None,
                allowance=None,
            )
        )
        if loop < min_loops:
            continue
        if loop == max_loops:
            stop = torch.ones_like(stop)
        if not bool(stop.any()):
            continue
        leaving, staying = stop.nonzero().flatten(), (~stop).nonzero().flatten()
        scatter(final, select(rows, leaving), alive[leaving])
        loops[alive[leaving]] = loop
        if staying.numel() == 0:
            break
        alive = alive[staying]
        rows, opened = model.keep_rows(rows, opened, staying)
        tracker.keep(staying)
    state = model.close_rows(final, context)
    return Outcome(prediction=model.readout(state, context), state=state, loops=model.open_units(loops, context))


def bind_rule(model: LoopModel, rule: str | ExitRule, *, sequential: bool = False) -> ExitRule:
    """The rule, made ready for this model.

    Args:
        sequential: units are run one after the other, as in decoding, so budgets and mixing readouts are fine.

    Raises:
        ConfigError: when this model or this way of running cannot serve the rule.
    """
    bound = parse_rule(rule).bind(model.facts.signal)
    if sequential:
        return bound
    if "allowance" in bound.needs:
        raise ConfigError(
            f"exit rule {bound} spends a budget unit by unit, and here all units run at once; use it in generation"
        )
    reads_signal = "signal" in bound.needs and model.facts.signal_reads == "prediction"
    if ("logits" in bound.needs or reads_signal) and model.facts.readout_mixes:
        raise ConfigError(
            f"exit rule {bound} reads predictions, and this model's coda looks at earlier tokens, which may not have "
            "stopped yet; try delta:0.03 here, or use the rule in generation"
        )
    return bound


def segments(
    model: LoopModel, context: Any | Callable[[], Any], *, segments: int, loops: int, start: Any = None
) -> Iterator[Segment]:
    """Deep supervision (Wang et al. 2025, HRM): after each segment the state is cut from the graph and handed on.

    The caller may step an optimiser between segments; the next one then runs with the new weights.

    Args:
        context: what `model.encode` returned; or a function that encodes, called anew for each segment, which
            training needs when the encoder learns: one backward pass frees the graph of one encoding.
        segments: how many stretches.
        loops: loops in each of them; loop indices go on counting from one to the next.

    Raises:
        ConfigError: for a number of segments or loops below 1.
    """
    if segments < 1 or loops < 1:
        raise ConfigError(f"segments={segments}, loops={loops}: allowed is 1 or more")
    encode = context if callable(context) else lambda: context
    context = encode()
    state = model.initial_state(context, start)
    for index in range(1, segments + 1):
        if index > 1:
            context = encode()
        for loop in range((index - 1) * loops + 1, index * loops + 1):
            state = model.step(state, context, loop)
        prediction = model.readout(state, context)
        yield Segment(index=index, state=state, prediction=prediction, signal=model.signal(state, prediction))
        state = tree_map(torch.detach, state)
