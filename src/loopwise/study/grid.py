"""What a model sees and says on a board, loop by loop: mazes, sudoku, anything whose answer or input is a grid."""

import warnings
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.errors import InputError, LoopRangeWarning
from loopwise.loops.drivers import check_loops
from loopwise.loops.hazard import widen
from loopwise.loops.protocol import LoopModel, tree_map
from loopwise.study.examples import Examples
from loopwise.tasks.mazes import MOVES
from loopwise.tasks.problems import IGNORED


@runtime_checkable
class Looks(Protocol):
    """A model that says where a loop looked, as the CTM does."""

    def attention_weights(self, before: Any, after: Any, context: Any) -> Float[Tensor, "rows heads places"]:
        """How much of each place every head took in the loop from one state to the next."""
        ...


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One problem. R loops, Y lines, X columns."""

    model: str
    trained_loops: tuple[int, int]
    loops: Int[np.ndarray, " loops"]
    given: tuple[tuple[str, ...], ...]
    """What the board shows in each cell before anyone thinks; empty strings where nothing."""
    answer: Int[np.ndarray, "loops lines columns"]
    """The class said of each cell; of an answer in moves, 1 on the squares it walks; -1 where nothing is asked."""
    wanted: Int[np.ndarray, "lines columns"]
    """The right ones, -1 where nothing is asked."""
    sure: Float[np.ndarray, "loops lines columns"] | None
    """Probability of the class said; NaN where nothing is asked. None for answers in moves."""
    attention: Float[np.ndarray, "loops heads rows columns_seen"] | None
    """Where the loop looked, on the board of the model's own features; None for models without attention over it."""
    right: Bool[np.ndarray, " loops"]
    signal: Float[np.ndarray, " loops"] | None
    signal_kind: str | None


@torch.no_grad()
def grid(
    model: LoopModel, examples: Examples, *, number: int = 0, max_loops: int | None = None, name: str = ""
) -> Grid:
    """Run one problem of a batch and keep every board.

    Boards are read off the shapes: answers (lines, columns); or as many places as a square has cells; or moves
    (`loopwise.tasks.mazes`) through a picture (3, lines, columns).

    Raises:
        InputError: there is no such problem, or nothing in it has the shape of a board.
    """
    if not 0 <= number < len(examples):
        raise InputError(f"problem {number} was asked for; there are problems 0 to {len(examples) - 1}")
    one = _only(examples, number)
    board = _Board(one)
    most = max_loops or model.facts.trained_loops[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopRangeWarning)
        check_loops(model, most)
    context = model.encode(one.inputs, **one.options)
    state = model.initial_state(context)
    answers, sure, attention, right, signals = [], [], [], [], []
    for loop in range(1, most + 1):
        before, state = state, model.step(state, context, loop)
        prediction = model.readout(state, context)
        signal = model.signal(state, prediction)
        if signal is not None:
            signals.append(float(signal.flatten()[0]))
        said = prediction if one.read is None else one.read(prediction)
        best = torch.softmax(widen(said), dim=-1).max(dim=-1)
        answers.append(board.draw(best.indices[0]))
        sure.append(best.values[0].cpu().numpy())
        right.append(_right(one, best.indices))
        if isinstance(model, Looks):
            attention.append(_square(model.attention_weights(before, state, context)[0]))
    return Grid(
        model=name or type(model).__name__,
        trained_loops=model.facts.trained_loops,
        loops=np.arange(1, most + 1),
        given=board.given,
        answer=np.stack(answers),
        wanted=board.draw(one.targets[0]),
        sure=np.where(board.asked, np.stack(sure).reshape(most, *board.shape), np.nan) if board.cells else None,
        attention=np.stack(attention) if attention else None,
        right=np.array(right),
        signal=np.array(signals) if signals else None,
        signal_kind=model.facts.signal,
    )


