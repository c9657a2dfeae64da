"""Exit rules over random traces: naive references in plain Python, and removal, batching and nesting of units."""

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopwise.loops.exits import (
    Budget,
    Observation,
    parse_rule,
    replay,
)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


thresholds = st.floats(min_value=1e-6, max_value=5, allow_nan=False).map(lambda x: float(f"{x:.3g}"))
counts = st.integers(min_value=1, max_value=6)


def as_text(name: str, values: st.SearchStrategy[float] | st.SearchStrategy[int]) -> st.SearchStrategy[str]:
    return values.map(lambda value: f"{name}:{value!r}")


simple_rules = st.one_of(
    as_text("fixed", counts),
    as_text("hazard", st.floats(0, 1.2)),
    as_text("halt", st.floats(-3, 3)),
    as_text("delta", thresholds),
    as_text("second-difference", thresholds),
    as_text("kl", thresholds),
    as_text("entropy", thresholds),
    as_text("stable", counts),
    as_text("certainty", st.floats(0, 1)),
)
rules = st.recursive(
    simple_rules, lambda inner: st.tuples(counts, inner).map(lambda pair: f"patience:{pair[0]}:{pair[1]}"), max_leaves=3
)
any_rules = st.one_of(rules, st.tuples(st.floats(1, 1e6), rules).map(lambda pair: f"budget:{pair[0]!r}:{pair[1]}"))


@given(any_rules)
def test_text_round_trips(text: str) -> None:
    parsed = parse_rule(text)
    assert parse_rule(str(parsed)) == parsed
    assert hash(parse_rule(str(parsed))) == hash(parsed)
    assert str(parse_rule(str(parsed))) == str(parsed)


