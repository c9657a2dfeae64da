"""Language models on problems made in code: what is asked is what is learned, and answers are those of the model."""

import dataclasses

import pytest
import torch

from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM, initialise
from loopwise.objectives.expected import ExpectedLoss
from loopwise.objectives.last_loop import LastLoop
from loopwise.objectives.random_depth import RandomDepth
from loopwise.tasks.mano import Mano, ManoConfig
from loopwise.tasks.problems import IGNORED, Problems, numbers
from loopwise.tasks.reachability import Reachability, ReachabilityConfig
from loopwise.train.fit import FitConfig
from loopwise.train.tasks import answer, problem_batches, problem_loss, train_on_problems, whole_sequence

MANO = Mano(ManoConfig(modulus=3, operations=1))


def config(vocab_size: int, length: int, *, loops: int = 2, gate: bool = False, start: str = "embeddings"):
    return LoopedLMConfig(
        vocab_size=vocab_size,
        width=32,
        heads=2,
        kv_heads=2,
        head_width=16,
        mlp_width=48,
        core_layers=1,
        loops=loops,
        trained_loops=(1, loops),
        max_positions=length,
        tied_head=True,
        gate=gate,
        start=start,
        injection="none" if start == "embeddings" else "add",
    )


def model_for(task, **options) -> LoopedLM:
    model = LoopedLM(config(task.vocab_size, task.length, **options)).double()
    initialise(model, seed=0)
    return model


def test_the_loss_is_the_cross_entropy_of_what_is_asked():
    model = model_for(MANO, loops=3)
    problems = Mano(ManoConfig(modulus=3, operations=1, asked="parts")).draw(0, numbers(0, 5))
    found = problem_loss(model, LastLoop(loops=3), seed=0, steps=10)(problems, 0)
    logits = model(problems.inputs, loops=3).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), problems.targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    found.backward()
    assert model.embed.weight.grad is not None


def test_places_count_from_their_first_loop_on():
    model = model_for(MANO, gate=True)
    problems = MANO.draw(0, numbers(0, 5))
    late = problem_loss(
        model, ExpectedLoss(loops=2, beta=0.0), seed=0, steps=10, first_loop=lambda p: torch.full_like(p.inputs, 2)
    )(problems, 0)
    logits = model(problems.inputs, loops=2).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), problems.targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(late, wanted, rtol=1e-9, atol=1e-9)


def test_a_set_is_read_from_both_ends():
    """Every token sees every other one: an edge that stands later changes what is said about an earlier one."""
    task = Reachability(ReachabilityConfig(nodes=4, longest=1, layout="edges"))
    model = model_for(task)
    problems = task.draw(0, numbers(0, 2))
    changed = problems.inputs.clone()
    changed[:, -1] = torch.where(changed[:, -1] == 20, 21, 20)
    other = dataclasses.replace(problems, inputs=changed)

    def first_logits(asked: Problems, memory) -> torch.Tensor:
        context = model.encode(asked.inputs, memory=None if memory is None else memory(asked))
        return model.readout(model.step(model.initial_state(context), context, 1), context)[:, 0]

    assert torch.equal(first_logits(problems, None), first_logits(other, None))
    assert not torch.allclose(first_logits(problems, whole_sequence), first_logits(other, whole_sequence))


def test_answers_in_parts_are_those_of_the_model():
    model = model_for(MANO, gate=True)
    problems = Mano(ManoConfig(modulus=3, operations=1, asked="parts")).draw(0, numbers(0, 7))
    found = answer(model, problems, loops=2, rows=3)
    with torch.no_grad():
        out = model(problems.inputs, loops=2, collect=("logits", "signals"))
    assert torch.equal(found.answers, out.loop_logits.argmax(-1))
    assert torch.allclose(found.hazards, out.loop_signals)
    for loop in range(2):
        for row in range(7):
            asked = problems.targets[row] != IGNORED
            targets = problems.targets[row][asked]
            losses = torch.nn.functional.cross_entropy(out.loop_logits[loop, row][asked], targets)
            assert float(found.losses[loop, row]) == pytest.approx(float(losses), rel=1e-5)
            assert bool(found.right[loop, row]) == torch.equal(found.answers[loop, row][asked], targets)


def test_every_step_has_problems_of_its_own():
    batches = problem_batches(lambda step: MANO, seed=0, rows=4)
    assert torch.equal(batches(3).inputs, batches(3).inputs)
    assert not torch.equal(batches(3).inputs, batches(4).inputs)
    assert not torch.equal(problem_batches(lambda step: MANO, seed=1, rows=4)(3).inputs, batches(3).inputs)


def test_it_learns_one_operation():
    fitted = train_on_problems(
        config(MANO.vocab_size, MANO.length),
        MANO,
        LastLoop(loops=2),
        FitConfig(steps=250, learning_rate=5e-3),
        rows=32,
        seed=0,
    )
    right = answer(fitted, MANO.draw(1, numbers(0, 200)), loops=2).right
    assert float(right[-1].double().mean()) > 0.95


def test_a_curriculum_and_random_depths_go_on_to_the_same_bits(tmp_path):
    """Stopped after half of the steps, a fit with both ends where the whole one does."""
    easy = Mano(ManoConfig(modulus=3, operations=2, shortest=1))
    hard = Mano(ManoConfig(modulus=3, operations=2, shortest=2))
    seen: list[int] = []

    def tasks(step: int) -> Mano:
        seen.append(step)
        if step == stop_at:
            raise KeyboardInterrupt
        return easy if step < 4 else hard

    def train(folder=None) -> LoopedLM:
        return train_on_problems(
            config(easy.vocab_size, easy.length, start="normal"),
            tasks,
            RandomDepth(loops=2, sampler="uniform"),
            FitConfig(steps=8, checkpoint_every=2),
            rows=4,
            seed=5,
            checkpoints=folder,
        )

    stop_at = -1
    whole = train()
    stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    stop_at = -1
    resumed = train(tmp_path)
    assert seen[-4:] == [4, 5, 6, 7]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
