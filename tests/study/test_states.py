"""Convergence, trajectories, agreement, lenses and boards, on states of which everything is known."""

import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loopwise.errors import ConfigError, InputError
from loopwise.loops.protocol import LoopFacts
from loopwise.study.convergence import convergence, convergence_map, end_of, perturb
from loopwise.study.examples import Examples, of_task
from loopwise.study.faithfulness import faithfulness, probe_accuracy, split
from loopwise.study.grid import grid, walk
from loopwise.study.lens import lens
from loopwise.study.record import Record, record
from loopwise.study.trajectory import similarity, trajectory
from loopwise.tasks.mazes import Mazes, MazesConfig
from loopwise.tasks.problems import IGNORED

folder = Path(__file__).parent
tiny = runpy.run_path(str(folder.parent / "models" / "naive_lm.py"))["tiny"]
minds = runpy.run_path(str(folder / "minds.py"))
of_tokens = runpy.run_path(str(folder / "test_record.py"))["of_tokens"]


class Linear(minds["Countdown"]):  # type: ignore[misc]
    """s <- M s + e: a matrix decides where states go."""

    def __init__(self, matrix: list[list[float]], loops: int = 24) -> None:
        super().__init__(most=4)
        self.matrix = torch.tensor(matrix, dtype=torch.float64)
        self.facts = LoopFacts(**(vars(self.facts) | {"trained_loops": (1, loops)}))

    def initial_state(self, context: Any, start: Any = None) -> torch.Tensor:
        return torch.stack([context["numbers"][:, 0], torch.ones(len(context["numbers"]))], dim=1).double()

    def step(self, state: torch.Tensor, context: Any, loop: int) -> torch.Tensor:
        return state @ self.matrix.T

    def readout(self, state: torch.Tensor, context: Any) -> torch.Tensor:
        return torch.cat([state, -state, state[:, :1]], dim=1)

    def signal(self, state: torch.Tensor, prediction: torch.Tensor | None) -> torch.Tensor:
        return torch.ones(len(state), dtype=torch.float64)


def turning(angle: float, length: float = 1.0) -> list[list[float]]:
    c, s = length * math.cos(angle), length * math.sin(angle)
    return [[c, -s], [s, c]]


def run(matrix: list[list[float]], **options: Any) -> Record:
    return record(Linear(matrix), of_task(minds["Numbers"](), seed=1, count=12), keep_states=True, **options)


@pytest.mark.parametrize(
    ("matrix", "kind", "period"),
    [
        ([[1.0, 0.0], [0.0, 0.5]], 0, 1),
        (turning(2 * math.pi / 3), 1, 3),
        (turning(math.pi), 1, 2),
        (turning(1.0), 2, 0),
        ([[1.5, 0.0], [0.0, 1.5]], 2, 0),
    ],
)
def test_fixed_points_cycles_and_drift_are_told_apart(matrix: list[list[float]], kind: int, period: int) -> None:
    found = convergence(run(matrix))
    assert set(found.kind) == {kind}
    assert set(found.period) == {period}
    assert sum(found.shares.values()) == pytest.approx(1.0)


def test_steps_angles_and_distances_of_a_shrinking_turn() -> None:
    """s_i = r^i R(a)^i s_0: the step has |1 - 1/(r e^ia)| of the state, and turns by a."""
    length, angle, loops = 0.9, 0.7, 24
    found = convergence(run(turning(angle, length)))
    step = abs(1 - 1 / (length * complex(math.cos(angle), math.sin(angle))))
    np.testing.assert_allclose(found.change, step)
    np.testing.assert_allclose(found.cosine[:, 1:], math.cos(angle))
    assert np.isnan(found.cosine[:, 0]).all()
    factor = length * complex(math.cos(angle), math.sin(angle))
    away = [abs(factor**loop - factor**loops) / abs(factor**loops) for loop in range(1, loops + 1)]
    np.testing.assert_allclose(found.distance[1], away, atol=1e-9)
    assert found.factor == pytest.approx(length)


