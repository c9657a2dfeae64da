"""PonderNet and ACT keep the protocol on several step functions, and ACT equals Graves' example computed by hand."""

import pytest
import torch
from torch import nn

from loopwise.errors import ConfigError, InputError
from loopwise.loops.drivers import run_until, unroll
from loopwise.loops.hazard import exit_distribution
from loopwise.loops.protocol import LoopFacts, LoopModel
from loopwise.models.config import LoopedLMConfig
from loopwise.models.deep_thinking import DeepThinking, DeepThinkingConfig
from loopwise.models.looped_lm import LoopedLM
from loopwise.models.pondering import ACT, ACTState, PonderNet, channel_means
from loopwise.models.recurrent_cell import RecurrentCell, RecurrentCellConfig
from loopwise.objectives.pondering import ponder_cost
from loopwise.tasks.mazes import Mazes, MazesConfig
from loopwise.tasks.problems import IGNORED, numbers
from loopwise.testing import check_model

VECTORS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def cell(kind="tanh"):
    torch.manual_seed(0)
    return RecurrentCell(RecurrentCellConfig(inputs=6, width=7, cell=kind))


@pytest.mark.parametrize("kind", ["tanh", "gru"])
def test_the_bare_cell_keeps_every_promise(kind):
    check_model(cell(kind), VECTORS, loops=3)


def test_the_gated_unit_is_torchs():
    model = cell("gru").double()
    theirs = nn.GRUCell(6, 7, dtype=torch.float64)
    with torch.no_grad():
        for mine, other in (
            (model.enter.weight, theirs.weight_ih),
            (model.again.weight, theirs.weight_hh),
            (model.enter.bias, theirs.bias_ih),
            (model.again.bias, theirs.bias_hh),
        ):
            other.copy_(mine)
    x = VECTORS.double()
    state = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model.step(state, model.encode(x), 1), theirs(x, state), atol=1e-12)


@pytest.mark.parametrize("wrap", [PonderNet, ACT])
@pytest.mark.parametrize("kind", ["tanh", "gru"])
def test_a_pondering_cell_keeps_every_promise(wrap, kind):
    check_model(wrap(cell(kind), features=7, bias=-1.0), VECTORS, loops=4)


@pytest.mark.parametrize("wrap", [PonderNet, ACT])
def test_any_model_can_ponder(wrap):
    problems = Mazes(MazesConfig(size=5)).draw(0, numbers(0, 4))
    inner = DeepThinking(DeepThinkingConfig(width=6))
    model = wrap(inner, features=6, look=channel_means, bias=-1.0)
    check_model(model, problems.inputs, loops=3, asked=problems.targets != IGNORED)


def test_a_language_model_ponders_token_by_token():
    torch.manual_seed(0)
    sizes = {"width": 8, "heads": 2, "kv_heads": 2, "head_width": 4, "mlp_width": 12}
    config = LoopedLMConfig(vocab_size=11, core_layers=1, loops=3, trained_loops=(1, 4), max_positions=9, **sizes)
    model = PonderNet(LoopedLM(config), features=8, look=lambda state: state)
    tokens = torch.randint(0, 11, (2, 4), generator=torch.Generator().manual_seed(0))
    check_model(model, tokens, loops=2, finite_differences=False)
    with pytest.raises(ConfigError, match="say what the gate sees"):
        PonderNet(LoopedLM(config), features=8)
    with pytest.raises(ConfigError, match="ACT takes models whose units are samples"):
        ACT(LoopedLM(config), features=8, look=lambda state: state)


class Ladder(LoopModel):
    """State n after n loops; so hazards and means can be written down by hand."""

    facts = LoopFacts(
        unit="sample",
        signal=None,
        anytime=False,
        trained_loops=(1, 9),
        random_start=False,
        loop_dependent=False,
        readout_mixes=False,
    )

    def encode(self, inputs, **options):
        return inputs

    def initial_state(self, context, start=None):
        return torch.zeros_like(context)

    def step(self, state, context, loop):
        return state + 1

    def readout(self, state, context):
        return state

    def signal(self, state, prediction):
        return None


def table(*halts):
    """A gate that gives each sample's h by its state: halts[sample][n - 1] at state n."""
    rows = torch.tensor(halts, dtype=torch.float64)

    def look(state):
        n = state[:, 0].round().long().clamp(1, rows.shape[1])
        return torch.logit(rows[: len(state)].gather(1, n[:, None] - 1))

    return look


def by_hand(halts, eps=0.01, **options):
    model = ACT(Ladder(), features=1, look=table(*halts), eps=eps, **options).double()
    with torch.no_grad():
        model.gate.weight.fill_(1.0)
        model.gate.bias.fill_(0.0)
    return model, model.encode(torch.zeros(len(halts), 1, dtype=torch.float64))


