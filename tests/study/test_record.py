"""The record beside a plain unroll, for tokens; and beside what is known by hand, for samples."""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from loopwise.errors import InputError
from loopwise.loops.drivers import unroll
from loopwise.loops.exits import RULES, parse_rule, replay
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.axes import as_data, axes_of
from loopwise.study.depth import DepthCurve, depth
from loopwise.study.examples import Examples, of_task
from loopwise.study.record import Record, pick, record
from loopwise.study.rules import default_rule, families, family_of
from loopwise.tasks.problems import IGNORED

tiny = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]
minds = runpy.run_path(str(Path(__file__).parent / "minds.py"))


def tokens(model: LoopedLM, *, rows: int = 3, length: int = 8) -> Examples:
    drawn = torch.randint(model.config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    targets = drawn[:, 1:].clone()
    targets[1, :3] = IGNORED
    return Examples(inputs=drawn[:, :-1], targets=targets, difficulty=torch.arange(rows * length).view(rows, length))


def of_tokens(shape: str = "ouro", loops: int = 5) -> tuple[LoopedLM, Examples, Record]:
    model = tiny(shape, seed=2)
    data = tokens(model)
    return model, data, record(model, [data], max_loops=loops, keep_states=True)


def test_tokens_are_those_of_an_unroll() -> None:
    model, data, taken = of_tokens()
    context = model.encode(data.inputs)
    with torch.no_grad():
        out = unroll(model, context, loops=5, collect=("states", "signals", "logits"))
    asked = data.targets != IGNORED
    assert out.states is not None
    assert out.signals is not None
    assert out.logits is not None
    states = torch.cat([model.initial_state(context)[None], out.states])[:, asked].detach().numpy()
    chances = out.logits[:, asked].log_softmax(-1).numpy()
    targets = data.targets[asked].numpy()
    units = np.arange(len(targets))
    np.testing.assert_allclose(taken.losses, -chances[:, units, targets], rtol=1e-12)
    np.testing.assert_array_equal(taken.answers, chances.argmax(-1))
    np.testing.assert_array_equal(taken.right, chances.argmax(-1) == targets)
    np.testing.assert_allclose(taken.confidence, np.exp(chances.max(-1)), rtol=1e-12)
    np.testing.assert_allclose(taken.signals, out.signals[:, asked].numpy(), rtol=1e-12)
    np.testing.assert_allclose(taken.states, states, rtol=1e-12)
    entropy = -(np.exp(chances) * chances).sum(-1)
    np.testing.assert_allclose(taken.certainty, 1 - entropy / math.log(chances.shape[-1]), rtol=1e-9)
    np.testing.assert_allclose(taken.entropy_change[1:], np.abs(np.diff(entropy, axis=0)), rtol=1e-9)
    np.testing.assert_allclose(taken.kl[1:], (np.exp(chances[:-1]) * (chances[:-1] - chances[1:])).sum(-1), rtol=1e-9)
    moves = np.diff(states, axis=0)
    size = np.linalg.norm(moves, axis=-1)
    np.testing.assert_allclose(taken.change, size / np.linalg.norm(states[1:], axis=-1), rtol=1e-12)
    np.testing.assert_allclose(taken.turn[1:], np.linalg.norm(np.diff(moves, axis=0), axis=-1), rtol=1e-12)
    np.testing.assert_allclose(taken.cosine[1:], (moves[1:] * moves[:-1]).sum(-1) / (size[1:] * size[:-1]), rtol=1e-9)
    assert np.isnan(taken.turn[0]).all()
    np.testing.assert_array_equal(taken.problem, asked.nonzero()[:, 0])
    np.testing.assert_array_equal(taken.difficulty, data.difficulty[asked])
    np.testing.assert_array_equal(taken.targets, targets)


@pytest.mark.parametrize("shape", ["ouro", "huginn", "universal"])
def test_batches_and_the_order_of_units(shape: str) -> None:
    model = tiny(shape, seed=2)
    whole = tokens(model)
    parts = [
        Examples(inputs=whole.inputs[rows], targets=whole.targets[rows], difficulty=whole.difficulty[rows])
        for rows in (slice(0, 1), slice(1, 3))
    ]
    one, two = record(model, [whole], max_loops=3), record(model, parts, max_loops=3)
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-9)
    np.testing.assert_array_equal(two.problem, one.problem)
    some = pick(one, np.array([4, 1]))
    np.testing.assert_array_equal(some.losses, one.losses[:, [4, 1]])
    np.testing.assert_array_equal(some.problem, one.problem[[4, 1]])


