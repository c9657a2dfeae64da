"""Sudoku of 4x4, 6x6 and 9x9 cells, each puzzle with exactly one solution.

A puzzle is a row of cells, line by line: 0 is an empty cell, 1 to S a digit, which are the token ids of puzzle and
answer alike. A puzzle is made from a full grid, drawn by a solver that tries digits in random order, by emptying cells
in random order for as long as one solution is left.

As in the papers that learn from a thousand puzzles (HRM, TRM), new ones can be made of few by what keeps a sudoku a
sudoku: digits renamed, lines within a band and whole bands shuffled, columns likewise, and the grid transposed
where its boxes are square.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.problems import Problems, generator

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Lines and columns of a box, by the size of the grid."""
Difficulty = Literal["rounds", "guesses", "empties"]


@dataclass(frozen=True, kw_only=True)
class SudokuConfig:
    """Size and hardness of the puzzles."""

    size: int = 9
    """S, lines of the grid: 4, 6 or 9."""
    empties: tuple[int, int]
    """Fewest and most empty cells; each puzzle draws its own number, and has fewer where one more would allow a
    second solution."""
    base: int | None = None
    """Puzzles that all others are made of by renaming and shuffling; None: every puzzle is drawn anew."""
    difficulty: Difficulty = "rounds"
    """What `Problems.difficulty` tells; see `Rating`."""

    def __post_init__(self) -> None:
        if self.size not in BOXES:
            raise ConfigError(f"size={self.size}: allowed are {', '.join(map(str, BOXES))}")
        least, most = self.empties
        if not 1 <= least <= most < self.size**2:
            raise ConfigError(
                f"empties={self.empties}: allowed is 1 <= fewest <= most <= {self.size**2 - 1} in a grid of {self.size}"
            )
        if self.base is not None and self.base < 1:
            raise ConfigError(f"base={self.base}: allowed is 1 or more puzzles, or None for new ones without end")
        if self.difficulty not in get_args(Difficulty):
            raise ConfigError(f"difficulty={self.difficulty!r}: allowed are {', '.join(get_args(Difficulty))}")


@dataclass(frozen=True, kw_only=True)
class Rating:
    """How hard a puzzle is, in three ways."""

    empties: int
    """Empty cells."""
    rounds: int
    """Rounds in which every cell is filled at once that has one digit left, or is the only place left for a digit in
    its line, column or box; where that ends, one cell is guessed right, which counts as a round."""
    guesses: int
    """How many such guesses it takes; the cell with the fewest digits left is guessed, the first among equals.

    Which cell is first depends on how a grid is turned, so where a guess is needed at all this count, and with it
    `rounds`, may differ by a little between a puzzle and its shuffled copy."""