def test_ends_of_runs_of_zeros_are_fixed() -> None:
    kind, period = end_of(np.zeros((5, 2, 3)), tolerance=0.01)
    assert (kind.tolist(), period.tolist()) == ([0, 0], [1, 1])


@pytest.mark.parametrize(("length", "recovered"), [(0.8, 1.0), (1.2, 0.0)])
def test_a_push_fades_or_grows_as_the_matrix_says(length: float, recovered: float) -> None:
    data = of_task(minds["Numbers"](), seed=1, count=12)
    found = perturb(Linear(turning(0.3, length)), data, at=2, size=0.05, max_loops=10)
    # The distance and the norm change alike, so their ratio stays; without the turn's length it would be the same.
    np.testing.assert_allclose(found.distance, 0.05)
    damped = perturb(Linear([[1.0, 0.0], [0.0, length]]), data, at=2, size=0.05, max_loops=30)
    assert damped.loops.tolist() == list(range(2, 31))
    assert damped.distance[1, 0] == pytest.approx(0.05)
    assert (damped.distance[1, -1] < 0.05) == bool(recovered)
    with pytest.raises(ConfigError, match="1 to 9"):
        perturb(Linear(turning(0.3)), data, at=10, max_loops=10)


def test_a_push_of_tokens_is_of_the_size_asked_for() -> None:
    model, data, _ = of_tokens()
    found = perturb(model, [data], at=1, size=0.2, max_loops=3)
    np.testing.assert_allclose(found.distance[:, 0], 0.2)
    assert found.same_answer.shape == (3,)


def test_the_map_shows_each_token_s_distance_to_its_end() -> None:
    _, _, taken = of_tokens()
    texts = [str(index) for index in range(8)]
    found = convergence_map(taken, texts, problem=2)
    assert taken.states is not None
    units = np.flatnonzero(taken.problem == 2)
    np.testing.assert_allclose(
        found.distance[3, 1], np.linalg.norm(taken.states[1, units[3]] - taken.states[5, units[3]])
    )
    assert (found.distance[:, -1] == 0).all()
    with pytest.raises(InputError, match="5 units and 8 texts"):
        convergence_map(taken, texts, problem=1)


def test_components_explain_what_a_singular_value_decomposition_says() -> None:
    _, _, taken = of_tokens()
    found = trajectory(taken, components=4, shuffles=20)
    assert taken.states is not None
    flat = taken.states.reshape(-1, taken.states.shape[-1])
    centred = flat - flat.mean(0)
    _, size, axes = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(found.explained, (size**2 / (size**2).sum())[:4])
    expected = (centred @ axes[:4].T).reshape(6, -1, 4)
    np.testing.assert_allclose(np.abs(found.paths), np.abs(expected), atol=1e-8)
    few = Record(**(vars(taken) | {"states": taken.states[:, :, :]}))
    wide = np.concatenate([few.need_states()] + [np.zeros_like(few.need_states())] * 20, axis=-1)
    padded = trajectory(Record(**(vars(taken) | {"states": wide})), components=4, shuffles=20)
    np.testing.assert_allclose(np.abs(padded.paths), np.abs(expected), atol=1e-6)


def test_a_straight_line_is_straight() -> None:
    found = trajectory(run([[2.0, 0.0], [0.0, 2.0]], max_loops=4), components=2, shuffles=5)
    np.testing.assert_allclose(found.straightness, 1.0)
    assert found.kind == "difficulty"


def test_similarity_is_the_mean_over_pairs() -> None:
    drawn = np.random.default_rng(0)
    states, kinds = drawn.normal(size=(9, 4)), drawn.integers(0, 3, 9).astype(float)
    off = states - states.mean(0)
    unit = off / np.linalg.norm(off, axis=1, keepdims=True)
    same, other = [], []
    for one in range(9):
        for two in range(9):
            if one != two:
                (same if kinds[one] == kinds[two] else other).append(float(unit[one] @ unit[two]))
    assert similarity(states, kinds) == pytest.approx((np.mean(same), np.mean(other)))
    assert math.isnan(similarity(states, np.arange(9.0))[0])


