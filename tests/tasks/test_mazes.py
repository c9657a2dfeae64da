"""Mazes: routes against a solver of another kind, every right route accepted, every wrong one refused."""

import itertools

import pytest
import torch

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.mazes import MOVES, WAIT, Mazes, MazesConfig, detours, text
from loopwise.tasks.problems import IGNORED, Problems, numbers


def flood(picture):
    """Distance to the goal by dilation of whole pictures; -1 at walls. Returns (distances, start, goal)."""
    red, green, blue = picture
    free = torch.maximum(red, green) > 0
    start = ((red == 1) & (green == 0)).nonzero()[0].tolist()
    goal = ((green == 1) & (red == 0)).nonzero()[0].tolist()
    assert bool((blue[free].sum() == free.sum() - 2).item())
    found = torch.full(free.shape, -1)
    reached = torch.zeros_like(free)
    reached[tuple(goal)] = True
    for moves in itertools.count():
        found[reached & (found < 0)] = moves
        wider = reached.clone()
        wider[1:] |= reached[:-1]
        wider[:-1] |= reached[1:]
        wider[:, 1:] |= reached[:, :-1]
        wider[:, :-1] |= reached[:, 1:]
        wider &= free
        if torch.equal(wider, reached):
            return found, start, goal
        reached = wider


def all_routes(found, start):
    """Every shortest route as a list of moves."""
    if found[tuple(start)] == 0:
        return [[]]
    routes = []
    for move, (down, right) in enumerate(MOVES[:4]):
        there = [start[0] + down, start[1] + right]
        if found[tuple(there)] == found[tuple(start)] - 1:
            routes += [[move, *rest] for rest in all_routes(found, there)]
    return routes


def padded(route, places):
    return torch.tensor((route + [WAIT] * places)[:places])


def marks(route, start, targets):
    answer = torch.zeros_like(targets)
    here = list(start)
    answer[tuple(here)] = 1
    for move in route:
        here = [here[0] + MOVES[move][0], here[1] + MOVES[move][1]]
        answer[tuple(here)] = 1
    return answer


