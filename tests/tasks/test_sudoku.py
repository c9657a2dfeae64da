"""Every puzzle has one solution, by a solver that shares nothing with the generator's; the verifier knows the rules."""

import itertools

import pytest
import torch

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.problems import numbers
from loopwise.tasks.sudoku import BOXES, Sudoku, SudokuConfig


def grids_of_four():
    """All 4x4 sudokus, by trying every combination of four lines that are permutations: there are 288."""
    lines = list(itertools.permutations((1, 2, 3, 4)))
    fits = {pair: all(a != b for a, b in zip(*pair, strict=True)) for pair in itertools.product(lines, repeat=2)}

    def boxes(a, b):
        return len({*a[:2], *b[:2]}) == len({*a[2:], *b[2:]}) == 4

    bands = [pair for pair in fits if fits[pair] and boxes(*pair)]
    return [
        (*a, *b, *c, *d)
        for (a, b), (c, d) in itertools.product(bands, repeat=2)
        if all(fits[pair] for pair in ((a, c), (a, d), (b, c), (b, d)))
    ]


def brute(puzzle, size, limit=2):
    """Solutions by filling cells in order, checking each digit against everything it meets."""
    high, wide = BOXES[size]
    meets = [
        [
            other
            for other in range(size * size)
            if other != cell
            and (
                other // size == cell // size
                or other % size == cell % size
                or (other // size // high, other % size // wide) == (cell // size // high, cell % size // wide)
            )
        ]
        for cell in range(size * size)
    ]
    grid, found = list(puzzle), []

    def fill(cell):
        while cell < len(grid) and grid[cell]:
            cell += 1
        if cell == len(grid):
            found.append(tuple(grid))
            return
        for digit in range(1, size + 1):
            if all(grid[other] != digit for other in meets[cell]):
                grid[cell] = digit
                fill(cell + 1)
                grid[cell] = 0
                if len(found) >= limit:
                    return

    fill(0)
    return found


def test_every_puzzle_of_four_has_one_solution_among_all_grids():
    grids = grids_of_four()
    assert len(grids) == 288
    problems = Sudoku(SudokuConfig(size=4, empties=(4, 12))).draw(0, numbers(0, 300))
    table = torch.tensor(grids)
    for puzzle, solution in zip(problems.inputs, problems.targets, strict=True):
        fitting = table[((table == puzzle) | (puzzle == 0)).all(1)]
        assert fitting.tolist() == [solution.tolist()]


@pytest.mark.parametrize(("size", "empties", "count"), [(6, (10, 24), 40), (9, (25, 40), 12)])
def test_every_puzzle_has_one_solution_by_brute_force(size, empties, count):
    problems = Sudoku(SudokuConfig(size=size, empties=empties)).draw(1, numbers(0, count))
    for puzzle, solution in zip(problems.inputs.tolist(), problems.targets.tolist(), strict=True):
        assert empties[0] <= puzzle.count(0) <= empties[1]
        assert brute(puzzle, size) == [tuple(solution)]


def test_shuffled_copies_keep_one_solution_and_their_hardness():
    config = SudokuConfig(size=6, empties=(14, 20), base=3)
    task = Sudoku(config)
    problems = task.draw(2, numbers(0, 30))
    assert len({tuple(puzzle) for puzzle in problems.inputs.tolist()}) == 30
    for number, (puzzle, solution) in enumerate(zip(problems.inputs.tolist(), problems.targets.tolist(), strict=True)):
        assert brute(puzzle, 6) == [tuple(solution)]
        rating = task.rate(puzzle)
        assert rating.guesses == 0
        assert rating.rounds == problems.difficulty[number] == problems.difficulty[number % 3]


def test_a_puzzle_depends_on_seed_and_number_alone():
    config = SudokuConfig(size=4, empties=(6, 10), base=5)
    whole = Sudoku(config).draw(3, numbers(0, 8))
    assert torch.equal(Sudoku(config).draw(3, torch.tensor([7, 1])).inputs, whole.inputs[[7, 1]])
    assert not torch.equal(Sudoku(config).draw(4, numbers(0, 8)).inputs, whole.inputs)


def test_the_verifier_knows_the_rules():
    task = Sudoku(SudokuConfig(size=9, empties=(30, 40)))
    problems = task.draw(0, numbers(0, 6))
    answers = problems.targets.clone()
    assert task.verify(problems, answers).all()
    answers[0, 5] = answers[0, 5] % 9 + 1
    # Renamed digits make a right grid that is not the answer to this puzzle.
    answers[1] = answers[1] % 9 + 1
    answers[2] = 5
    # Two cells of one line change places.
    answers[3, [0, 1]] = answers[3, [1, 0]]
    answers[4, 80] = 0
    assert task.verify(problems, answers).tolist() == [False, False, False, False, False, True]


def test_difficulty_is_counted_by_hand():
    task = Sudoku(SudokuConfig(size=4, empties=(1, 4), difficulty="empties"))
    full = [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]
    one = [0, *full[1:]]
    assert vars(task.rate(one)) == {"empties": 1, "rounds": 1, "guesses": 0}
    # At first the second line's ends could each be 2 or 3; five other cells are known, and settle them.
    two = [0, 0, 0, 4, 0, 4, 1, 0, 0, 1, 4, 0, 4, 3, 2, 1]
    assert vars(task.rate(two)) == {"empties": 7, "rounds": 2, "guesses": 0}
    assert task.draw(0, numbers(0, 5)).difficulty.tolist() == [
        float((puzzle == 0).sum()) for puzzle in task.draw(0, numbers(0, 5)).inputs
    ]


def test_puzzles_that_are_none_are_refused():
    task = Sudoku(SudokuConfig(size=4, empties=(1, 4)))
    with pytest.raises(InputError, match="16 cells"):
        task.rate([0] * 15)
    with pytest.raises(InputError, match="two clues of the puzzle are 2"):
        task.unique([2, 2, *[0] * 14])
    with pytest.raises(InputError, match="no solution"):
        task.rate([1, 2, 3, 0, 0, 0, 0, 4, *[0] * 8])
    assert not task.unique([0] * 16)
    assert task.unique([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 0])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"size": 5, "empties": (1, 2)}, "size=5: allowed are 4, 6, 9"),
        ({"size": 4, "empties": (5, 3)}, "empties="),
        ({"size": 4, "empties": (1, 16)}, "<= 15"),
        ({"size": 4, "empties": (1, 3), "base": 0}, "base=0"),
    ],
)
def test_sizes_that_do_not_exist_are_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        SudokuConfig(**values)


def test_a_grid_reads_as_text():
    assert Sudoku(SudokuConfig(size=4, empties=(1, 2))).text([0, 2, 3, 4] * 4) == "\n".join([".234"] * 4)
