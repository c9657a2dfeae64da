"""What the experiment with swapped surfaces counts: mixtures, the loop at which answers settle, likeness of states."""

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from loopwise.tasks.problems import numbers
from loopwise.tasks.word_problems import WordProblems, WordProblemsConfig


@pytest.fixture
def surface(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
    return importlib.import_module("surface")


def test_every_third_problem_is_of_the_other_surface(surface: ModuleType) -> None:
    market = WordProblems(WordProblemsConfig(operations=3))
    harbour = WordProblems(WordProblemsConfig(operations=1, surface="harbour"))
    mixed = surface.Mixed(market, harbour, 3).draw(0, numbers(0, 9))
    for row, number in enumerate(range(9)):
        own = (market if number % 3 else harbour).draw(0, torch.tensor([number]))
        kept = min(own.inputs.shape[1], mixed.inputs.shape[1])
        assert torch.equal(mixed.inputs[row, :kept], own.inputs[0, :kept])
        assert torch.equal(mixed.targets[row, :kept], own.targets[0, :kept])
        assert set(own.inputs[0, kept:].tolist()) | set(mixed.inputs[row, kept:].tolist()) <= {market.padding}
        assert mixed.difficulty[row] == own.difficulty[0]
    assert (mixed.inputs[:, -1] != market.padding).any()


def test_an_answer_settles_where_it_changes_no_more(surface: ModuleType) -> None:
    said = torch.tensor([[1, 2, 3, 3], [2, 2, 1, 3], [2, 2, 2, 3], [2, 1, 2, 3]]).view(4, 2, 2)
    assert surface.settling_loop(said).tolist() == [[2, 4], [3, 1]]


def test_cosines_are_those_of_all_pairs(surface: ModuleType) -> None:
    drawn = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 5, 3, 4, generator=drawn, dtype=torch.float64) for _ in range(2))
    counts = torch.randint(0, 2, (5, 3), generator=drawn)
    found = surface.cosines(one, other, counts)
    for loop in range(2):
        pairs: dict[str, list[float]] = {"same problem": [], "same count": [], "other count": []}
        for place in range(3):
            first, second = (part[loop, :, place] - part[loop, :, place].mean(0) for part in (one, other))
            for i in range(5):
                for j in range(5):
                    alike = counts[i, place] == counts[j, place]
                    name = "same problem" if i == j else "same count" if alike else "other count"
                    dot, norms = first[i] @ second[j], first[i].norm() * second[j].norm()
                    pairs[name].append(float(dot / norms))
        for name, values in pairs.items():
            assert math.isclose(found[name][loop], sum(values) / len(values), rel_tol=1e-9, abs_tol=1e-9)
