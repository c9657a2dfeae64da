"""Drawn exits follow the exit distribution, and a unit's draw does not depend on who runs beside it."""

import pytest
import torch

from loopwise.errors import ConfigError, InputError
from loopwise.loops.drivers import run_until, unroll
from loopwise.loops.exits import parse_rule
from loopwise.loops.hazard import exit_distribution
from loopwise.loops.sampled import Sampled
from loopwise.models.pondering import PonderNet
from loopwise.models.recurrent_cell import RecurrentCell, RecurrentCellConfig

LOOPS = 5


def model():
    torch.manual_seed(0)
    return PonderNet(RecurrentCell(RecurrentCellConfig(inputs=3, width=6)), features=6, bias=-0.7)


def test_exits_follow_the_hazards():
    ponder, units = model(), 4000
    context = ponder.encode(torch.tensor([[0.3, -1.0, 0.8]]).expand(units, 3))
    hazards = unroll(ponder, context, loops=LOOPS, collect=("signals",)).signals.detach()
    expected = exit_distribution(hazards)[:, 0]
    outcome = run_until(ponder, context, Sampled(seed=1), max_loops=LOOPS)
    shares = torch.bincount(outcome.loops, minlength=LOOPS + 1)[1:] / units
    assert bool(((shares - expected).abs() < 4 * (expected * (1 - expected) / units).sqrt()).all())
    other = run_until(ponder, context, Sampled(seed=2), max_loops=LOOPS)
    assert not torch.equal(other.loops, outcome.loops)


def test_a_draw_belongs_to_its_unit():
    ponder = model()
    inputs = torch.randn(12, 3, generator=torch.Generator().manual_seed(3))
    whole = run_until(ponder, ponder.encode(inputs), Sampled(seed=4), max_loops=LOOPS)
    some = torch.tensor([7, 2, 9])
    part = run_until(ponder, ponder.encode(inputs[some]), Sampled(seed=4, numbers=some), max_loops=LOOPS)
    assert torch.equal(part.loops, whole.loops[some])
    assert torch.allclose(part.prediction, whole.prediction[some])


def test_what_cannot_be_is_refused():
    ponder = model()
    context = ponder.encode(torch.zeros(4, 3))
    with pytest.raises(InputError, match="numbers for 2 units, and 4 run"):
        run_until(ponder, context, Sampled(numbers=torch.arange(2)), max_loops=2)
    with pytest.raises(ConfigError, match="reads a hazard"):
        run_until(ponder.model, ponder.model.encode(torch.zeros(4, 3)), Sampled(), max_loops=2)
    with pytest.raises(ConfigError, match="unknown exit rule"):
        parse_rule(str(Sampled()))
