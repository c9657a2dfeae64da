"""Deep-Thinking networks keep the protocol, equal a plain transcript of their formula, and stop sample by sample."""

import pytest
import torch
import torch.nn.functional as F

from loopwise.errors import ConfigError, InputError
from loopwise.loops.drivers import run_until, unroll
from loopwise.models.deep_thinking import DeepThinking, DeepThinkingConfig
from loopwise.tasks.mazes import Mazes, MazesConfig
from loopwise.tasks.problems import IGNORED, numbers
from loopwise.testing import check_model

MAZES = Mazes(MazesConfig(size=5)).draw(0, numbers(0, 6))
ASKED = MAZES.targets != IGNORED


def network(seed=0, **options):
    torch.manual_seed(seed)
    return DeepThinking(DeepThinkingConfig(**{"width": 8, **options}))


@pytest.mark.parametrize(("recall", "certainty"), [(True, "least"), (False, "mean")])
def test_pictures_keep_every_promise(recall, certainty):
    check_model(network(recall=recall, certainty=certainty), MAZES.inputs, loops=3, asked=ASKED)


@pytest.mark.parametrize("recall", [True, False])
def test_sequences_keep_every_promise(recall):
    drawn = torch.randn(5, 1, 9, generator=torch.Generator().manual_seed(0))
    check_model(network(dimensions=1, channels=1, recall=recall), drawn, loops=3)


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("recall", [True, False])
def test_two_loops_equal_the_formula_written_out(dimensions, recall):
    model = network(dimensions=dimensions, recall=recall, blocks=1).double()
    places = (7,) if dimensions == 1 else (5, 6)
    x = torch.randn(4, 3, *places, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    convolve = F.conv1d if dimensions == 1 else F.conv2d
    weights = dict(model.named_parameters())

    def layer(name, inputs):
        return convolve(inputs, weights[name], padding=1)

    s = layer("projection.weight", x).relu()
    for _ in range(2):
        if recall:
            s = layer("recall.weight", torch.cat((s, x), 1))
            s = s.relu() if dimensions == 1 else s
        s = (s + layer("core.1.weight", layer("core.0.weight", s).relu())).relu()
    logits = layer("head.4.weight", layer("head.2.weight", layer("head.0.weight", s).relu()).relu())
    context = model.encode(x)
    found = model.readout(unroll(model, context, loops=2).state, context)
    assert torch.allclose(found, logits.movedim(1, -1), atol=1e-12)
    assert ("recall.weight" in weights) == recall
    assert not any("bias" in name for name in weights)


def test_widths_are_the_authors():
    pictures = {name: tuple(p.shape) for name, p in network(width=128).named_parameters()}
    assert pictures["recall.weight"] == (128, 131, 3, 3)
    assert [pictures[f"head.{i}.weight"][0] for i in (0, 2, 4)] == [32, 8, 2]
    bits = {name: tuple(p.shape) for name, p in network(dimensions=1, channels=1, width=400).named_parameters()}
    assert bits["recall.weight"] == (400, 401, 3)
    assert [bits[f"head.{i}.weight"][0] for i in (0, 2, 4)] == [400, 200, 2]
    assert sum("core" in name for name in bits) == 4


def test_the_certainty_is_the_largest_probability_and_walls_are_sure():
    for kind in ("mean", "least"):
        model = network(certainty=kind)
        context = model.encode(MAZES.inputs, asked=ASKED)
        state = unroll(model, context, loops=2).state
        prediction = model.readout(state, context)
        confidence = prediction.softmax(-1).max(-1).values
        assert bool((confidence[~ASKED] == 1).all())
        assert bool((prediction.argmax(-1)[~ASKED] == 0).all())
        expected = [getattr(c.flatten(), "mean" if kind == "mean" else "min")() for c in confidence]
        assert torch.allclose(model.signal(state, prediction), torch.stack(expected))
        raw = model.readout(state, model.encode(MAZES.inputs))
        assert torch.equal(raw[ASKED], prediction[ASKED])


def test_samples_that_are_sure_leave_the_batch():
    model = network()
    context = model.encode(MAZES.inputs, asked=ASKED)
    certain = unroll(model, context, loops=4, collect=("signals",)).signals.detach()
    threshold = float(certain[0].median())
    outcome = run_until(model, context, f"certainty:{threshold}", max_loops=4)
    expected = [next((n for n in range(4) if column[n] >= threshold), 3) + 1 for column in certain.T]
    assert outcome.loops.tolist() == expected
    assert 1 in expected
    assert max(expected) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": 3}, "dimensions=3: allowed are 1"),
        ({"width": 0}, "width=0"),
        ({"classes": 1}, "classes=1"),
        ({"dimensions": 1, "width": 1}, "head_widths"),
        ({"certainty": "sum"}, "allowed are mean, least"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DeepThinkingConfig(**options)


def test_inputs_of_another_shape_are_refused():
    model = network()
    with pytest.raises(InputError, match=r"takes \(N, 3, height, width\)"):
        model.encode(MAZES.inputs[:, :2])
    with pytest.raises(InputError, match="one per place"):
        model.encode(MAZES.inputs, asked=ASKED[:, :3])