class Trace:
    """Random recorded loops of (R, B, T) units; they slow down, so that rules about change fire at some loop."""

    def __init__(self, seed: int, *units: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        loops = 8
        slowing = 0.4 ** torch.arange(loops).double()

        def draw(*tail: int) -> Tensor:
            shape = (loops, *units, *tail)
            steps = torch.randn(shape, generator=generator, dtype=torch.float64)
            return (steps * slowing.view(-1, *[1] * (steps.dim() - 1))).cumsum(0)

        self.start = torch.randn(*units, 3, generator=generator, dtype=torch.float64)
        self.states = draw(3) + self.start
        self.logits = 2 * draw(4)
        self.signals = draw()

    def fit(self, text: str) -> dict[str, Tensor]:
        """Arguments of `replay`; a hazard rule gets probabilities."""
        signals = torch.sigmoid(self.signals) if "hazard" in text else self.signals
        return {"states": self.states, "start": self.start, "logits": self.logits, "signals": signals}


seeds = st.integers(0, 2**31)


@given(rules, seeds, st.integers(1, 8))
@settings(max_examples=settings().max_examples * 3 // 5)
def test_replay_of_a_batch_equals_replay_of_each_unit(text: str, seed: int, min_loops: int) -> None:
    trace = Trace(seed, 2, 3).fit(text)
    together = replay(text, min_loops=min_loops, **trace)
    assert together.shape == (2, 3)
    for row in range(2):
        for column in range(3):
            one = {name: t[row, column] if name == "start" else t[:, row, column] for name, t in trace.items()}
            alone = replay(text, min_loops=min_loops, **one)
            assert alone.shape == ()
            assert alone == together[row, column]


@given(rules, seeds, st.integers(1, 8), st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_leaving_and_joining_units_equal_replay(text: str, seed: int, min_loops: int, arrivals: list[int]) -> None:
    """Units that arrive at different ticks, leave when they stop and are reordered on the way."""
    trace = Trace(seed, 6).fit(text)
    loops = trace["signals"].shape[0]
    exit_rule = parse_rule(text)
    shuffle = torch.Generator().manual_seed(seed)
    tracker = exit_rule.track(0)
    units, ages = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    exits = torch.zeros(6, dtype=torch.long)
    before = torch.cat([trace["start"][None], trace["states"]])
    for tick in range(max(arrivals) + loops):
        newcomers = torch.tensor([unit for unit in range(6) if arrivals[unit] == tick], dtype=torch.long)
        tracker.join(exit_rule.track(len(newcomers)))
        units, ages = torch.cat([units, newcomers]), torch.cat([ages, torch.zeros_like(newcomers)]) + 1
        stop = tracker.update(
            Observation(
                loop=ages,
                state=trace["states"][ages - 1, units],
                previous=before[ages - 1, units],
                signal=trace["signals"][ages - 1, units],
                logits=trace["logits"][ages - 1, units],
            )
        )
        stop = (stop & (ages >= min_loops)) | (ages == loops)
        exits[units[stop]] = ages[stop]
        staying = (~stop).nonzero().flatten()
        staying = staying[torch.randperm(len(staying), generator=shuffle)]
        tracker.keep(staying)
        units, ages = units[staying], ages[staying]
    assert exits.tolist() == replay(text, min_loops=min_loops, **trace).tolist()


@pytest.mark.parametrize("text", ["second-difference:1", "kl", "entropy", "stable:1", "patience:2:entropy"])
def test_a_newcomer_remembers_nothing(text: str) -> None:
    """Its own trace alone decides, whatever fills the place of its memory beside an older unit."""
    still = torch.zeros(1, 2)
    for logits in (torch.zeros(1, 3), torch.tensor([[0.0, -math.inf, -math.inf]])):
        tracker, alone = parse_rule(text).track(1), parse_rule(text).track(1)
        tracker.update(Observation(loop=1, state=still + 5, previous=still, logits=torch.tensor([[1.0, 2.0, 3.0]])))
        tracker.join(parse_rule(text).track(1))
        for loop in range(1, 5):
            both = Observation(
                loop=torch.tensor([loop + 1, loop]),
                state=torch.cat([still, still]),
                previous=torch.cat([still, still]),
                logits=torch.cat([torch.tensor([[1.0, 2.0, 3.0]]), logits]),
            )
            own = Observation(loop=loop, state=still, previous=still, logits=logits)
            assert tracker.update(both)[1] == alone.update(own)[0]


@given(rules, st.floats(1, 6), seeds)
@settings(max_examples=settings().max_examples * 3 // 5)
def test_budget_equals_units_run_one_after_the_other(inner: str, mean: float, seed: int) -> None:
    trace = Trace(seed, 5).fit(inner)
    budget = Budget(mean=mean, inner=parse_rule(inner))
    spent: list[int] = []
    for unit in range(5):
        tracker = budget.track(1)
        previous = trace["start"][unit : unit + 1]
        for loop in range(1, 9):
            state = trace["states"][loop - 1, unit : unit + 1]
            stop = tracker.update(
                Observation(
                    loop=loop,
                    state=state,
                    previous=previous,
                    signal=trace["signals"][loop - 1, unit : unit + 1],
                    logits=trace["logits"][loop - 1, unit : unit + 1],
                    allowance=budget.allowance(unit + 1, numbers(sum(spent) + loop)),
                )
            )
            previous = state
            if stop.item() or loop == 8:
                spent.append(loop)
                break
    assert replay(budget, **trace).tolist() == spent
    assert sum(spent) <= mean * 5
    free = replay(inner, **trace)
    assert all(paid <= wanted for paid, wanted in zip(spent, free.tolist(), strict=True))


@given(st.integers(1, 6), seeds)
def test_stable_is_patience_with_stable_one(count: int, seed: int) -> None:
    logits = Trace(seed, 4).logits
    assert torch.equal(replay(f"stable:{count}", logits=logits), replay(f"patience:{count}:stable:1", logits=logits))


@given(rules, seeds)
def test_no_units(text: str, seed: int) -> None:
    assert replay(text, **Trace(seed, 0).fit(text)).shape == (0,)


def naive_measures(text: str, trace: dict[str, Tensor]) -> Iterator[bool]:
    """Whether the rule's formula holds after each loop, written out in Python floats for one unit."""
    name, _, number = text.partition(":")
    x = float(number)
    states = [trace["start"].tolist(), *trace["states"].tolist()]
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(states)]
    predictions = []
    for row in trace["logits"].tolist():
        weights = [math.exp(value) for value in row]
        predictions.append([weight / math.fsum(weights) for weight in weights])
    entropies = [-math.fsum(p * math.log(p) for p in row) for row in predictions]
    uniform = [1 / len(predictions[0])] * len(predictions[0])
    best = [row.index(max(row)) for row in predictions]
    turns = [math.inf] + [math.dist(a, b) for a, b in pairwise(steps)]
    survival = 1.0
    for i in range(len(predictions)):
        survival *= 1 - trace["signals"][i].item()
        if name == "hazard":
            yield 1 - survival >= x
        elif name == "delta":
            yield math.hypot(*steps[i]) / math.hypot(*states[i + 1]) < x
        elif name == "second-difference":
            yield i > 0 and turns[i] < x and turns[i - 1] < x
        elif name == "kl":
            earlier = predictions[i - 1] if i else uniform
            yield math.fsum(p * math.log(p / q) for p, q in zip(earlier, predictions[i], strict=True)) < x
        elif name == "entropy":
            yield i > 0 and abs(entropies[i] - entropies[i - 1]) < x
        elif name == "stable":
            yield i >= x and len(set(best[i - int(x) : i + 1])) == 1
        elif name == "certainty":
            yield 1 - entropies[i] / math.log(len(uniform)) >= x


@given(
    st.one_of(
        as_text("hazard", st.floats(0.01, 0.99)),
        as_text("delta", thresholds),
        as_text("second-difference", thresholds),
        as_text("kl", thresholds),
        as_text("entropy", thresholds),
        as_text("stable", counts),
        as_text("certainty", st.floats(0.01, 0.99)),
    ),
    seeds,
)
@settings(max_examples=settings().max_examples * 3 // 2)
def test_replay_equals_the_formula_in_plain_python(text: str, seed: int) -> None:
    trace = Trace(seed).fit(text)
    fired = [loop for loop, holds in enumerate(naive_measures(text, trace), start=1) if holds]
    assert replay(text, **trace).item() == (fired[0] if fired else 8)