@pytest.mark.parametrize("size", [5, 9, 13])
def test_a_maze_is_a_tree_of_all_rooms_with_one_route(size):
    task = Mazes(MazesConfig(size=size))
    problems = task.draw(0, numbers(0, 12))
    rooms = ((size + 1) // 2) ** 2
    assert problems.inputs.shape == (12, 3, size + 2, size + 2)
    for picture, targets, length in zip(problems.inputs, problems.targets, problems.difficulty, strict=True):
        found, start, _ = flood(picture)
        free = picture.amax(0) > 0
        assert int(free.sum()) == 2 * rooms - 1, "a tree of N rooms has N - 1 passages"
        assert bool((found[free] >= 0).all()), "every room is reached"
        assert int(length) == int(found[tuple(start)]) > 0
        (route,) = all_routes(found, start)
        assert torch.equal(targets == IGNORED, ~free)
        assert torch.equal(targets.clamp_min(0), marks(route, start, targets))
    assert bool(task.verify(problems, problems.targets).all())


def test_route_and_grid_tell_the_same_way():
    grid = Mazes(MazesConfig(size=9)).draw(3, numbers(0, 20))
    route = Mazes(MazesConfig(size=9, form="route", moves=60)).draw(3, numbers(0, 20))
    assert torch.equal(grid.inputs, route.inputs)
    for picture, moves, squares in zip(route.inputs, route.targets, grid.targets, strict=True):
        _, start, _ = flood(picture)
        taken = [move for move in moves.tolist() if move != WAIT]
        assert torch.equal(marks(taken, start, squares), squares.clamp_min(0))


@pytest.mark.parametrize("form", ["grid", "route"])
def test_every_shortest_route_of_an_ambiguous_maze_is_right_and_no_other(form):
    options = {"moves": 40} if form == "route" else {}
    task = Mazes(MazesConfig(size=9, form=form, ambiguous=True, **options))
    problems = task.draw(1, numbers(0, 15))
    assert bool(task.verify(problems, problems.targets).all())
    for index in range(15):
        one = Problems(
            inputs=problems.inputs[index : index + 1],
            targets=problems.targets[index : index + 1],
            difficulty=problems.difficulty[index : index + 1],
        )
        found, start, _ = flood(one.inputs[0])
        routes = all_routes(found, start)
        assert len(routes) >= 2
        answers = [marks(r, start, one.targets[0]) if form == "grid" else padded(r, 40) for r in routes]
        assert all(bool(task.verify(one, answer[None])) for answer in answers)
        if form == "grid":
            assert not bool(task.verify(one, answers[0][None] | answers[1][None])), "two routes at once are no route"
            gap = answers[0].clone()
            gap[tuple(start)] = 0
            assert not bool(task.verify(one, gap[None]))
        else:
            longer = padded([routes[0][0], {0: 1, 1: 0, 2: 3, 3: 2}[routes[0][0]], *routes[0]], 40)
            assert not bool(task.verify(one, longer[None])), "there and back again is no shortest route"
            assert not bool(task.verify(one, padded([WAIT, *routes[0]], 40)[None])), "waiting first is not right"


@pytest.mark.parametrize("ambiguous", [False, True])
def test_the_first_moves_of_a_longer_route(ambiguous):
    task = Mazes(MazesConfig(size=13, form="route", moves=6, ambiguous=ambiguous))
    problems = task.draw(2, numbers(0, 30))
    assert bool((problems.difficulty > 6).any())
    assert bool(task.verify(problems, problems.targets).all())
    for index in range(30):
        found, start, _ = flood(problems.inputs[index])
        wanted = {tuple(padded(route, 6).tolist()) for route in all_routes(found, start)}
        tried = torch.tensor(list(itertools.product(range(4), repeat=6)))[:: 1 if index < 1 else 41]
        many = Problems(
            inputs=problems.inputs[index].expand(len(tried), -1, -1, -1),
            targets=problems.targets[index].expand(len(tried), -1),
            difficulty=problems.difficulty[index].expand(len(tried)),
        )
        expected = torch.tensor([tuple(answer) in wanted for answer in tried.tolist()])
        assert torch.equal(task.verify(many, tried), expected)


def test_marks_on_walls_are_not_asked():
    task = Mazes(MazesConfig(size=5))
    problems = task.draw(0, numbers(0, 4))
    answers = problems.targets.clone()
    answers[answers == IGNORED] = 1
    assert bool(task.verify(problems, answers).all())
    answers[0][problems.targets[0] == 0] = 1
    assert bool((problems.targets[0] == 0).any())
    assert task.verify(problems, answers).tolist() == [False, True, True, True]


def test_a_maze_depends_on_seed_and_number_alone():
    task = Mazes(MazesConfig(size=9, ambiguous=True))
    whole = task.draw(7, numbers(0, 6))
    some = task.draw(7, torch.tensor([4, 1]))
    assert torch.equal(some.inputs, whole.inputs[[4, 1]])
    assert torch.equal(some.targets, whole.targets[[4, 1]])
    assert not torch.equal(task.draw(8, numbers(0, 6)).inputs, whole.inputs)


def test_the_deepest_dead_end_by_walking():
    problems = Mazes(MazesConfig(size=9)).draw(4, numbers(0, 12))
    found = detours(problems.inputs, problems.targets == 1)
    for picture, targets, depth in zip(problems.inputs, problems.targets, found.tolist(), strict=True):
        free = {tuple(square) for square in (picture.amax(0) > 0).nonzero().tolist()}
        edge, seen = {tuple(square) for square in (targets == 1).nonzero().tolist()}, set()
        moves = -1
        while edge:
            seen |= edge
            edge = {(r + dr, c + dc) for r, c in edge for dr, dc in MOVES[:4]} & free - seen
            moves += 1
        assert depth == moves
    assert int(found.max()) > int(found.min())


def test_a_maze_in_letters():
    problems = Mazes(MazesConfig(size=5)).draw(0, numbers(0, 1))
    lines = text(problems.inputs[0], problems.targets[0]).splitlines()
    assert [len(line) for line in lines] == [7] * 7
    assert lines[0] == lines[-1] == "#######"
    assert "".join(lines).count("o") == int(problems.difficulty[0]) - 1
    assert {letter: "".join(lines).count(letter) for letter in "SG"} == {"S": 1, "G": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size=8: allowed are odd"),
        ({"size": 3}, "size=3"),
        ({"form": "path"}, "allowed are grid, route"),
        ({"form": "route", "moves": 0}, "moves=0"),
        ({"moves": 50}, "has no effect with form=grid"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MazesConfig(**options)


def test_answers_of_another_shape_are_refused():
    task = Mazes(MazesConfig(size=5))
    problems = task.draw(0, numbers(0, 2))
    with pytest.raises(InputError, match="one class per place"):
        task.verify(problems, problems.targets[:, :3])
