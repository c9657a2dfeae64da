"""The batch that never ends: rows of all ages, refilled, explored, and resumed to the same bits."""

import pytest
import torch

from loopwise.errors import CheckpointError, ConfigError
from loopwise.loops.drivers import unroll
from loopwise.models.trm import TRM, TRMState
from loopwise.models.trm_config import TRMConfig
from loopwise.objectives.deep_supervision import going_on_target, segment_loss
from loopwise.tasks.sudoku import Sudoku, SudokuConfig
from loopwise.train.deep_supervision import Slots, SupervisionConfig, supervise
from loopwise.train.ema import EmaConfig

TASK = Sudoku(SudokuConfig(size=4, empties=(2, 8), base=20))


def build(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"vocab_size": 5, "places": 16, "width": 8, "heads": 2, "layers": 1, "mlp_width": 12, "puzzle_width": 8}
    model = TRM(TRMConfig(**(shape | {"cycles": 2, "inner_cycles": 2} | changes)))
    with torch.no_grad():
        # Halting logits that spread around zero, so that samples leave at different loops.
        model.halt_head.weight.normal_()
        model.halt_head.bias.zero_()
    return model.double()


def config(**changes):
    return SupervisionConfig(**({"steps": 20, "batch": 6, "max_loops": 4, "learning_rate": 1e-2} | changes))


@pytest.mark.parametrize("explore", [0.0, 0.5])
def test_rows_of_mixed_ages_equal_each_alone(explore):
    """Also their gradients: the batch's is the mean over rows, each going on from its own earlier state."""
    model, slots = build(), None
    slots = Slots(model, TASK, config(explore=explore))
    mixed = False
    for step in range(7):
        numbers, ages, before = slots.numbers.clone(), slots.ages.clone(), slots.state
        problems = slots.problems
        advance = slots.advance(step)
        found = torch.autograd.grad(advance.loss.total, list(model.parameters()), allow_unused=True)
        sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for row in range(6):
            alone = TASK.draw(0, numbers[row : row + 1])
            assert torch.equal(alone.inputs[0], problems.inputs[row])
            context = model.encode(alone.inputs)
            start = None
            if ages[row]:
                with torch.no_grad():
                    start = unroll(model, context, loops=int(ages[row])).state
                assert torch.allclose(start.latent[0], before.latent[row], atol=1e-12)
            out = unroll(model, context, loops=1, start=start, collect=("logits", "signals"))
            right = TASK.verify(alone, out.logits[0].argmax(-1))
            assert right == advance.right[row]
            loss = segment_loss(out.logits[0], alone.targets, right, out.signals[0]).total
            for total, part in zip(
                sums, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), strict=True
            ):
                if part is not None:
                    total += part / 6
            if slots.ages[row]:
                assert torch.allclose(out.state.answer[0], slots.state.answer[row], atol=1e-12)
                assert slots.ages[row] == ages[row] + 1
        for whole, total in zip(found, sums, strict=True):
            assert torch.allclose(total, torch.zeros_like(total) if whole is None else whole, atol=1e-10)
        mixed = mixed or len(set(slots.ages.tolist())) > 2
    assert mixed


def test_slots_take_the_next_problem_and_forget_none():
    model = build()
    slots = Slots(model, TASK, config(explore=0.0))
    seen = [set(slots.numbers.tolist())]
    loops = []
    for step in range(12):
        before = slots.numbers.clone()
        left = slots.advance(step).left
        loops += left.tolist()
        changed = slots.numbers != before
        assert int(changed.sum()) == len(left)
        assert (slots.ages[changed] == 0).all()
        seen.append(set(slots.numbers.tolist()))
    assert set.union(*seen) == set(range(slots.next_number))
    assert slots.samples == len(loops)
    assert slots.loops == sum(loops)
    assert {1, 4} <= set(loops) <= {1, 2, 3, 4}


class Constant(TRM):
    """Halts always, or never."""

    def signal(self, state, prediction):
        return torch.full((len(state.answer),), self.logit)


def ages_at_halting(logit, explore):
    model = Constant(build().config).double()
    model.logit = logit
    slots = Slots(model, TASK, config(explore=explore, batch=64))
    return torch.cat([slots.advance(step).left for step in range(6)]).tolist()


