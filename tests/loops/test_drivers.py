"""The three drivers against naive references: unroll, run_until with rows that really leave, and segments."""

import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from loopwise.errors import ConfigError, LoopRangeWarning
from loopwise.loops.drivers import Unrolled, run_until, segments, unroll
from loopwise.loops.protocol import LoopFacts, LoopModel
from loopwise.models.looped_lm import LoopedLM

naive = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))
NaiveLM, naive_rule, tiny = naive["NaiveLM"], naive["naive_rule"], naive["tiny"]

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(23, (3, 8), generator=GENERATOR)
REAL = torch.tensor([[1] * 8, [0] * 3 + [1] * 5, [0] + [1] * 5 + [0] * 2], dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """State of the toy: two tensors, so that every nest is walked."""

    level: Tensor
    pair: tuple[Tensor, Tensor]


class ToyRNN(LoopModel):
    """A model whose units are samples, with a nested state; its certainty is read from its prediction."""

    facts = LoopFacts(
        unit="sample",
        signal="certainty",
        signal_reads="prediction",
        anytime=True,
        trained_loops=(1, 9),
        random_start=False,
        loop_dependent=True,
        readout_mixes=False,
    )

    def __init__(self, width: int = 5, places: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(2, width)
        self.cell = nn.GRUCell(width, width)
        self.clock = nn.Parameter(torch.randn(9, width))
        self.head = nn.Linear(places * width, classes)
        self.rows: list[int] = []

    def encode(self, inputs: Tensor, **options: Any) -> dict[str, Tensor]:
        return {"driven": self.enter(inputs)}

    def initial_state(self, context: dict[str, Tensor], start: Any = None) -> Pulse:
        driven = context["driven"]
        zero = torch.zeros_like(driven)
        return Pulse(level=zero[:, :, 0], pair=(zero, driven))

    def step(self, state: Pulse, context: dict[str, Tensor], loop: int) -> Pulse:
        self.rows.append(len(state.level))
        hidden, before = state.pair
        driven = context["driven"] + self.clock[loop - 1] + before.mean(1, keepdim=True)
        new = self.cell(driven.flatten(0, 1), hidden.flatten(0, 1)).view_as(hidden)
        return Pulse(level=state.level + new.mean(-1), pair=(new, hidden))

    def readout(self, state: Pulse, context: dict[str, Tensor]) -> Tensor:
        return self.head(state.pair[0].flatten(1) * (1 + state.level.sum(1, keepdim=True))) * 3

    def signal(self, state: Pulse, prediction: Tensor | None) -> Tensor:
        chance = prediction.softmax(-1)
        return 1 + (chance * chance.log()).sum(-1) / np.log(chance.shape[-1])


def toy() -> tuple[ToyRNN, Tensor]:
    torch.manual_seed(1)
    return ToyRNN().double(), 3 * torch.randn(12, 3, 2, dtype=torch.float64)


class TestRunUntilTokens:
    @pytest.mark.parametrize(
        ("shape", "rule", "loops"),
        [
            ("ouro", "fixed:2", 4),
            ("ouro", "hazard:0.6", 6),
            ("ouro", "patience:2:hazard:0.85", 6),
            ("ouro", "delta:0.7", 6),
            ("ouro", "certainty:0.25", 8),
            ("ouro", "kl:0.3", 6),
            ("ouro", "entropy:0.1", 6),
            ("ouro", "stable:1", 6),
            ("universal", "hazard:0.8", 6),
            ("universal", "second-difference:4.0", 8),
            ("huginn", "delta:0.35", 8),
            ("zeros", "hazard:0.7", 6),
            ("coda", "hazard:0.9", 6),
            ("coda", "patience:2:delta:0.5", 6),
            ("retrofitted-olmo", "delta:0.8", 8),
        ],
    )
    @pytest.mark.parametrize("padded", [False, True])
    def test_equals_reading_the_smaller_of_both_loops(self, shape: str, rule: str, loops: int, padded: bool) -> None:
        model = tiny(shape, seed=2)
        start = 5 if model.facts.random_start else None
        context = model.encode(TOKENS, padding_mask=REAL if padded else None)
        rows: list[int] = []
        model.core.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        outcome = run_until(model, context, rule, max_loops=loops, start=start)
        real = REAL if padded else torch.ones_like(REAL)
        for batch, sequence in enumerate(TOKENS):
            places = real[batch]
            expected = NaiveLM(model).run(sequence[places].tolist(), loops=loops, stop=naive_rule(rule), start=start)
            assert outcome.loops[batch, places].tolist() == [row.loops for row in expected]
            logits = np.stack([row.prediction for row in expected])
            np.testing.assert_allclose(outcome.prediction[batch, places], logits, rtol=0, atol=1e-9)
            states = np.stack([row.states[row.loops] for row in expected])
            np.testing.assert_allclose(outcome.state[batch, places], states, rtol=0, atol=1e-9)
        assert outcome.loops[~real].eq(0).all()
        assert rule.startswith("fixed") or len(outcome.loops[real].unique()) > 1
        # Nothing ran but the rows that were still alive.
        assert rows == [int((outcome.loops >= loop).sum()) for loop in range(1, int(outcome.loops.max()) + 1)]

    def test_documents_in_one_row(self) -> None:
        model = tiny("ouro", seed=2)
        documents = torch.tensor([[0] * 3 + [1] * 5])
        outcome = run_until(model, model.encode(TOKENS[:1], documents=documents), "hazard:0.6", max_loops=6)
        for part in (slice(0, 3), slice(3, 8)):
            alone = run_until(model, model.encode(TOKENS[:1, part]), "hazard:0.6", max_loops=6)
            assert torch.equal(outcome.loops[:, part], alone.loops)
            torch.testing.assert_close(outcome.prediction[:, part], alone.prediction, rtol=0, atol=1e-10)

    def test_min_loops_holds_units_back_while_the_rule_watches(self) -> None:
        model = tiny("ouro", seed=2)
        outcome = run_until(model, model.encode(TOKENS), "patience:2:hazard:0.3", max_loops=6, min_loops=3)
        for batch, sequence in enumerate(TOKENS):
            rows = NaiveLM(model).run(sequence.tolist(), loops=6, stop=naive_rule("patience:2:hazard:0.3"), min_loops=3)
            assert outcome.loops[batch].tolist() == [row.loops for row in rows]
        assert outcome.loops.min() == 3

    @pytest.mark.parametrize("shape", ["ouro", "huginn", "coda"])
    def test_a_rule_that_never_fires_is_unroll(self, shape: str) -> None:
        model = tiny(shape, seed=2)
        context = model.encode(TOKENS, padding_mask=REAL)
        outcome = run_until(model, context, "fixed:4", max_loops=4)
        full = unroll(model, context, loops=4, collect=("logits",))
        torch.testing.assert_close(outcome.state[REAL], full.state[REAL], rtol=0, atol=1e-10)
        torch.testing.assert_close(outcome.prediction[REAL], full.logits[-1][REAL], rtol=0, atol=1e-10)

    def test_one_context_serves_many_runs(self) -> None:
        model = tiny("ouro", seed=2)
        context = model.encode(TOKENS)
        first = run_until(model, context, "hazard:0.6", max_loops=4)
        run_until(model, context, "fixed:1", max_loops=4)
        again = run_until(model, context, "hazard:0.6", max_loops=4)
        assert torch.equal(first.prediction, again.prediction)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_threshold_one_is_never_early_though_the_gate_is_saturated(self, dtype: torch.dtype) -> None:
        model = tiny("ouro").to(dtype)
        nn.init.constant_(model.gate.bias, 1000.0)
        context = model.encode(TOKENS)
        assert (unroll(model, context, loops=4, collect=("signals",)).signals == 1).all()
        assert (run_until(model, context, "hazard:1.0", max_loops=4).loops == 4).all()
        assert (run_until(model, context, "hazard:0.999999", max_loops=4).loops == 1).all()

    def test_nothing_carries_gradient(self) -> None:
        model = tiny("ouro")
        assert not run_until(model, model.encode(TOKENS), "fixed:2", max_loops=3).prediction.requires_grad


class TestRunUntilSamples:
    @pytest.mark.parametrize("rule", ["certainty:0.6", "delta:0.4", "stable:2", "patience:2:certainty:0.5", "fixed:3"])
    def test_each_sample_is_as_if_alone_and_leaves(self, rule: str) -> None:
        model, inputs = toy()
        model.rows.clear()
        outcome = run_until(model, model.encode(inputs), rule, max_loops=9)
        rows = list(model.rows)
        assert rows == [int((outcome.loops >= loop).sum()) for loop in range(1, int(outcome.loops.max()) + 1)]
        assert rule.startswith("fixed") or len(outcome.loops.unique()) > 1
        for sample in range(len(inputs)):
            context = model.encode(inputs[sample : sample + 1])
            loops = int(outcome.loops[sample])
            alone = unroll(model, context, loops=loops, collect=("logits",))
            torch.testing.assert_close(outcome.prediction[sample], alone.logits[-1, 0], rtol=0, atol=1e-12)
            torch.testing.assert_close(outcome.state.level[sample], alone.state.level[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(outcome.state.pair[1][sample], alone.state.pair[1][0], rtol=0, atol=1e-12)
            assert int(run_until(model, context, rule, max_loops=9).loops) == loops

    def test_exits_by_the_rule_on_recorded_signals(self) -> None:
        model, inputs = toy()
        context = model.encode(inputs)
        signals = unroll(model, context, loops=9, collect=("signals",)).signals
        outcome = run_until(model, context, "certainty:0.6", max_loops=9)
        for sample in range(len(inputs)):
            fired = [loop for loop in range(1, 10) if signals[loop - 1, sample] >= 0.6]
            assert int(outcome.loops[sample]) == (fired or [9])[0]


class TestRefusals:
    def test_rule_that_reads_a_signal_the_model_has_not(self) -> None:
        model = tiny("llama")
        with pytest.raises(ConfigError, match="this model's signal is none"):
            run_until(model, model.encode(TOKENS), "hazard:0.5", max_loops=3)

    def test_rule_for_another_signal(self) -> None:
        model, inputs = toy()
        with pytest.raises(ConfigError, match="reads a hazard; this model's signal is certainty"):
            run_until(model, model.encode(inputs), "hazard:0.5", max_loops=3)

    @pytest.mark.parametrize("rule", ["kl:0.1", "certainty:0.9", "patience:2:stable:1"])
    def test_logits_rule_where_the_coda_looks_back(self, rule: str) -> None:
        model = tiny("coda")
        with pytest.raises(ConfigError, match="coda looks at earlier tokens"):
            run_until(model, model.encode(TOKENS), rule, max_loops=3)

    def test_signal_from_a_prediction_that_looks_at_others(self) -> None:
        model, inputs = toy()
        model.facts = replace(model.facts, readout_mixes=True)
        with pytest.raises(ConfigError, match="coda looks at earlier tokens"):
            run_until(model, model.encode(inputs), "certainty:0.9", max_loops=3)

    def test_budget(self) -> None:
        model = tiny("ouro")
        with pytest.raises(ConfigError, match="budget unit by unit"):
            run_until(model, model.encode(TOKENS), "budget:2.0:hazard:0.5", max_loops=3)

    @pytest.mark.parametrize(("least", "most"), [(0, 3), (4, 3), (1, 0)])
    def test_loop_bounds(self, least: int, most: int) -> None:
        model = tiny("ouro")
        with pytest.raises(ConfigError, match="allowed is 1"):
            run_until(model, model.encode(TOKENS), "fixed:1", max_loops=most, min_loops=least)

    def test_unknown_things_to_collect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny("ouro")
        context = model.encode(TOKENS)
        # The test run's own type checks would come first.
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        with pytest.raises(ConfigError, match="allowed are states, signals, logits"):
            unroll(model, context, loops=2, collect=("hazards",))

    def test_unroll(self) -> None:
        model = tiny("ouro")
        context = model.encode(TOKENS)
        with pytest.raises(ConfigError, match="backprop=-1"):
            unroll(model, context, loops=2, backprop=-1)
        with pytest.raises(ConfigError, match="loops=0"):
            unroll(model, context, loops=0)

    def test_loops_beyond_training_warn_and_run(self) -> None:
        model = tiny("ouro", trained_loops=(1, 3))
        context = model.encode(TOKENS)
        with pytest.warns(LoopRangeWarning, match="loops=4 is beyond the 3"):
            unroll(model, context, loops=4)
        with pytest.warns(LoopRangeWarning, match="loops=5 is beyond the 3"):
            run_until(model, context, "fixed:2", max_loops=5)
        unroll(model, context, loops=3)


def scalar(model: LoopedLM, out: Unrolled, context: Any) -> Tensor:
    """A loss that reads state, logits and gate of the last loop."""
    logits = model.readout(out.state, context)
    loss = logits.log_softmax(-1)[..., 3].mean() + out.state.square().mean()
    hazard = model.hazard(out.state)
    return loss if hazard is None else loss + hazard.log().mean()


def gradients(model: LoopedLM, **options: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    context = model.encode(TOKENS[:, :5])
    scalar(model, unroll(model, context, **options), context).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def starts(model: LoopedLM) -> list[Any]:
    given = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [None, "zero", given]


class TestGradients:
    @pytest.mark.parametrize(
        ("shape", "start"), [("ouro", 0), ("ouro", 2), ("universal", 1), ("huginn", 0), ("zeros", 2), ("coda", 0)]
    )
    def test_window_equals_finite_differences_with_the_prefix_held(self, shape: str, start: int) -> None:
        model = tiny(shape, seed=4)
        begin = starts(model)[start]
        for backprop in (None, 3, 1):
            grads = gradients(model, loops=3, backprop=backprop, start=begin)
            with torch.no_grad():
                tokens = TOKENS[:, :5]
                prefix = begin
                if backprop == 1:
                    prefix = unroll(model, model.encode(tokens), loops=2, start=begin).state
                generator = torch.Generator().manual_seed(7)
                direction = {
                    name: torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                    for name, parameter in model.named_parameters()
                }
                values = []
                for sign in (1, -1):
                    for name, parameter in model.named_parameters():
                        parameter.add_(direction[name], alpha=sign * 1e-6)
                    context = model.encode(tokens)
                    out = unroll(model, context, loops=1 if backprop == 1 else 3, start=prefix)
                    values.append(float(scalar(model, out, context)))
                    for name, parameter in model.named_parameters():
                        parameter.sub_(direction[name], alpha=sign * 1e-6)
            slope = sum(float((grad * direction[name]).sum()) for name, grad in grads.items())
            assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7)

    @pytest.mark.parametrize("shape", ["ouro", "huginn", "coda"])
    @pytest.mark.parametrize("backprop", [0, 1, 2, 4, 9])
    def test_window_equals_detaching_by_hand(self, shape: str, backprop: int) -> None:
        model = tiny(shape, seed=4)
        grads = gradients(model, loops=4, backprop=backprop)
        model.zero_grad(set_to_none=True)
        context = model.encode(TOKENS[:, :5])
        state = model.initial_state(context)
        for loop in range(1, 5):
            state = model.step(state, context, loop)
            if loop == 4 - backprop:
                state = state.detach()
        scalar(model, Unrolled(state=state, states=None, signals=None, logits=None), context).backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert grads.keys() == expected.keys()
        for name in grads:
            assert torch.equal(grads[name], expected[name]), name

    @pytest.mark.parametrize("shape", ["ouro", "huginn", "zeros", "coda"])
    @pytest.mark.parametrize("backprop", [None, 2])
    def test_recomputing_changes_no_bit(self, shape: str, backprop: int | None) -> None:
        model = tiny(shape, seed=4)
        plain = gradients(model, loops=4, backprop=backprop)
        calls: list[int] = []
        model.core.register_forward_pre_hook(lambda *_: calls.append(1))
        recomputed = gradients(model, loops=4, backprop=backprop, checkpoint=True)
        assert len(calls) == 4 + (4 if backprop is None else backprop)
        assert plain.keys() == recomputed.keys()
        for name in plain:
            assert torch.equal(plain[name], recomputed[name]), name

    def test_loops_before_the_window_carry_none(self) -> None:
        model = tiny("ouro", seed=4)
        out = unroll(model, model.encode(TOKENS), loops=4, backprop=2, collect=("states", "logits", "signals"))
        for part in (out.logits, out.signals, out.states):
            model.zero_grad(set_to_none=True)
            (early,) = torch.autograd.grad(
                part[:2].sum(), [model.core[0].mlp.branch.down.weight], allow_unused=True, retain_graph=True
            )
            assert early is None or not early.any()

    @pytest.mark.parametrize("shape", ["ouro", "huginn"])
    def test_a_window_under_autocast_reaches_every_weight(self, shape: str) -> None:
        model = tiny(shape, seed=4).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cached = gradients(model, loops=4, backprop=1)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            plain = gradients(model, loops=4, backprop=1)
        assert cached.keys() == plain.keys() >= {name for name, _ in model.core.named_parameters(prefix="core")}
        for name, gradient in plain.items():
            assert gradient.any(), name
            torch.testing.assert_close(cached[name], gradient, rtol=0, atol=0)

    def test_no_grad_outside_stays_no_grad(self) -> None:
        model = tiny("ouro")
        with torch.no_grad():
            assert not unroll(model, model.encode(TOKENS), loops=2, backprop=1).state.requires_grad


class TestUnroll:
    def test_visit_sees_every_loop(self) -> None:
        model = tiny("ouro")
        seen: list[tuple[int, Tensor]] = []
        out = unroll(model, model.encode(TOKENS), loops=3, collect=("states",), visit=lambda *found: seen.append(found))
        assert [loop for loop, _ in seen] == [1, 2, 3]
        assert torch.equal(torch.stack([state for _, state in seen]), out.states)

    def test_nested_states_and_signals_from_predictions_are_collected(self) -> None:
        model, inputs = toy()
        out = unroll(model, model.encode(inputs), loops=4, collect=("states", "signals"))
        assert out.logits is None
        assert out.states.pair[0].shape == (4, 12, 3, 5)
        assert torch.equal(out.states.level[-1], out.state.level)
        last = model.signal(out.state, model.readout(out.state, None))
        torch.testing.assert_close(out.signals[-1], last, rtol=0, atol=0)


class TestSegments:
    def test_states_go_on_and_gradient_does_not(self) -> None:
        model, inputs = toy()
        context = model.encode(inputs)
        found = list(segments(model, context, segments=3, loops=2))
        full = unroll(model, context, loops=6, collect=("logits", "signals", "states"))
        assert [segment.index for segment in found] == [1, 2, 3]
        for segment in found:
            assert torch.equal(segment.prediction, full.logits[2 * segment.index - 1])
            assert torch.equal(segment.signal, full.signals[2 * segment.index - 1])
        (clock,) = torch.autograd.grad(found[1].prediction.sum(), [model.clock], retain_graph=True)
        assert clock[2:4].any(1).all()
        assert not clock[:2].any()

    @pytest.mark.parametrize("kind", ["toy", "lm"])
    def test_the_optimiser_may_step_between_segments(self, kind: str) -> None:
        model, inputs = toy() if kind == "toy" else (tiny("huginn"), TOKENS)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = []
        for segment in segments(model, lambda: model.encode(inputs), segments=3, loops=1):
            optimiser.zero_grad()
            loss = segment.prediction.square().mean()
            loss.backward()
            assert next(model.parameters()).grad.any()
            optimiser.step()
            losses.append(float(loss.detach()))
        fresh, _ = toy() if kind == "toy" else (tiny("huginn"), TOKENS)
        untouched = [
            float(s.prediction.detach().square().mean())
            for s in segments(fresh, fresh.encode(inputs), segments=3, loops=1)
        ]
        assert losses[0] == untouched[0]
        assert losses[1:] != untouched[1:]

    @pytest.mark.parametrize(("count", "loops"), [(0, 1), (1, 0)])
    def test_refusals(self, count: int, loops: int) -> None:
        model, inputs = toy()
        with pytest.raises(ConfigError, match="allowed is 1 or more"):
            list(segments(model, model.encode(inputs), segments=count, loops=loops))