class Sudoku:
    """The task: its puzzles, their solutions, and the truth about any answer."""

    def __init__(self, config: SudokuConfig) -> None:
        self.config = config
        self.vocab_size = config.size + 1
        self.places = config.size**2
        self._units, self._peers = _geometry(config.size)
        self._known: dict[tuple[int, int], tuple[list[int], list[int], int]] = {}

    def draw(self, seed: int, numbers: Int[Tensor, " problems"]) -> Problems:
        """The puzzles with these numbers: each a function of `seed` and its number alone."""
        puzzles, solutions, difficulty = [], [], []
        for number in numbers.tolist():
            base = self.config.base
            puzzle, solution, hardness = self._drawn(seed, number if base is None else number % base)
            if base is not None:
                puzzle, solution = self._shuffled(seed, number, puzzle, solution)
            puzzles.append(puzzle)
            solutions.append(solution)
            difficulty.append(hardness)
        return Problems(
            inputs=torch.tensor(puzzles).reshape(-1, self.places),
            targets=torch.tensor(solutions).reshape(-1, self.places),
            difficulty=torch.tensor(difficulty, dtype=torch.float32),
        )

    def verify(self, problems: Problems, answers: Int[Tensor, "problems places"]) -> Bool[Tensor, " problems"]:
        """Whether each answer keeps its clues and has every digit once in each line, column and box."""
        clues = problems.inputs
        kept = ((answers == clues) | (clues == 0)).all(1)
        units = torch.tensor(self._units)
        sorted_digits = answers[:, units].sort(dim=2).values
        whole = (sorted_digits == torch.arange(1, self.config.size + 1)).flatten(1).all(1)
        right: Tensor = kept & whole
        return right

    def solutions(self, puzzle: Sequence[int], *, order: np.random.Generator | None = None) -> Iterator[list[int]]:
        """Every solution, one after the other; digits are tried in a random order if `order` is given.

        Raises:
            InputError: a puzzle of another length, with other digits, or whose clues contradict each other.
        """
        used = self._used(puzzle)
        return self._search(list(puzzle), used, order)

    def unique(self, puzzle: Sequence[int]) -> bool:
        """Whether there is exactly one solution."""
        found = self.solutions(puzzle)
        return next(found, None) is not None and next(found, None) is None

    def rate(self, puzzle: Sequence[int]) -> Rating:
        """How hard a puzzle with one solution is.

        Raises:
            InputError: a puzzle without a solution.
        """
        solution = next(self.solutions(puzzle), None)
        if solution is None:
            raise InputError("the puzzle has no solution; make one with Sudoku.draw")
        grid = list(puzzle)
        rounds = guesses = 0
        while 0 in grid:
            options = {cell: self._options(grid, cell) for cell, digit in enumerate(grid) if digit == 0}
            found = self._singles(options)
            if not found:
                cell = min(options, key=lambda cell: len(options[cell]))
                found = {cell: solution[cell]}
                guesses += 1
            for cell, digit in found.items():
                grid[cell] = digit
            rounds += 1
        return Rating(empties=list(puzzle).count(0), rounds=rounds, guesses=guesses)

    def text(self, cells: Sequence[int]) -> str:
        """A grid as lines of text, `.` for an empty cell."""
        size = self.config.size
        lines = [cells[start : start + size] for start in range(0, size * size, size)]
        return "\n".join("".join(str(int(cell)) if cell else "." for cell in line) for line in lines)

    def _drawn(self, seed: int, number: int) -> tuple[list[int], list[int], int]:
        """Puzzle, solution and difficulty; remembered, since base puzzles are asked for again and again."""
        if (seed, number) not in self._known:
            draw = generator(seed, f"sudoku {self.config.size}", number)
            solution = next(self.solutions([0] * self.places, order=draw))
            least, most = self.config.empties
            wanted = int(draw.integers(least, most + 1))
            puzzle = list(solution)
            for cell in draw.permutation(self.places).tolist():
                if puzzle.count(0) == wanted:
                    break
                puzzle[cell] = 0
                if not self._still_unique(puzzle, cell, solution[cell]):
                    puzzle[cell] = solution[cell]
            hardness = getattr(self.rate(puzzle), self.config.difficulty)
            self._known[seed, number] = puzzle, solution, hardness
        return self._known[seed, number]

    def _still_unique(self, puzzle: list[int], cell: int, digit: int) -> bool:
        """Whether a puzzle whose one solution had `digit` in `cell`, now empty, has no other there."""
        for other in self._options(puzzle, cell) - {digit}:
            if next(self.solutions([*puzzle[:cell], other, *puzzle[cell + 1 :]]), None) is not None:
                return False
        return True

    def _shuffled(self, seed: int, number: int, puzzle: list[int], solution: list[int]) -> tuple[list[int], list[int]]:
        size, (high, wide) = self.config.size, BOXES[self.config.size]
        draw = generator(seed, "sudoku shuffle", number)
        digits = np.concatenate(([0], 1 + draw.permutation(size)))
        lines, columns = _lines(draw, size, high), _lines(draw, size, wide)
        cells = np.arange(size * size).reshape(size, size)[lines][:, columns]
        if high == wide and draw.integers(2):
            cells = cells.T
        order = cells.reshape(-1)
        return digits[np.array(puzzle)[order]].tolist(), digits[np.array(solution)[order]].tolist()

    def _used(self, puzzle: Sequence[int]) -> list[int]:
        """For each unit, a bit for every digit that stands in it."""
        size = self.config.size
        if len(puzzle) != self.places or not all(0 <= digit <= size for digit in puzzle):
            raise InputError(f"a puzzle is {self.places} cells of 0 (empty) to {size}; give one such row")
        used = [0] * len(self._units)
        for unit, cells in enumerate(self._units):
            for cell in cells:
                bit = 1 << puzzle[cell] if puzzle[cell] else 0
                if used[unit] & bit:
                    raise InputError(f"two clues of the puzzle are {puzzle[cell]} in one line, column or box")
                used[unit] |= bit
        return used

    def _search(self, grid: list[int], used: list[int], order: np.random.Generator | None) -> Iterator[list[int]]:
        """Depth first, always at the cell with the fewest digits left."""
        best, options = -1, 0
        full, fewest = (1 << (self.config.size + 1)) - 2, self.config.size + 1
        for cell, digit in enumerate(grid):
            if digit:
                continue
            line, column, box = self._peers[cell]
            left = full & ~(used[line] | used[column] | used[box])
            count = left.bit_count()
            if count < fewest:
                best, options, fewest = cell, left, count
                if count <= 1:
                    break
        if best < 0:
            yield list(grid)
            return
        digits = [digit for digit in range(1, self.config.size + 1) if options >> digit & 1]
        for digit in digits if order is None else order.permutation(digits).tolist():
            grid[best] = digit
            for unit in self._peers[best]:
                used[unit] ^= 1 << digit
            yield from self._search(grid, used, order)
            for unit in self._peers[best]:
                used[unit] ^= 1 << digit
        grid[best] = 0

    def _options(self, grid: Sequence[int], cell: int) -> set[int]:
        seen = {grid[other] for unit in self._peers[cell] for other in self._units[unit] if other != cell}
        return set(range(1, self.config.size + 1)) - seen

    def _singles(self, options: dict[int, set[int]]) -> dict[int, int]:
        found = {cell: next(iter(digits)) for cell, digits in options.items() if len(digits) == 1}
        for unit in self._units:
            for digit in range(1, self.config.size + 1):
                places = [cell for cell in unit if digit in options.get(cell, ())]
                if len(places) == 1:
                    found[places[0]] = digit
        return found


def _geometry(size: int) -> tuple[list[list[int]], list[tuple[int, int, int]]]:
    """Cells of every line, column and box, and the three of them that each cell is in."""
    high, wide = BOXES[size]
    in_line = size // wide
    peers = [
        (cell // size, size + cell % size, 2 * size + (cell // size // high) * in_line + cell % size // wide)
        for cell in range(size * size)
    ]
    return [[cell for cell in range(size * size) if unit in peers[cell]] for unit in range(3 * size)], peers


def _lines(draw: np.random.Generator, size: int, band: int) -> np.ndarray:
    """Lines in a new order that keeps bands of `band` lines together."""
    bands = np.arange(size).reshape(-1, band)[draw.permutation(size // band)]
    return np.concatenate([draw.permutation(lines) for lines in bands])