def test_samples_are_known_by_hand() -> None:
    task, model = minds["Numbers"](most=4), minds["Countdown"](most=4, sharp=3.0)
    taken = record(model, of_task(task, seed=1, count=50, rows=20), keep_states=True)
    hard = taken.difficulty
    assert hard is not None
    assert set(hard) == {1, 2, 3, 4}
    expected = hard[None, :] <= np.arange(1, 5)[:, None]
    np.testing.assert_array_equal(taken.right, expected)
    np.testing.assert_array_equal(taken.answers, np.where(expected, hard, 0))
    sure = math.exp(3) / (math.exp(3) + 4)
    np.testing.assert_allclose(taken.confidence, sure)
    np.testing.assert_allclose(taken.losses, np.where(expected, -math.log(sure), -math.log((1 - sure) / 4)))
    np.testing.assert_allclose(taken.change, np.repeat([[1.0], [1 / 2], [1 / 3], [1 / 4]], 50, axis=1))
    np.testing.assert_allclose(taken.cosine[1:], 1.0)
    np.testing.assert_allclose(taken.turn[1:], 0.0)
    assert taken.states is not None
    assert taken.states.shape == (5, 50, 1)
    assert (taken.unit, taken.units, taken.loops, taken.classes) == ("sample", 50, 4, 5)


def test_samples_of_several_places_are_right_as_a_whole() -> None:
    task, model = minds["Numbers"](most=4, places=3), minds["Countdown"](most=4, single=False)
    taken = record(model, of_task(task, seed=1, count=40))
    numbers = task.draw(1, torch.arange(40)).targets.numpy()
    found = numbers[None] <= np.arange(1, 5)[:, None, None]
    np.testing.assert_array_equal(taken.right, found.all(-1))
    np.testing.assert_allclose(taken.share, found.mean(-1))
    sure = math.exp(3) / (math.exp(3) + 4)
    np.testing.assert_allclose(taken.confidence, sure**3)
    answers = np.where(found, numbers, 0)
    same = (answers[:, :, None] == answers[:, None, :]).all(-1)
    np.testing.assert_array_equal(taken.answers[:, :, None] == taken.answers[:, None, :], same)
    assert taken.targets is None


def test_predictions_of_another_shape_say_how_to_bring_them_into_it() -> None:
    task, model = minds["Numbers"](most=4, places=3), minds["Countdown"](most=4, single=False)
    data = of_task(task, seed=1, count=5, read=lambda prediction: prediction.transpose(1, 2))
    with pytest.raises(InputError, match=r"\(5, 5, 3\).*read="):
        record(model, data)
    turned = minds["Countdown"](most=4, single=False)
    turned.readout = lambda state, context: type(turned).readout(turned, state, context).transpose(1, 2)
    straight = record(model, of_task(task, seed=1, count=5))
    np.testing.assert_array_equal(record(turned, data).losses, straight.losses)


RULES_TO_REPLAY = [
    "hazard:0.5",
    "hazard:0.9",
    "delta:0.5",
    "delta:1.1",
    "second-difference:3.0",
    "second-difference:5.0",
    "kl:0.5",
    "kl:0.05",
    "entropy:0.2",
    "stable:1",
    "stable:2",
    "certainty:0.2",
    "certainty:0.17",
]


@pytest.mark.parametrize("rule", RULES_TO_REPLAY)
def test_every_rule_replays_as_the_rule_itself(rule: str) -> None:
    model, data, taken = of_tokens(loops=8)
    context = model.encode(data.inputs)
    with torch.no_grad():
        out = unroll(model, context, loops=8, collect=("states", "signals", "logits"))
    asked = data.targets != IGNORED
    assert out.states is not None
    assert out.signals is not None
    assert out.logits is not None
    parsed = parse_rule(rule).bind("hazard")
    expected = replay(
        parsed,
        states=out.states[:, asked],
        signals=out.signals[:, asked],
        logits=out.logits[:, asked],
        start=model.initial_state(context)[asked],
        unit_axes=1,
    )
    family, threshold = family_of(taken, rule)
    assert family.reads == ("logits" in parsed.needs)
    np.testing.assert_array_equal(family.exits(threshold), expected)


def test_the_rules_to_replay_decide_something_and_leave_none_out() -> None:
    _, _, taken = of_tokens(loops=8)
    means = {rule: (lambda found: found[0].exits(found[1]).mean())(family_of(taken, rule)) for rule in RULES_TO_REPLAY}
    assert all(1 < mean < 8 for mean in means.values()), means
    assert {family.name for family in families(taken)} == set(RULES) - {"fixed", "patience", "budget", "halt"}


