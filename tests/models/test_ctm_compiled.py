"""A compiled tick computes what the eager one does, in training alone, and is compiled once for all ticks."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from loopwise.loops.drivers import run_until, unroll
from loopwise.models.ctm import CTM
from loopwise.models.ctm_config import CTMConfig

pytestmark = pytest.mark.compiles
CONFIG = CTMConfig(
    ticks=4,
    neurons=12,
    width=8,
    heads=2,
    memory=3,
    classes=3,
    neuron_hidden=2,
    pairing="random",
    out_neurons=4,
    action_neurons=4,
    channels=5,
)


@pytest.fixture(autouse=True)
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Traces and differentiates as always and leaves out the C++, which is torch's own and slow to build."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_as_it_is: Callable[..., object] = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_as_it_is(function, backend=counter))
    return counter


def slopes(model: CTM, inputs: torch.Tensor) -> list[torch.Tensor]:
    logits = unroll(model, model.encode(inputs), loops=4, collect=("logits",)).logits
    return list(torch.autograd.grad(logits.sin().sum(), list(model.parameters())))


def test_equals_the_eager_tick_with_all_gradients() -> None:
    model = CTM(CONFIG).double()
    inputs = torch.randn(5, 5, 6, dtype=torch.float64)
    expected = slopes(model, inputs)
    model.compile_step()
    for found, right in zip(slopes(model, inputs), expected, strict=True):
        torch.testing.assert_close(found, right)


def test_one_graph_serves_all_ticks(counter: CompileCounterWithBackend) -> None:
    model = CTM(CONFIG)
    model.compile_step()
    for _ in range(2):
        slopes(model, torch.randn(5, 5, 6))
    # The first tick has a start that is the same in all rows and needs its own.
    assert 1 <= counter.frame_count <= 2


def test_rows_that_leave_compile_nothing(counter: CompileCounterWithBackend) -> None:
    model = CTM(CONFIG)
    model.compile_step()
    with torch.no_grad():
        run_until(model, model.encode(torch.randn(9, 5, 6)), "certainty:0.01", max_loops=4)
    assert counter.frame_count == 0


def test_a_copy_runs_its_own_weights() -> None:
    model = CTM(CONFIG)
    model.compile_step()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    inputs = torch.randn(3, 5, 6)
    eager = CTM(CONFIG)
    eager.load_state_dict(other.state_dict())
    for found, right in zip(slopes(other, inputs), slopes(eager, inputs), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
