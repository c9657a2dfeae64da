"""Mazes: which way from the start to the goal, told as marked squares or as moves.

A maze of size n has n x n squares within an outer wall: rooms on every second square and, between neighbouring rooms,
a wall or a passage. A depth-first walk from the start carves one passage tree (Schwarzschild et al. 2021, whose "9x9
mazes" are our size 9), so that exactly one route leads to the goal. `ambiguous` mazes have a few more passages, two
shortest routes or more, and every one of these is right.

    size 9, one square a letter:    #  wall   .  free   S  start   G  goal   o  the route

Pictures are those of the Continuous Thought Machine (Darlow et al. 2025): walls black, free squares white, the start
red, the goal green, one pixel a square, outer wall included. So its 15x15 and 39x39 mazes are our sizes 13 and 37.

Two forms of answer:

    grid    for each square, is it on the route (1) or not (0); walls are not asked
    route   one move a place: 0 up, 1 down, 2 left, 3 right, and 4 wait once the goal is reached. Where the
            route is longer than the answer, its first moves are asked

Difficulty is the length of the shortest route in moves. It is even, since rooms are two squares apart. `detours` gives
another measure: how deep the dead ends are.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.problems import IGNORED, Problems, generator

FORMS = ("grid", "route")
UP, DOWN, LEFT, RIGHT, WAIT = range(5)
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
"""Rows and columns that each class of a route moves by."""


@dataclass(frozen=True, kw_only=True)
class MazesConfig:
    """Size and form of the task."""

    size: int = 9
    """Squares from outer wall to outer wall, odd; the picture is two wider."""
    form: str = "grid"
    """`grid`: marked squares. `route`: moves."""
    moves: int = 100
    """Places of a `route` answer (CTM: 100). `grid` has no use for it."""
    ambiguous: bool = False
    """Whether at least two shortest routes lead to the goal."""

    def __post_init__(self) -> None:
        if self.size < 5 or self.size % 2 == 0:
            raise ConfigError(f"size={self.size}: allowed are odd sizes from 5 on, such as size=9")
        if self.form not in FORMS:
            raise ConfigError(f"form={self.form!r} is unknown; allowed are {', '.join(FORMS)}")
        if self.moves < 1:
            raise ConfigError(f"moves={self.moves}: allowed is 1 or more, such as moves=100")
        if self.form == "grid" and self.moves != 100:
            raise ConfigError(f"moves={self.moves} has no effect with form=grid; leave it out, or use form=route")

    @property
    def side(self) -> int:
        """Side of the picture in pixels."""
        return self.size + 2


class Mazes:
    """The task: pictures of mazes, their shortest routes, and a verifier that accepts every one of these.

    `Problems.inputs` are pictures (N, 3, side, side) in float32; targets are (N, side, side) or (N, moves).
    """

    def __init__(self, config: MazesConfig) -> None:
        self.config = config
        self.classes = 2 if config.form == "grid" else len(MOVES)

    def draw(self, seed: int, numbers: Int[Tensor, " problems"]) -> Problems:
        """The mazes with these numbers under `seed`."""
        side = self.config.side
        mazes = [_Maze(generator(seed, "mazes", int(number)), self.config) for number in numbers]
        pictures = np.zeros((len(mazes), 3, side * side), dtype=np.float32)
        shape = (side * side,) if self.config.form == "grid" else (self.config.moves,)
        targets = np.full((len(mazes), *shape), IGNORED if self.config.form == "grid" else WAIT, dtype=np.int64)
        for picture, target, maze in zip(pictures, targets, mazes, strict=True):
            free = np.flatnonzero(maze.free)
            picture[:, free] = 1
            picture[:, maze.start] = (1, 0, 0)
            picture[:, maze.goal] = (0, 1, 0)
            if self.config.form == "grid":
                target[free] = 0
                target[maze.route] = 1
            else:
                moves = [_move(here, there, side) for here, there in zip(maze.route, maze.route[1:], strict=False)]
                target[: len(moves)] = moves[: len(target)]
        square = torch.from_numpy(pictures).view(len(mazes), 3, side, side)
        asked = torch.from_numpy(targets)
        return Problems(
            inputs=square,
            targets=asked.view(len(mazes), side, side) if self.config.form == "grid" else asked,
            difficulty=torch.tensor([len(maze.route) - 1 for maze in mazes]),
        )

    def verify(self, problems: Problems, answers: Int[Tensor, "problems *places"]) -> Bool[Tensor, " problems"]:
        """Whether each answer is a shortest route, whichever of them.

        Raises:
            InputError: the answers have another shape than the targets.
        """
        if answers.shape != problems.targets.shape:
            raise InputError(
                f"answers of shape {tuple(answers.shape)}; give one class per place, {tuple(problems.targets.shape)}"
            )
        right = self._marks_right if self.config.form == "grid" else self._moves_right
        found = [
            right(free(picture), _where(picture, 0), _where(picture, 1), int(length), answer)
            for picture, length, answer in zip(
                problems.inputs.cpu(), problems.difficulty.tolist(), answers.cpu().flatten(1).tolist(), strict=True
            )
        ]
        return torch.tensor(found, dtype=torch.bool, device=answers.device)

    def _marks_right(self, free: list[bool], start: int, goal: int, length: int, answer: Sequence[int]) -> bool:
        marked = [mark == 1 and allowed for mark, allowed in zip(answer, free, strict=True)]
        # A route within length + 1 marked squares is at least as long as the shortest, so it takes all of them.
        if sum(marked) != length + 1 or not (marked[start] and marked[goal]):
            return False
        return distances(marked, start, self.config.side)[goal] == length

    def _moves_right(self, free: list[bool], start: int, goal: int, length: int, answer: Sequence[int]) -> bool:
        here = start
        for count, move in enumerate(answer):
            if not 0 <= move <= WAIT or (move == WAIT) != (count >= length):
                return False
            here += MOVES[move][0] * self.config.side + MOVES[move][1]
            if not free[here]:
                return False
        if len(answer) >= length:
            return here == goal
        return distances(free, goal, self.config.side)[here] == length - len(answer)


class _Maze:
    """One maze: its free squares (flat, row by row), start, goal, and one shortest route between them."""

    def __init__(self, random: np.random.Generator, config: MazesConfig) -> None:
        self.side = side = config.side
        rooms = [row * side + column for row in range(1, side, 2) for column in range(1, side, 2)]
        self.start, self.goal = (rooms[place] for place in random.choice(len(rooms), 2, replace=False))
        if config.ambiguous:
            # In one row or column there may be a single shortest route, however many walls are opened.
            others = [room for room in rooms if room // side != self.start // side and room % side != self.start % side]
            self.goal = others[int(random.integers(len(others)))]
        self.free = [False] * (side * side)
        self._carve(random.random(len(rooms)).tolist())
        to_goal = distances(self.free, self.goal, side)
        if config.ambiguous:
            to_goal = self._open_walls(random, rooms, to_goal)
        self.route = [self.start]
        while self.route[-1] != self.goal:
            here = self.route[-1]
            nearer = [there for there in _around(here, side) if to_goal[there] == to_goal[here] - 1]
            self.route.append(nearer[int(random.integers(len(nearer)))] if len(nearer) > 1 else nearer[0])

    def _carve(self, chances: list[float]) -> None:
        """A depth-first walk through all rooms from the start; each first step into a room opens its wall."""
        side, last = self.side, self.side - 1
        self.free[self.start] = True
        trail, entered = [self.start], 0
        while trail:
            here = trail[-1]
            row, column = divmod(here, side)
            ways = []
            if row > 1 and not self.free[here - 2 * side]:
                ways.append(-side)
            if row < last - 1 and not self.free[here + 2 * side]:
                ways.append(side)
            if column > 1 and not self.free[here - 2]:
                ways.append(-1)
            if column < last - 1 and not self.free[here + 2]:
                ways.append(1)
            if not ways:
                trail.pop()
                continue
            way = ways[int(chances[entered] * len(ways))]
            entered += 1
            self.free[here + way] = self.free[here + 2 * way] = True
            trail.append(here + 2 * way)

    def _open_walls(self, random: np.random.Generator, rooms: list[int], to_goal: list[int]) -> list[int]:
        """Open walls until two shortest routes exist; first those that make a second route and no shorter one."""
        side = self.side
        inner = [
            (room, room + 2 * way)
            for room in rooms
            for way in ((1,) if room % side < side - 2 else ()) + ((side,) if room // side < side - 2 else ())
        ]
        while count_routes(to_goal, self.start, side) < 2:
            to_start = distances(self.free, self.start, side)
            closed = [pair for pair in inner if not self.free[sum(pair) // 2]]
            length = to_goal[self.start]
            ties = [
                (one, two)
                for one, two in closed
                if min(to_start[one] + to_goal[two], to_start[two] + to_goal[one]) + 2 == length
            ]
            chosen = ties or closed
            self.free[sum(chosen[int(random.integers(len(chosen)))]) // 2] = True
            to_goal = distances(self.free, self.goal, side)
        return to_goal


def free(picture: Float[Tensor, "3 side side"]) -> list[bool]:
    """Which squares of a picture are not wall, row by row."""
    found: list[bool] = (picture.amax(0) > 0.5).flatten().tolist()
    return found


def distances(free: Sequence[bool], origin: int, side: int) -> list[int]:
    """Moves from `origin` to every free square, row by row; -1 where no route leads."""
    found = [-1] * len(free)
    found[origin] = 0
    waiting = deque([origin])
    while waiting:
        here = waiting.popleft()
        for there in (here - side, here + side, here - 1, here + 1):
            # Nothing reaches the edge of the picture, which is wall, so no index leaves it.
            if free[there] and found[there] < 0:
                found[there] = found[here] + 1
                waiting.append(there)
    return found


def count_routes(to_goal: Sequence[int], start: int, side: int) -> int:
    """How many shortest routes lead from `start` to where `to_goal`, made by `distances`, is 0."""
    ways = {start: 1}
    for left in range(to_goal[start] - 1, -1, -1):
        onward: dict[int, int] = {}
        for here, count in ways.items():
            for there in _around(here, side):
                if to_goal[there] == left:
                    onward[there] = onward.get(there, 0) + count
        ways = onward
    return sum(ways.values())


def detours(
    pictures: Float[Tensor, "mazes 3 side side"], routes: Bool[Tensor, "mazes side side"]
) -> Int[Tensor, " mazes"]:
    """How far the square farthest from the route lies, in moves: the deepest dead end that has to be ruled out."""
    open_squares = pictures.amax(1) > 0.5
    reached, farthest = routes & open_squares, torch.zeros(len(pictures), dtype=torch.long)
    for moves in range(1, open_squares[0].numel()):
        wider = reached.clone()
        wider[:, 1:] |= reached[:, :-1]
        wider[:, :-1] |= reached[:, 1:]
        wider[:, :, 1:] |= reached[:, :, :-1]
        wider[:, :, :-1] |= reached[:, :, 1:]
        wider &= open_squares
        grown = (wider != reached).flatten(1).any(1)
        if not bool(grown.any()):
            break
        farthest[grown] = moves
        reached = wider
    return farthest


def text(picture: Float[Tensor, "3 side side"], marks: Int[Tensor, "side side"] | None = None) -> str:
    """A maze in letters, one line per row: `#` wall, `.` free, `S` start, `G` goal, and `o` where `marks` is 1."""
    start, goal, open_squares, side = _where(picture, 0), _where(picture, 1), free(picture), picture.shape[-1]
    letters = ["." if open_square else "#" for open_square in open_squares]
    if marks is not None:
        letters = [
            "o" if mark == 1 and letter == "." else letter
            for mark, letter in zip(marks.flatten().tolist(), letters, strict=True)
        ]
    letters[start], letters[goal] = "S", "G"
    return "\n".join("".join(letters[row * side : (row + 1) * side]) for row in range(side))


def _around(here: int, side: int) -> tuple[int, int, int, int]:
    return here - side, here + side, here - 1, here + 1


def _move(here: int, there: int, side: int) -> int:
    return {-side: UP, side: DOWN, -1: LEFT, 1: RIGHT}[there - here]


def _where(picture: Float[Tensor, "3 side side"], channel: int) -> int:
    """The one square whose colour is pure `channel`: 0 red, the start; 1 green, the goal."""
    return int((picture[channel] - picture.sum(0) + picture[channel]).argmax())
