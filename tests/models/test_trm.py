"""TRM keeps the protocol's promises, and its gradient windows are what they say."""

import pytest
import torch

from loopwise.errors import ConfigError, InputError
from loopwise.loops.drivers import run_until, unroll
from loopwise.models.trm import TRM, TRMState
from loopwise.models.trm_config import TRMConfig
from loopwise.testing import check_model

SHAPE = {"vocab_size": 5, "places": 6, "width": 8, "heads": 2, "layers": 1, "mlp_width": 12, "cycles": 2}
KINDS = {
    "attention": {"prefix": 2, "puzzle_width": 12, "puzzles": 3},
    "mlp": {"mixing": "mlp", "mixing_width": 10, "positions": "none", "puzzle_width": 8},
    "learned positions": {"positions": "learned", "prefix": 0},
    "hrm": {"answer_layers": 2, "halts": "over-continue"},
}


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return TRM(TRMConfig(**(SHAPE | {"inner_cycles": 2} | changes)))


def puzzles(batch=5):
    return torch.randint(0, 5, (batch, 6), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("kind", "window"), [*((kind, "all") for kind in KINDS), ("attention", "step"), ("hrm", "recursion")]
)
def test_it_keeps_every_promise(kind, window):
    options = {"puzzles": torch.tensor([0, 1, 2, 1, 0])} if "puzzles" in KINDS[kind] else {}
    model = build(window=window, **KINDS[kind])
    report = check_model(model, puzzles(), loops=3, finite_differences=window == "all", **options)
    assert len(report.skipped) == (1 if window == "all" else 2)  # no reference; a cut gradient


def naive(model, inputs, loops):
    """Each sample alone, its updates written out."""
    config, predictions = model.config, []
    for sample, count in zip(inputs, loops.tolist(), strict=True):
        x = model.encode(sample[None])
        state = model.initial_state(x)
        y, z = state.answer, state.latent
        answer_net = model.latent_net if model.answer_net is None else model.answer_net
        rotary = model._rotary(x)

        def run(net, h, rotary=rotary):
            for block in net:
                h = block(h, rotary)
            return h

        for _ in range(count * config.cycles):
            for _ in range(config.inner_cycles):
                z = run(model.latent_net, z + y + x)
            y = run(answer_net, y + z)
        predictions.append(model.readout(TRMState(answer=y, latent=z), x)[0])
    return torch.stack(predictions)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_stop_equal_the_equations(kind):
    check_model(build(window="all", **KINDS[kind]), puzzles(), loops=3, reference=naive, finite_differences=False)


def test_updates_end_in_the_step():
    model = build()
    context = model.encode(puzzles())
    state = model.initial_state(context)
    updates = list(model.updates(state, context))
    assert [(u.cycle, u.of_answer) for u in updates] == [
        (1, False),
        (1, False),
        (1, True),
        (2, False),
        (2, False),
        (2, True),
    ]
    assert torch.equal(updates[-1].state.answer, model.step(state, context, 1).answer)
    assert torch.equal(updates[0].state.answer, state.answer)


@pytest.mark.parametrize("kind", ["attention", "hrm"])
@pytest.mark.parametrize(("window", "free"), [("step", 2), ("recursion", 3), ("all", 6)])
def test_a_window_is_the_gradient_with_all_before_it_held(kind, window, free):
    """Finite differences: the weights move in the last `free` updates only, and what went in before is constant."""
    model = build(window=window, **KINDS[kind]).double()
    inputs = puzzles(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        context = model.encode(inputs)
        held = [model.initial_state(context), *(u.state for u in model.updates(model.initial_state(context), context))]

    def value():
        x, state = model.encode(inputs), held[6 - free]
        for number in range(6 - free, 6):
            state = model._update(state, x, model._rotary(x), of_answer=number % 3 == 2)
        return model.readout(state, x).sin().sum() + model.signal(state, None).sum()

    x = model.encode(inputs)
    last = model.step(model.initial_state(x), x, 1)
    named = [p for name, p in model.named_parameters() if not (name.startswith("answer_net") and free == 0)]
    slopes = torch.autograd.grad(
        model.readout(last, x).sin().sum() + model.signal(last, None).sum(), named, allow_unused=True
    )
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        directions = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in named]
        along = sum(float((g * d).sum()) for g, d in zip(slopes, directions, strict=True) if g is not None)
        ends = []
        for sign in (1e-6, -2e-6):
            with torch.no_grad():
                for parameter, direction in zip(named, directions, strict=True):
                    parameter.add_(direction, alpha=sign)
                ends.append(float(value()))
        with torch.no_grad():
            for parameter, direction in zip(named, directions, strict=True):
                parameter.add_(direction, alpha=1e-6)
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(along, rel=1e-5, abs=1e-6)


def test_a_sure_sample_leaves_the_batch():
    model = build().eval()
    context = model.encode(puzzles())
    with torch.no_grad():
        # An untrained head says the same of everything.
        model.halt_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        signals = unroll(model, context, loops=4, collect=("signals",)).signals
    middle = round(float(signals.median()), 3)
    outcome = run_until(model, context, f"halt:{middle}", max_loops=4)
    stops = [next((i + 1 for i, logit in enumerate(row) if logit > middle), 4) for row in signals.T.tolist()]
    assert outcome.loops.tolist() == stops
    assert len(set(stops)) > 1


@pytest.mark.parametrize(
    ("inputs", "options", "told"),
    [
        (torch.zeros(2, 7, dtype=torch.long), {}, r"puzzles of shape \(2, 7\): allowed is \(batch, 6\)"),
        (torch.full((2, 6), 5), {}, "symbols from 5 to 5: allowed are 0 to 4"),
        (torch.zeros(2, 6, dtype=torch.long), {"puzzles": torch.tensor([0, 3])}, "kinds up to 3: allowed are 0 to 2"),
    ],
)
def test_wrong_inputs_are_refused(inputs, options, told):
    with pytest.raises(InputError, match=told):
        build(**KINDS["attention"]).encode(inputs, **options)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"width": 10, "heads": 4}, "whole and even"),
        ({"mixing": "mlp"}, "give a width with 'mlp'"),
        ({"mixing": "mlp", "mixing_width": 4}, "nothing to rotate"),
        ({"puzzle_width": 9}, "does not fit prefix=1"),
        ({"puzzles": 2}, "cannot be told apart"),
        ({"cycles": 0}, "cycles=0"),
        ({"trained_loops": (3, 2)}, "trained_loops"),
    ],
)
def test_wrong_shapes_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        build(**changes)