def test_types_that_differ_are_found_and_shuffled_ones_are_not() -> None:
    _, _, taken = of_tokens()
    drawn = np.random.default_rng(0)
    kinds = np.repeat([0.0, 1.0, 2.0], 7)
    states = np.repeat(np.eye(3)[kinds.astype(int)][None], 6, axis=0) + 0.1 * drawn.normal(size=(6, 21, 3))
    apart = trajectory(Record(**(vars(taken) | {"states": states, "difficulty": kinds})), shuffles=99)
    assert apart.chance == pytest.approx(0.01)
    noise = drawn.normal(size=(6, 21, 3))
    alike = trajectory(Record(**(vars(taken) | {"states": noise, "difficulty": kinds})), shuffles=99)
    assert alike.chance > 0.05


def test_agreement_and_what_loops_change() -> None:
    taken = record(minds["Countdown"](most=4), of_task(minds["Numbers"](), seed=1, count=60), keep_states=True)
    found = faithfulness(taken)
    hard = taken.difficulty
    assert hard is not None
    for one in range(4):
        for two in range(4):
            low, high = sorted((one + 1, two + 1))
            assert found.agreement[one, two] == pytest.approx(1 - ((hard > low) & (hard <= high)).mean())
    np.testing.assert_allclose(found.changed[1:], [(hard == loop).mean() for loop in (2, 3, 4)])
    np.testing.assert_allclose(found.mended, found.changed)
    assert (found.spoiled[1:] == 0).all()
    # The state is the number of loops: it says nothing of the answer, so a probe can only guess.
    np.testing.assert_allclose(found.probe[2], found.baseline)