def test_exploration_keeps_samples_in():
    assert set(ages_at_halting(1.0, 0.0)) == {1}
    assert set(ages_at_halting(-1.0, 0.0)) == {4}
    # A new draw in each step, as the authors': with probability 1/3 each the least is 2, 3 or 4.
    explored = ages_at_halting(1.0, 1.0)
    assert min(explored) == 2
    assert explored.count(2) / len(explored) == pytest.approx(1 / 3, abs=0.1)
    assert max(explored) == 4
    assert 0 < sum(age == 1 for age in ages_at_halting(1.0, 0.5)) < 384


def test_hrm_learns_what_going_on_is_worth():
    model = build(answer_layers=1, window="step", halts="over-continue")
    slots = Slots(model, TASK, config(explore=0.0))
    for step in range(4):
        ages, problems, before = slots.ages.clone(), slots.problems, slots.state
        advance = slots.advance(step)
    context = model.encode(problems.inputs)
    fresh = (ages == 0)[:, None, None]
    start = model.initial_state(context)
    start = TRMState(
        answer=torch.where(fresh, start.answer, before.answer), latent=torch.where(fresh, start.latent, before.latent)
    )
    out = unroll(model, context, loops=1, start=start, collect=("logits",))
    halt, go_on = model.halting(out.state).unbind(-1)
    goals = going_on_target(model.halting(model.step(out.state, context, 1)), ages + 1 >= 4).detach()
    right = TASK.verify(problems, out.logits[0].argmax(-1))
    expected = segment_loss(out.logits[0], problems.targets, right, halt, (go_on, goals))
    assert float(advance.loss.total.detach()) == pytest.approx(float(expected.total.detach()), abs=1e-12)
    slope = torch.autograd.grad(advance.loss.total, model.halt_head.weight)[0]
    assert slope[1].any()


def train(folder=None, *, stop_at=None, steps=11, batch=6, seed=0, ema=EmaConfig(decay=0.9)):  # noqa: B008
    lines = []

    def log(step, values):
        lines.append(values)
        if step == stop_at:
            raise KeyboardInterrupt

    settings = config(steps=steps, batch=batch, ema=ema, log_every=1, checkpoint_every=4)
    model = build(seed)
    return model, supervise(model, TASK, settings, checkpoints=folder, log=log), lines


@pytest.mark.parametrize("ema", [None, EmaConfig(decay=0.9)])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, ema):
    whole, told, _ = train(ema=ema)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=10, ema=ema)
    resumed, again, _ = train(tmp_path, ema=ema)
    assert len(again.losses) == 3
    assert again.losses == told.losses[8:]
    assert (again.samples, again.loops) == (told.samples, told.loops)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_average_is_what_leaves():
    assert not torch.equal(train()[0].head.weight, train(ema=None)[0].head.weight)


def test_it_learns():
    torch.manual_seed(0)
    shape = {"vocab_size": 5, "places": 16, "width": 32, "heads": 2, "layers": 1, "mlp_width": 48, "puzzle_width": 32}
    mixing = {"mixing": "mlp", "mixing_width": 32, "positions": "none", "cycles": 2, "inner_cycles": 2}
    model = TRM(TRMConfig(**shape, **mixing))
    task = Sudoku(SudokuConfig(size=4, empties=(1, 2)))
    lines = []
    settings = SupervisionConfig(steps=80, batch=24, max_loops=3, learning_rate=6e-3, ema=EmaConfig(decay=0.9))
    done = supervise(model, task, settings, log=lambda step, values: lines.append(values))
    assert not model.training
    assert lines[-1]["right"] > 0.5 > lines[0]["right"]
    assert lines[-1]["loops"] < 3
    assert len(done.losses) == 80


def test_checkpoints_of_another_run_are_refused(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(CheckpointError, match="batch is of another shape"):
        train(tmp_path, batch=7)


def test_models_whose_loops_differ_are_refused():
    class Counting(TRM):
        def __init__(self, shape):
            super().__init__(shape)
            self.facts = vars(self.facts) and type(self.facts)(**(vars(self.facts) | {"loop_dependent": True}))

    with pytest.raises(ConfigError, match="loop_dependent=True"):
        Slots(Counting(build().config), TASK, config())


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"batch": 0}, "batch=0"), ({"explore": 1.5}, "explore=1.5"), ({"max_loops": 1}, "has no effect"),
     ({"learning_rate": 0.0}, "learning_rate=0.0")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        config(**({"explore": 0.1} | changes))