def test_act_by_hand():
    # One sample halts at loop 3: 0.1 + 0.3 = 0.4, 0.4 + 0.7 >= 0.99, R = 0.6. One at loop 1: 0.995. One is cut off.
    halts = ((0.1, 0.3, 0.7, 0.5, 0.5), (0.995, 0.5, 0.5, 0.5, 0.5), (0.1, 0.1, 0.1, 0.1, 0.1))
    model, context = by_hand(halts)
    state = unroll(model, context, loops=5).state
    assert state.loops.tolist() == [3, 1, 5]
    mean = torch.tensor([0.1 * 1 + 0.3 * 2 + 0.6 * 3, 1.0, 0.1 * (1 + 2 + 3 + 4) + 0.6 * 5], dtype=torch.float64)
    assert torch.allclose(model.readout(state, context)[:, 0], mean)
    assert torch.allclose(ponder_cost(state), torch.tensor([3 + 0.6, 1 + 1.0, 5 + 0.6], dtype=torch.float64))
    hazards = unroll(model, context, loops=5, collect=("signals",)).signals
    shares = [[0.1, 0.3, 0.6, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1, 0.6]]
    assert torch.allclose(exit_distribution(hazards).T, torch.tensor(shares, dtype=torch.float64))


def test_acts_own_rule_removes_what_has_halted():
    halts = ((0.1, 0.3, 0.7, 0.5, 0.5), (0.995, 0.5, 0.5, 0.5, 0.5), (0.1, 0.1, 0.1, 0.1, 0.1))
    model, context = by_hand(halts)
    # The gate's table is by row, and rows leave; ask it by sample, one at a time.
    for sample, loops in enumerate((3, 1, 5)):
        alone, one = by_hand(halts[sample : sample + 1])
        outcome = run_until(alone, one, "hazard:0.99", max_loops=5)
        assert outcome.loops.tolist() == [loops]
        full = model.readout(unroll(model, context, loops=5).state, context)[sample]
        assert torch.allclose(outcome.prediction[0], full)


def test_the_cost_has_its_gradient_through_the_remainder_alone():
    torch.manual_seed(0)
    model = ACT(cell(), features=7, bias=-1.5).double()
    context = model.encode(VECTORS.double())
    state = unroll(model, context, loops=9).state
    assert len(set(state.loops.tolist())) > 1
    found = torch.autograd.grad(ponder_cost(state).sum(), list(model.gate.parameters()))
    # Graves: R = 1 - sum of h before N, so d(N + R) = -d(h_1 + ... + h_{N-1}), with N held.
    states = unroll(model.model, context, loops=9, collect=("states",)).states
    shares = model.hazard(states.flatten(0, 1)).view(9, -1)
    before = torch.arange(1, 10)[:, None] < state.loops
    expected = torch.autograd.grad(-(shares * before).sum(), list(model.gate.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_counts_in_a_state_are_not_averaged():
    class Counting(Ladder):
        def initial_state(self, context, start=None):
            return {"sum": torch.zeros_like(context), "steps": torch.zeros(len(context), dtype=torch.long)}

        def step(self, state, context, loop):
            return {"sum": state["sum"] + 1, "steps": state["steps"] + 1}

        def readout(self, state, context):
            assert state["steps"].dtype == torch.long
            return torch.cat((state["sum"], state["steps"][:, None].double()), 1)

    model = ACT(Counting(), features=1, look=lambda state: state["sum"] * 0).double()
    with torch.no_grad():
        model.gate.bias.fill_(torch.logit(torch.tensor(0.4)).item())
    context = torch.zeros(2, 1, dtype=torch.float64)
    read = model.readout(unroll(model, context, loops=9).state, context)
    assert torch.allclose(read[0], torch.tensor([0.4 * 1 + 0.4 * 2 + 0.2 * 3, 3.0], dtype=torch.float64))


def test_a_state_can_be_handed_on():
    model = ACT(cell(), features=7, bias=-2.0)
    context = model.encode(VECTORS)
    half = unroll(model, context, loops=2).state
    assert isinstance(half, ACTState)
    onward = unroll(model, context, loops=2, start=half).state
    assert torch.equal(onward.spent, unroll(model, context, loops=4).state.spent)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="eps=1"):
        ACT(cell(), features=7, eps=1.0)
    with pytest.raises(ConfigError, match="allowed are tanh, gru"):
        RecurrentCellConfig(inputs=6, cell="lstm")
    with pytest.raises(ConfigError, match="inputs=0"):
        RecurrentCellConfig(inputs=0)
    with pytest.raises(InputError, match=r"takes \(N, 6\)"):
        cell().encode(VECTORS[:, :4])
    with pytest.raises(ConfigError, match="nothing is drawn here"):
        cell().initial_state(cell().encode(VECTORS), 3)
