"""A compiled core computes what the eager one does, and is compiled a few times, not once per depth or shape."""

import copy
import functools
import random
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.loops.drivers import run_until, unroll
from loopwise.models.looped_lm import LoopedLM

naive = runpy.run_path(str(Path(__file__).with_name("naive_lm.py")))
tiny = naive["tiny"]

Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]

pytestmark = pytest.mark.compiles


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts graphs and runs them as they are; generating code is slow and adds nothing to the count."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def draw(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(23, (rows, length), generator=torch.Generator().manual_seed(seed))


def losses(model: LoopedLM, tokens: torch.Tensor, **options: Any) -> Losses:
    model.zero_grad(set_to_none=True)
    context = model.encode(tokens)
    out = unroll(model, context, collect=("logits",), **options)
    out.logits[-1].log_softmax(-1)[..., 3].mean().backward()
    return out.logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: Losses, expected: Losses) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-9)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-9)


def test_generated_code_equals_eager() -> None:
    eager = tiny("ouro", seed=1, core_layers=1)
    compiled = copy.deepcopy(eager)
    compiled.compile_core()
    found, expected = (losses(model, draw(2, 6, seed=0), loops=3) for model in (compiled, eager))
    assert_close(found, expected)
    with torch.no_grad():
        for loops in range(1, 9):
            tokens = draw(2, 6, seed=loops)
            torch.testing.assert_close(
                compiled(tokens, loops=loops).logits, eager(tokens, loops=loops).logits, rtol=0, atol=1e-9
            )


@pytest.mark.usefixtures("graphs")
def test_equals_eager_at_every_depth_shape_and_window() -> None:
    eager = tiny("huginn", seed=1)
    compiled = copy.deepcopy(eager)
    compiled.compile_core()
    with torch.no_grad():
        for loops in range(1, 9):
            tokens = draw(1 + loops % 3, 3 + loops, seed=loops)
            torch.testing.assert_close(
                compiled(tokens, loops=loops).logits, eager(tokens, loops=loops).logits, rtol=0, atol=1e-9
            )
    for loops, backprop, recompute in ((4, None, False), (3, 1, False), (4, 2, True)):
        tokens = draw(2, 6, seed=0)
        found, expected = (
            losses(model, tokens, loops=loops, backprop=backprop, checkpoint=recompute) for model in (compiled, eager)
        )
        assert_close(found, expected)


@pytest.mark.parametrize(("shape", "packed"), [("ouro", True), ("huginn", False)])
def test_random_depths_windows_and_shapes_take_few_graphs(
    shape: str, packed: bool, graphs: CompileCounterWithBackend
) -> None:
    model = tiny(shape, seed=1, core_layers=1)
    model.compile_core()
    chance = random.Random(0)
    documents = torch.arange(6).div(3, rounding_mode="floor").expand(2, 6) if packed else None
    for number in range(24):
        context = model.encode(draw(2, 6, seed=number), documents=documents)
        loops, backprop = chance.randint(1, 16), chance.choice([None, 1, 2, 8])
        unroll(model, context, loops=loops, backprop=backprop).state.sum().backward()
        if number % 4 == 3:
            with torch.no_grad():
                tokens = draw(chance.randint(1, 5), chance.randint(2, 12), seed=number)
                model(tokens, loops=chance.randint(1, 16))
    assert 1 <= graphs.frame_count <= 6
    # Not one call went back to eager without a word.
    with torch.compiler.set_stance("fail_on_recompile"):
        unroll(model, model.encode(draw(2, 6, seed=0), documents=documents), loops=16, backprop=5)
        with torch.no_grad():
            model(draw(3, 9, seed=0), loops=13)


def test_all_that_takes_no_gradient_shares_one_graph(graphs: CompileCounterWithBackend) -> None:
    model = tiny("ouro", seed=1, core_layers=1)
    model.compile_core()
    tokens = draw(2, 6, seed=0)
    unroll(model, model.encode(tokens), loops=4, backprop=1).state.sum().backward()
    assert graphs.frame_count == 2
    with torch.no_grad():
        model(tokens, loops=3)
    assert graphs.frame_count == 2


def test_models_do_not_use_up_each_others_graphs(graphs: CompileCounterWithBackend) -> None:
    tokens = draw(2, 6, seed=0)
    for width in (8, 12, 16, 20, 24):
        model = tiny("ouro", core_layers=1, width=width)
        model.compile_core()
        before = graphs.frame_count
        for gradient in (True, False):
            with torch.set_grad_enabled(gradient):
                unroll(model, model.encode(tokens), loops=2)
        assert graphs.frame_count == before + 2


def test_rows_that_leave_and_growing_memories_stay_eager(graphs: CompileCounterWithBackend) -> None:
    model = tiny("coda", seed=1)
    eager = copy.deepcopy(model)
    model.compile_core()
    tokens = draw(3, 5, seed=0)
    found, expected = (run_until(m, m.encode(tokens), "hazard:0.8", max_loops=8) for m in (model, eager))
    assert torch.equal(found.prediction, expected.prediction)
    sampling = Sampling(max_tokens=3, exit="hazard:0.9")
    assert generate(model, [(1, 2)], sampling) == generate(eager, [(1, 2)], sampling)
    assert graphs.frame_count == 0


def test_a_copy_of_a_compiled_model_has_its_own_weights(graphs: CompileCounterWithBackend) -> None:
    model = tiny("ouro", seed=1)
    model.compile_core()
    tokens = draw(2, 5, seed=0)
    with torch.no_grad():
        before = model(tokens, loops=2).logits
        other = copy.deepcopy(model)
        other.load_state_dict(tiny("ouro", seed=2).state_dict())
        expected = tiny("ouro", seed=2)(tokens, loops=2).logits
        torch.testing.assert_close(other(tokens, loops=2).logits, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(model(tokens, loops=2).logits, before, rtol=0, atol=0)
    assert graphs.frame_count >= 1