def test_probes_read_what_is_linear_and_only_on_what_they_have_not_seen() -> None:
    drawn = np.random.default_rng(0)
    features = drawn.normal(size=(400, 5))
    fitted = split(np.arange(400) // 4, seed=0)
    linear = features[:, :3].argmax(1) * 7
    noise = drawn.integers(0, 3, 400)
    read, guessed = probe_accuracy(features, [linear, noise], fitted, ridge=1e-3)
    assert read > 0.9
    assert abs(guessed - 1 / 3) < 0.1
    # The same by least squares on the stacked, penalised system.
    x = (features - features[fitted].mean(0)) / features[fitted].std(0)
    x = np.concatenate([x, np.ones((400, 1))], axis=1)
    stacked = np.concatenate([x[fitted], math.sqrt(1e-3 * fitted.sum()) * np.eye(6)])
    wanted = np.concatenate([np.eye(3)[linear[fitted] // 7], np.zeros((6, 3))])
    weights = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
    assert read == pytest.approx(((x[~fitted] @ weights).argmax(1) * 7 == linear[~fitted]).mean())


def test_the_split_keeps_problems_whole() -> None:
    problem = np.repeat(np.arange(9), 4)
    fitted = split(problem, seed=1)
    assert sum(fitted[problem == one].all() for one in range(9)) == 5
    assert sum((~fitted)[problem == one].all() for one in range(9)) == 4
    with pytest.raises(InputError, match="at least 2"):
        split(np.zeros(5, dtype=int), seed=0)


@pytest.mark.parametrize("shape", ["ouro", "huginn", "coda"])
def test_the_coda_lens_is_the_readout_and_the_logit_lens_is_the_head_alone(shape: str) -> None:
    model = tiny(shape, seed=2)
    ids = [3, 1, 4, 1, 5, 9]
    model.facts = LoopFacts(**(vars(model.facts) | {"trained_loops": (1, 3)}))
    found = lens(model, ids, max_loops=4)
    with torch.no_grad():
        out = model(torch.tensor([ids]), loops=4, collect=("logits", "states"))
    own = out.loop_logits[:, 0].softmax(-1)
    assert found.lenses == (("coda", "logit") if len(model.coda) else ("readout",))
    np.testing.assert_array_equal(found.top[0, :, :, 0], own.argmax(-1))
    np.testing.assert_allclose(found.top_probability[0], own.topk(5).values, rtol=1e-9)
    best = own[2].argmax(-1)
    np.testing.assert_allclose(found.final_probability[0], own[:, torch.arange(6), best], rtol=1e-9)
    np.testing.assert_allclose(found.kl[0], (own * (own.log() - own[2].log())).sum(-1), atol=1e-12)
    np.testing.assert_allclose(found.entropy[0], -(own * own.log()).sum(-1), rtol=1e-9)
    if len(model.coda):
        with torch.no_grad():
            bare = (model.norm(out.loop_states[:, 0]) @ model.head_weight.T).softmax(-1)
        np.testing.assert_array_equal(found.top[1, :, :, 0], bare.argmax(-1))
        assert (found.top[0] != found.top[1]).any()


class Painter(minds["Countdown"]):  # type: ignore[misc]
    """Marks the first `loop` squares of the picture that are free, line by line, and looks at the next one."""

    def readout(self, state: torch.Tensor, context: Any) -> torch.Tensor:
        free = (context["numbers"].amax(1) > 0.5).flatten(1)
        marked = free & (free.cumsum(1) <= state)
        logits = torch.stack([torch.zeros_like(free, dtype=torch.double), 4.0 * marked - 2.0], dim=-1)
        return logits.view(len(free), *context["numbers"].shape[2:], 2)

    def attention_weights(self, before: Any, after: Any, context: Any) -> torch.Tensor:
        weights = torch.zeros(len(before), 2, 121, dtype=torch.float64)
        weights[:, :, int(before[0, 0])] = 1
        return weights


def test_boards_of_a_maze_loop_by_loop() -> None:
    task = Mazes(MazesConfig(size=9))
    examples = of_task(task, seed=0, count=3)[0]
    found = grid(Painter(most=4), examples, number=2)
    picture, target = examples.inputs[2], examples.targets[2]
    assert found.answer.shape == (4, 11, 11)
    assert [int((board == 1).sum()) for board in found.answer] == [1, 2, 3, 4]
    assert ((found.answer[0] == -1) == (target == IGNORED).numpy()).all()
    walls = np.array([[mark == "#" for mark in line] for line in found.given])
    assert (walls == (picture.sum(0) == 0).numpy()).all()
    assert sum(mark == "S" for line in found.given for mark in line) == 1
    assert found.sure is not None
    assert np.nanmin(found.sure) == pytest.approx(1 / (1 + math.exp(-2)))
    assert found.attention is not None
    assert found.attention.shape == (4, 2, 11, 11)
    assert found.attention[3, 0].argmax() == 3
    assert not found.right.any()
    with pytest.raises(InputError, match="problems 0 to 2"):
        grid(Painter(), examples, number=3)


def test_the_right_answer_is_right_on_its_board() -> None:
    class Knows(Painter):
        def readout(self, state: torch.Tensor, context: Any) -> torch.Tensor:
            wanted = examples.targets[1:2].clamp(min=0)
            return torch.nn.functional.one_hot(torch.where(state[0, 0] >= 2, wanted, 0 * wanted), 2).double() * 9

    examples = of_task(Mazes(MazesConfig(size=9)), seed=0, count=3)[0]
    assert grid(Knows(most=4), examples, number=1).right.tolist() == [False, True, True, True]


def test_moves_are_walked_through_the_picture() -> None:
    examples = of_task(Mazes(MazesConfig(size=9, form="route", moves=30)), seed=0, count=1)[0]
    picture, moves = examples.inputs[0], examples.targets[0]
    walked = walk(picture, moves)
    goal = ((picture[1] > 0.5) & (picture[0] < 0.5)).numpy()
    assert walked[goal] == 1
    assert walked.sum() == int(examples.difficulty[0]) + 1 if examples.difficulty is not None else False
    assert not walked[(picture.sum(0) == 0).numpy()].any()


def test_answers_that_are_no_board_are_refused() -> None:
    examples = Examples(inputs=torch.zeros(2, 5), targets=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(InputError, match="no board"):
        grid(minds["Countdown"](), examples)