class _Board:
    """How the answer of a problem lies on its board."""

    def __init__(self, one: Examples) -> None:
        target = one.targets[0]
        picture = one.inputs[0] if isinstance(one.inputs, Tensor) else None
        side = round(target.numel() ** 0.5)
        is_picture = picture is not None and picture.dim() == 3 and len(picture) == 3
        self.picture = picture if is_picture else None
        if target.dim() == 2:
            self.shape = (target.shape[0], target.shape[1])
        elif self.picture is not None:
            self.shape = (self.picture.shape[1], self.picture.shape[2])
        elif target.dim() == 1 and side * side == target.numel():
            self.shape = (side, side)
        else:
            raise InputError(
                f"an answer of shape {tuple(target.shape)} is no board; grids are for mazes, sudoku and pictures"
            )
        self.cells = target.numel() == self.shape[0] * self.shape[1]
        self.asked: Bool[np.ndarray, "lines columns"] = (
            (target != IGNORED).reshape(self.shape).cpu().numpy() if self.cells else np.ones(self.shape, dtype=bool)
        )
        self.given = self._given(picture)

    def draw(self, answer: Int[Tensor, "*places"]) -> Int[np.ndarray, "lines columns"]:
        """The classes in their cells, or the squares that moves walk over."""
        if self.cells:
            return np.where(self.asked, answer.reshape(self.shape).cpu().numpy(), -1)
        assert self.picture is not None
        return walk(self.picture, answer)

    def _given(self, picture: Tensor | None) -> tuple[tuple[str, ...], ...]:
        if self.picture is not None:
            return tuple(tuple(_square_of(pixel) for pixel in line) for line in self.picture.permute(1, 2, 0).tolist())
        if picture is not None and picture.numel() == self.shape[0] * self.shape[1]:
            lines = picture.reshape(self.shape).tolist()
            return tuple(tuple("" if value == 0 else f"{value:g}" for value in line) for line in lines)
        return tuple(("",) * self.shape[1] for _ in range(self.shape[0]))


def walk(picture: Float[Tensor, "3 lines columns"], moves: Int[Tensor, " moves"]) -> Int[np.ndarray, "lines columns"]:
    """1 on every square that moves touch from the red start on; they pass through walls if they say so, but not out."""
    red = ((picture[0] > 0.5) & (picture[1] < 0.5)).nonzero()
    lines, columns = picture.shape[1:]
    line, column = (int(place) for place in red[0])
    walked = np.zeros((lines, columns), dtype=np.int64)
    walked[line, column] = 1
    for move in moves.tolist():
        down, across = MOVES[move] if 0 <= move < len(MOVES) else (0, 0)
        line, column = min(max(line + down, 0), lines - 1), min(max(column + across, 0), columns - 1)
        walked[line, column] = 1
    return walked


def _square_of(pixel: list[float]) -> str:
    red, green, _ = (value > 0.5 for value in pixel)
    return "" if red and green else "S" if red else "G" if green else "#"


def _right(one: Examples, answers: Tensor) -> bool:
    if one.verify is not None:
        return bool(one.verify(answers)[0])
    return bool(((answers == one.targets) | (one.targets == IGNORED)).all())


def _square(weights: Float[Tensor, "heads places"]) -> Float[np.ndarray, "heads rows columns_seen"]:
    """Places of a square picture as a square; others as one line."""
    side = round(weights.shape[1] ** 0.5)
    shape = (side, side) if side * side == weights.shape[1] else (1, weights.shape[1])
    return weights.reshape(len(weights), *shape).double().cpu().numpy()


def _only(examples: Examples, number: int) -> Examples:
    """A batch of one problem."""
    verify = examples.verify
    count = len(examples)

    def alone(answers: Tensor) -> Tensor:
        assert verify is not None
        # The verifier knows the whole batch: the answer stands in its own row, and only that row is asked.
        return verify(answers.expand(count, *answers.shape[1:]))[number : number + 1]

    return Examples(
        inputs=tree_map(lambda tensor: tensor[number : number + 1], examples.inputs),
        options=examples.options,
        targets=examples.targets[number : number + 1],
        verify=alone if verify is not None else None,
        read=examples.read,
    )


def board_file(found: Grid, *, title: str, difficulty: float | None = None) -> dict[str, Any]:
    """The same as the studio's grid view reads it: cells line by line, classes of two as true and false."""
    two = max(int(found.answer.max()), int(found.wanted.max())) <= 1
    lines, columns = found.wanted.shape

    def cells(board: Int[np.ndarray, "lines columns"]) -> list[Any]:
        flat = board.ravel().tolist()
        return [None if said < 0 else bool(said) if two else str(said) for said in flat]

    attention = None
    if found.attention is not None:
        seen = found.attention.mean(axis=1)
        # Each cell shows the place of the feature map that lies under it.
        down = np.arange(lines) * seen.shape[1] // lines
        across = np.arange(columns) * seen.shape[2] // columns
        attention = [look[down][:, across].ravel().tolist() for look in seen]
    problem = {
        "rows": lines,
        "columns": columns,
        "problem": [mark for line in found.given for mark in line],
        "target": cells(found.wanted),
        "answers": [cells(board) for board in found.answer],
        "attention": attention,
        "certainty": _certainty(found),
        "difficulty": difficulty,
    }
    return {"title": title, "problems": [problem]}


def _certainty(found: Grid) -> list[float] | None:
    """The signal as a number from 0 to 1: a certainty itself, a halting logit as its probability."""
    if found.signal is None or found.signal_kind not in ("certainty", "halt_logit"):
        return None
    values = found.signal if found.signal_kind == "certainty" else 1 / (1 + np.exp(-found.signal))
    return [float(value) for value in values]
