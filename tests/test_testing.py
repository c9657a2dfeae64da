"""The conformance check passes sound models and names what is wrong with others."""

import copy
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from loopwise.errors import ConfigError
from loopwise.loops.protocol import LoopModel
from loopwise.models.looped_lm import LMContext, LoopedLM
from loopwise.nn.noise import uniform
from loopwise.testing import ConformanceError, check_model

ROOT = Path(__file__).parents[1]
naive = runpy.run_path(str(ROOT / "tests" / "models" / "naive_lm.py"))
tiny = naive["tiny"]

TOKENS = torch.tensor([[3, 1, 22, 7, 7], [5, 5, 9, 14, 2], [0, 1, 2, 3, 4]])
REAL = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
INPUTS = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))


def documented() -> dict[str, Any]:
    """Names that the Python blocks of the page define, run one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-model.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "documented"}
    for block in blocks:
        exec(compile(block, "docs/adding-a-model.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def settler() -> type[LoopModel]:
    return documented()["Settler"]


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names = documented()
    assert names["logits"].shape == (8, 6, 4)
    assert names["outcome"].loops.shape == (6,)
    assert "Settler keeps its 13 promises on 6 units" in capsys.readouterr().out


def by_tokens(model: LoopModel, inputs: Tensor, loops: Tensor) -> Tensor:
    """Predictions by the naive formulas, each token stopped where `loops` says; 0 is padding."""
    assert isinstance(model, LoopedLM)
    out = torch.zeros(*inputs.shape, model.config.vocab_size, dtype=torch.float64)
    for row, real in enumerate(loops > 0):
        exits = loops[row, real].tolist()
        found = naive["NaiveLM"](model).run(
            inputs[row, real].tolist(), loops=max(exits), stop=lambda place, seen, e=exits: len(seen.states) > e[place]
        )
        out[row, real] = torch.from_numpy(np.stack([token.prediction for token in found]))
    return out


@pytest.mark.parametrize("shape", ["ouro", "huginn", "coda", "retrofitted-olmo"])
def test_looped_language_models_pass(shape: str) -> None:
    model = tiny(shape).float()
    before = copy.deepcopy(model.state_dict())
    report = check_model(model, TOKENS, loops=3, reference=by_tokens, padding_mask=REAL)
    assert report.units == 11
    assert "mixed depths equal the reference" in report.passed
    assert ("signals are one number per unit, in range, float32 or wider" in report.passed) == model.config.gate
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == torch.float32


def test_what_was_not_tried_is_said(settler: type[LoopModel]) -> None:
    report = check_model(settler(), INPUTS, finite_differences=False)
    assert "gradients equal finite differences (finite_differences=False)" in report.skipped
    assert "not tried: mixed depths equal the reference (no reference was given)" in str(report)


def test_one_loop_is_too_few(settler: type[LoopModel]) -> None:
    with pytest.raises(ConfigError, match="loops=1: allowed is 2 or more"):
        check_model(settler(), INPUTS, loops=1)


Plant = Callable[[type[LoopModel]], LoopModel]


def changed(**methods: Any) -> Plant:
    """A Settler with some methods replaced."""
    return lambda base: type("Faulty", (base,), methods)()


def stated(**facts: Any) -> Plant:
    """A Settler that states other facts."""
    return lambda base: type("Faulty", (base,), {"facts": replace(base.facts, **facts)})()


def after(name: str, change: Callable[..., Any]) -> Plant:
    """A Settler whose method's answer is changed: change(self, answer, *arguments)."""

    def plant(base: type[LoopModel]) -> LoopModel:
        def method(self: LoopModel, *args: Any, **options: Any) -> Any:
            return change(self, getattr(base, name)(self, *args, **options), *args)

        return type("Faulty", (base,), {name: method})()

    return plant


def mutating_step(self: Any, state: Tensor, context: Tensor, loop: int) -> Tensor:
    moved = torch.tanh(state + self.move(torch.cat((state, context), dim=-1)))
    return state.copy_(moved) if not moved.requires_grad else moved


