"""What the maze experiment says about the order of moves and about averaging, against plain loops."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def thinking(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("ctm_thinking")


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Which moves are right (ticks, mazes, moves), and which are asked: routes of 1 to 9 moves."""
    rng = np.random.default_rng(0)
    asked = np.arange(9) < rng.integers(1, 10, size=(40, 1))
    return rng.random((6, 40, 9)) < 0.6, asked


def test_order(thinking: Any, drawn: tuple[np.ndarray, np.ndarray]) -> None:
    right, asked = drawn
    ticks = thinking.settled(right)
    sooner = later = 0
    for maze in range(40):
        found = []
        for move in range(int(asked[maze].sum())):
            since = 7
            while since > 1 and right[since - 2, maze, move]:
                since -= 1
            assert ticks[maze, move] == since
            found.append(since)
        for first in range(len(found)):
            sooner += sum(found[first] < other for other in found[first + 1 :])
            later += sum(found[first] > other for other in found[first + 1 :])
    assert thinking.earlier_first(ticks, asked) == sooner / (sooner + later)
    everything = np.ones((1, 4), dtype=bool)
    assert thinking.earlier_first(np.array([[1, 2, 2, 5]]), everything) == 1
    assert thinking.earlier_first(np.array([[4, 3, 2, 1]]), everything) == 0
    assert np.isnan(thinking.earlier_first(np.array([[2, 2, 2, 2]]), everything))


def test_what_is_right_from_the_start_and_beyond(thinking: Any, drawn: tuple[np.ndarray, np.ndarray]) -> None:
    right, asked = drawn
    share, after = thinking.beyond(right[0], asked)
    shares = []
    for maze in range(40):
        length = int(asked[maze].sum())
        begun = next((move for move in range(length) if not right[0, maze, move]), length)
        shares.append(begun / length)
        assert np.flatnonzero(after[maze]).tolist() == list(range(begun + 1, length))
    assert share == pytest.approx(np.mean(shares), abs=1e-12)


def test_thirds_and_running_means(thinking: Any, drawn: tuple[np.ndarray, np.ndarray]) -> None:
    right, asked = drawn
    parts: list[list[bool]] = [[], [], []]
    for maze in range(40):
        length = int(asked[maze].sum())
        for move in range(length):
            parts[3 * move // length].append(right[2, maze, move])
    assert thinking.thirds(right, asked)[2] == pytest.approx([np.mean(part) for part in parts], abs=1e-12)
    mean = thinking.running_mean(right.astype(float))
    assert mean[3] == pytest.approx(right[:4].mean(0), abs=1e-12)
