"""The progressive loss: its draws, its value, and a prefix that really has no graph."""

import pytest
import torch

from loopwise.errors import ConfigError
from loopwise.loops.drivers import unroll
from loopwise.models.deep_thinking import DeepThinking, DeepThinkingConfig
from loopwise.objectives.progressive import Progressive, place_loss, progressive_loss
from loopwise.tasks.prefix_sums import PrefixSums, PrefixSumsConfig
from loopwise.tasks.problems import IGNORED, numbers

STRINGS = PrefixSums(PrefixSumsConfig(bits=7)).draw(0, numbers(0, 4))
LOOPS = 6


def network():
    torch.manual_seed(0)
    config = DeepThinkingConfig(dimensions=1, channels=1, width=5, trained_loops=(1, LOOPS))
    return DeepThinking(config).double()


def value(model, objective, step):
    context = model.encode(STRINGS.inputs.double())
    return progressive_loss(model, context, STRINGS.targets, objective, seed=3, step=step)


def partial(step):
    """Loops without gradient and with it at a step."""
    ((_, plan),) = Progressive(loops=LOOPS, alpha=1.0).plans(seed=3, step=step)
    return plan.loops - plan.backprop, plan.backprop


def test_starts_and_lengths_are_uniform_and_functions_of_the_step():
    plans = [partial(step) for step in range(4000)]
    assert plans == [partial(step) for step in range(4000)]
    for without in range(LOOPS):
        lengths = [k for n, k in plans if n == without]
        assert abs(len(lengths) / 4000 - 1 / LOOPS) < 0.02
        for k in range(1, LOOPS - without + 1):
            share, spread = 1 / (LOOPS - without), (len(lengths)) ** -0.5
            assert abs(lengths.count(k) / len(lengths) - share) < 2.5 * spread
        assert max(lengths) <= LOOPS - without


def test_alpha_zero_is_the_plain_loss_and_alpha_weighs_the_two():
    model = network()
    plain = value(model, Progressive(loops=LOOPS, alpha=0.0), 1)
    context = model.encode(STRINGS.inputs.double())
    logits = model.readout(unroll(model, context, loops=LOOPS).state, context)
    assert torch.equal(plain, place_loss(logits, STRINGS.targets))
    alone = value(model, Progressive(loops=LOOPS, alpha=1.0), 1)
    mixed = value(model, Progressive(loops=LOOPS, alpha=0.3), 1)
    assert torch.allclose(mixed, 0.7 * plain + 0.3 * alone)
    assert len(Progressive(loops=LOOPS, alpha=0.0).plans(seed=0, step=0)) == 1


def step_with(wanted):
    return next(step for step in range(10_000) if wanted(*partial(step)))


def test_the_gradient_is_that_of_the_last_loops_alone():
    model = network()
    step = step_with(lambda n, k: n == 2 and k == 2)
    loss = value(model, Progressive(loops=LOOPS, alpha=1.0), step)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        context = model.encode(STRINGS.inputs.double())
        held = unroll(model, context, loops=2).state
    named = list(model.parameters())
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(7)) for p in named]

    @torch.no_grad()
    def after(size):
        for p, d in zip(named, direction, strict=True):
            p.add_(d, alpha=size)
        context = model.encode(STRINGS.inputs.double())
        state = model.step(model.step(held, context, 3), context, 4)
        answer = float(place_loss(model.readout(state, context), STRINGS.targets))
        for p, d in zip(named, direction, strict=True):
            p.add_(d, alpha=-size)
        return answer

    measured = (after(1e-6) - after(-1e-6)) / 2e-6
    along = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True) if g is not None)
    assert along == pytest.approx(measured, rel=1e-5)
    assert along != pytest.approx(0, abs=1e-4)
    # The start state is made by the projection alone, and the loops that could carry its gradient carry none.
    assert found[[name for name, _ in model.named_parameters()].index("projection.weight")] is None


def test_loops_before_the_last_leave_no_graph(monkeypatch):
    model = network()
    graphs = []
    step_of = DeepThinking.step

    def watched(self, state, context, loop):
        after = step_of(self, state, context, loop)
        graphs.append(after.requires_grad)
        return after

    monkeypatch.setattr(DeepThinking, "step", watched)
    step = step_with(lambda n, k: n == 3 and k == 2)
    value(model, Progressive(loops=LOOPS, alpha=1.0), step)
    assert graphs == [False] * 3 + [True] * 2


def test_only_asked_places_cost():
    logits = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 1, 0], [IGNORED, 1, 0, IGNORED], [IGNORED] * 4])
    asked = targets != IGNORED
    terms = -logits.log_softmax(-1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(place_loss(logits, targets), terms[asked].mean())


@pytest.mark.parametrize(("options", "message"), [({"loops": 0}, "loops=0"), ({"alpha": 1.5}, "alpha=1.5")])
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Progressive(**options)