def mutating_context(self: Any, state: Tensor, context: Tensor, loop: int) -> Tensor:
    if not context.requires_grad:
        context *= 1.01
    return torch.tanh(state + self.move(torch.cat((state, context), dim=-1)))


def counting(self: Any, moved: Tensor, state: Tensor, context: Tensor, loop: int) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return moved * (1 + 0.01 * self.calls)


def buffered(base: type[LoopModel]) -> LoopModel:
    class Faulty(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(16))

        def step(self, state: Tensor, context: Tensor, loop: int) -> Tensor:
            self.mean.lerp_(state.detach().mean(0), 0.1)
            return super().step(state, context, loop)

    return Faulty()


def idle(base: type[LoopModel]) -> LoopModel:
    model = base()
    model.idle = nn.Linear(2, 2)
    return model


def loose(base: type[LoopModel]) -> LoopModel:
    class Faulty(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.ones(16)

    return Faulty()


def keep_all(self: Any, state: Tensor, context: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return state, context


def keep_first(self: Any, state: Tensor, context: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return state[: len(index)], context[: len(index)]


def keep_state_only(self: Any, state: Tensor, context: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return state[index], context[: len(index)]


def without_start(self: Any, context: Tensor, start: Any = None) -> Tensor:
    return torch.zeros_like(context)


def drawn_by_row(self: Any, context: Tensor, start: Any = None) -> Tensor:
    """Noise by batch row, which is not the sample's own."""
    if isinstance(start, Tensor):
        return start
    rows = torch.arange(len(context))[:, None]
    return uniform(0 if start in (None, "zero") else start, "x", rows, torch.arange(16)).to(context) * (start != "zero")


def one_seed(self: Any, context: Tensor, start: Any = None) -> Tensor:
    return start if isinstance(start, Tensor) else torch.zeros_like(context)


def random_start(method: Callable[..., Tensor]) -> Plant:
    return lambda base: type(
        "Faulty", (base,), {"facts": replace(base.facts, random_start=True), "initial_state": method}
    )()


FAULTS: dict[str, tuple[Plant, str]] = {
    "step works in place": (changed(step=mutating_step), "step changed the state it was given"),
    "step changes the context": (changed(step=mutating_context), "step changed the context, which is read-only"),
    "step counts its calls": (after("step", counting), "step remembers earlier calls"),
    "step moves a buffer": (buffered, "a forward pass changed mean"),
    "step leaks between samples": (
        after("step", lambda self, moved, *_: moved + 0.1 * moved.mean(0)),
        r"nothing depends on the rest of the batch: input \d.*differs",
    ),
    "encode leaks between samples": (
        after("encode", lambda self, context, *_: context - context.mean(0)),
        r"nothing depends on the rest of the batch: input \d.*differs",
    ),
    "readout leaks between samples": (
        after("readout", lambda self, logits, *_: logits - logits.mean(0)),
        "facts.readout_mixes is False; the readout of unit 0 alone differs",
    ),
    "step reads the loop index in secret": (
        after("step", lambda self, moved, state, context, loop: moved / loop),
        "facts.loop_dependent is False, yet loops 1 to 3 differ",
    ),
    "loop index is declared and unused": (stated(loop_dependent=True), "yet loops 1 to 3 do the same"),
    "hazard is a logit": (
        changed(signal=lambda self, state, prediction: self.gate(state)[..., 0].float() - 5),
        "a hazard of -.* at loop 1; allowed is 0.0 to 1.0",
    ),
    "signal is narrow": (
        changed(signal=lambda self, state, prediction: self.gate(state)[..., 0].sigmoid()),
        "dtype torch.bfloat16 in a torch.bfloat16 model",
    ),
    "signal has one axis too many": (
        changed(signal=lambda self, state, prediction: self.gate(state).sigmoid().float()),
        r"shape \(4, 1\) for 4 units",
    ),
    "signal is not a number": (
        after("signal", lambda self, signal, *_: signal / 0 - signal / 0),
        "a hazard of nan",
    ),
    "signal is declared and missing": (
        changed(signal=lambda self, state, prediction: None),
        "facts.signal is hazard, yet signal.. returns None",
    ),
    "signal is there and not declared": (stated(signal=None), "facts.signal is None, yet signal.. returns one"),
    "signal needs the prediction in secret": (
        changed(signal=lambda self, state, prediction: prediction.softmax(-1).amax(-1)),
        "facts are declared: AttributeError",
    ),
    "trained loops are upside down": (stated(trained_loops=(3, 2)), "allowed is 1 <= fewest <= most"),
    "rows never leave": (changed(keep_rows=keep_all), "units that stop leave the computation"),
    "the wrong rows leave": (changed(keep_rows=keep_first), "input . alone.*prediction differs"),
    "the context of other rows stays": (changed(keep_rows=keep_state_only), "input . alone.*prediction differs"),
    "rows come back in another order": (
        changed(close_rows=lambda self, rows, context: rows.flip(0)),
        "prediction differs",
    ),
    "loop counts come back in another order": (
        changed(open_units=lambda self, units, context: units.flip(0)),
        "input 0 alone: the prediction differs",
    ),
    "no gradient to a parameter": (idle, "gradients reach every parameter: none reaches idle.weight, idle.bias"),
    "gradient is cut": (
        after("step", lambda self, moved, *_: 0.5 * moved + 0.5 * moved.detach()),
        "gradients equal finite differences: direction 1",
    ),
    "a tensor is not stored": (loose, "table is neither parameter nor buffer"),
    "a given start state is ignored": (changed(initial_state=without_start), "start=STATE is not taken"),
    "a seed is ignored": (changed(initial_state=one_seed), "a seed is taken and ignored"),
    "all seeds are one": (random_start(one_seed), "seeds 1 and 2 give one start state"),
    "noise belongs to the batch row": (random_start(drawn_by_row), r"input \d alone.*prediction differs"),
    "float64 is refused": (
        after("encode", lambda self, context, *_: context.float()),
        "Faulty does not run in float64|RuntimeError",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_named(fault: str, settler: type[LoopModel]) -> None:
    plant, message = FAULTS[fault]
    torch.manual_seed(0)
    with pytest.raises(ConformanceError, match=message) as caught:
        check_model(plant(settler), INPUTS, loops=3)
    assert isinstance(caught.value, AssertionError)


def test_every_broken_promise_is_listed_at_once(settler: type[LoopModel]) -> None:
    model = changed(
        initial_state=without_start,
        step=mutating_step,
        signal=lambda self, state, prediction: self.gate(state)[..., 0].float() - 5,
    )(settler)
    with pytest.raises(ConformanceError) as caught:
        check_model(model, INPUTS)
    text = str(caught.value)
    assert re.match(r"Faulty breaks \d of 13 promises:\n  - ", text)
    for part in ("methods are pure functions", "start states are as asked for", "signals are one number"):
        assert part in text


class ReadsTooDeep(LoopedLM):
    """Tokens that stopped are found zeroed: a lock-step memory that forgets them."""

    def keep_rows(self, state: Tensor, context: LMContext, index: Tensor) -> tuple[Tensor, LMContext]:
        kept, opened = super().keep_rows(state, context, index)
        for table in (opened.memory.keys, opened.memory.values):
            for layer in table:
                table[layer] = table[layer] * 0.5
        return kept, opened


class SeesTheFuture(LoopedLM):
    """The start state of a token looks at its whole sequence."""

    def encode(self, inputs: Tensor, **options: Any) -> LMContext:
        context = super().encode(inputs, **options)
        return replace(context, injected=context.injected + context.injected.mean(0, keepdim=True))


def test_a_token_model_with_a_faulty_memory_fails_its_reference() -> None:
    model = ReadsTooDeep(tiny("ouro").config)
    model.load_state_dict(tiny("ouro").state_dict())
    with pytest.raises(ConformanceError, match="mixed depths equal the reference: the prediction differs"):
        check_model(model, TOKENS, loops=3, reference=by_tokens)


def test_a_token_model_that_mixes_sequences_is_caught() -> None:
    model = SeesTheFuture(tiny("ouro").config)
    model.load_state_dict(tiny("ouro").state_dict())
    with pytest.raises(ConformanceError, match="input 0 alone: the prediction differs"):
        check_model(model, TOKENS, loops=3)