def test_thresholds_spread_over_the_range_and_are_taken_by_the_rule() -> None:
    _, _, taken = of_tokens(loops=8)
    for family in families(taken):
        chosen = family.thresholds(12)
        means = [family.exits(threshold).mean() for threshold in chosen]
        assert means == sorted(means), family.name
        assert all(str(parse_rule(family.rule(threshold))) == family.rule(threshold) for threshold in chosen)
        assert len(chosen) >= 5
    assert default_rule(taken) == "hazard:0.6"


def test_depth_of_one_seed_and_of_several() -> None:
    _, _, taken = of_tokens()
    curve = depth(taken)
    np.testing.assert_allclose(curve.accuracy, taken.right.mean(1))
    np.testing.assert_allclose(curve.loss, taken.losses.mean(1))
    assert curve.loss_band.shape == (2, 5)
    assert (curve.loss_band[0] < curve.loss).all()
    assert (curve.loss < curve.loss_band[1]).all()
    assert (np.diff(curve.seconds) > 0).all()
    model = tiny("ouro", seed=3)
    other = record(model, [tokens(model)], max_loops=5)
    both = depth([taken, other])
    np.testing.assert_allclose(both.loss, (taken.losses.mean(1) + other.losses.mean(1)) / 2)
    # Two seeds: Student's t of one degree of freedom, times half the distance.
    half = 12.706 * np.abs(taken.losses.mean(1) - other.losses.mean(1)) / 2
    np.testing.assert_allclose(both.loss_band[1] - both.loss, half, rtol=1e-6)
    with pytest.raises(InputError, match="same number of loops"):
        depth([taken, record(model, [tokens(model)], max_loops=4)])


def test_costs_of_a_language_model_follow_from_its_configuration() -> None:
    model, _, taken = of_tokens("coda")
    costs = taken.costs
    config = model.config
    block = 2 * config.width * ((2 * config.heads + 2 * config.kv_heads) * config.head_width + 3 * config.mlp_width)
    scores = 4 * 4 * config.heads * config.head_width
    head = 2 * config.vocab_size * config.width
    assert costs.encode == config.prelude_layers * (block + scores)
    assert costs.per_loop == config.core_layers * (block + scores) + 2 * config.width
    assert costs.readout == config.coda_layers * (block + scores) + head
    assert costs.flops(3) == costs.encode + 3 * costs.per_loop + costs.readout
    assert costs.flops(3, reads=True) == costs.encode + 3 * (costs.per_loop + costs.readout)
    plane = 2 * config.kv_heads * config.head_width * 8
    assert costs.kv_bytes(3) == (config.prelude_layers + config.coda_layers + 3 * config.core_layers) * plane


def test_costs_of_any_other_model_are_counted_while_it_runs() -> None:
    class Wide(minds["Countdown"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(most=4)
            self.weight = torch.nn.Parameter(torch.zeros(1, 6, dtype=torch.float64))

        def step(self, state: torch.Tensor, context: object, loop: int) -> torch.Tensor:
            return state + 1 + (state @ self.weight).sum(1, keepdim=True)

    taken = record(Wide(), of_task(minds["Numbers"](), seed=1, count=10))
    assert (taken.costs.encode, taken.costs.per_loop, taken.costs.readout) == (0.0, 2.0 * 6, 0.0)


def test_axes_come_from_annotations_and_results_become_json() -> None:
    _, _, taken = of_tokens()
    assert axes_of(Record)["states"] == ("depths", "units", "features")
    assert axes_of(DepthCurve)["seed_loss"] == ("seeds", "loops")
    told = json.loads(json.dumps(as_data(depth(taken)), allow_nan=False))
    assert told["seed_loss"]["axes"] == ["seeds", "loops"]
    assert np.shape(told["seed_loss"]["values"]) == (1, 5)
    whole = json.loads(json.dumps(as_data(taken), allow_nan=False))
    assert whole["turn"]["values"][0][0] is None
    assert whole["costs"]["per_loop"] == taken.costs.per_loop


def test_what_was_not_recorded_is_said() -> None:
    model = tiny("ouro")
    data = tokens(model)
    bare = record(model, [Examples(inputs=data.inputs, targets=data.targets)], max_loops=2)
    with pytest.raises(InputError, match="keep_states=True"):
        bare.need_states()
    with pytest.raises(InputError, match="pointer-chasing"):
        bare.need_difficulty()
    with pytest.raises(InputError, match="nothing to study"):
        record(model, [])
