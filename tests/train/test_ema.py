import pytest
import torch
from torch import nn

from loopwise.errors import CheckpointError, ConfigError
from loopwise.train.ema import Ema, EmaConfig


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return {"a": nn.Parameter(torch.randn(3, 4).to(dtype)), "b": nn.Parameter(torch.randn(5).to(dtype))}


def walk(parameters, ema, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        ema.update(step)


@pytest.mark.parametrize("start", [0, 3])
def test_average_against_the_formula(start):
    parameters = make()
    ema = Ema(parameters.items(), EmaConfig(decay=0.8, start=start))
    expected = None
    for step in range(1, 8):
        walk(parameters, ema, [step])
        now = parameters["a"].detach().double()
        if step >= start:
            expected = now if expected is None else 0.8 * expected + 0.2 * now
    torch.testing.assert_close(ema.state()["a"].double(), expected, rtol=0, atol=1e-6)


def test_swap_and_back_is_exact_and_in_place():
    parameters = make(torch.bfloat16)
    view = parameters["a"].detach()[1:]
    ema = Ema(parameters.items(), EmaConfig(decay=0.5))
    walk(parameters, ema, range(3))
    assert ema.state()["a"].dtype == torch.float32
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def evaluate():
        with ema.applied():
            assert torch.equal(view, ema.state()["a"].bfloat16()[1:])
            assert not torch.equal(parameters["a"], before["a"])
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        evaluate()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name])


def test_before_the_start_the_average_is_the_weights():
    parameters = make()
    ema = Ema(parameters.items(), EmaConfig(start=10))
    walk(parameters, ema, range(3))
    assert ema.state() == {}
    before = parameters["a"].detach().clone()
    with ema.applied():
        assert torch.equal(parameters["a"], before)


def test_resume_continues_bit_for_bit():
    whole = make()
    straight = Ema(whole.items(), EmaConfig(decay=0.9, start=1))
    walk(whole, straight, range(6))

    parameters = make()
    first = Ema(parameters.items(), EmaConfig(decay=0.9, start=1))
    walk(parameters, first, range(3))
    second = Ema(parameters.items(), EmaConfig(decay=0.9, start=1))
    second.load_state(first.state())
    walk(parameters, second, range(3, 6))
    for name, average in straight.state().items():
        assert torch.equal(second.state()[name], average)
    assert not torch.equal(first.state()["a"], second.state()["a"])


def test_a_state_from_before_the_start_is_empty():
    ema = Ema(make().items(), EmaConfig(start=5))
    ema.load_state({})
    assert ema.state() == {}


def test_refusals():
    with pytest.raises(ConfigError, match=r"ema\.decay"):
        EmaConfig(decay=1.0)
    with pytest.raises(ConfigError, match=r"ema\.start"):
        EmaConfig(start=-1)
    with pytest.raises(CheckpointError, match="another model"):
        Ema(make().items(), EmaConfig()).load_state({"a": torch.zeros(3, 4)})
