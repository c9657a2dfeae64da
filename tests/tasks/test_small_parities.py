"""Prefix sums and the parity of non-zeros: against counting by hand, spread as stated, addressed."""

import pytest
import torch

from loopwise.errors import ConfigError
from loopwise.tasks.nonzero_parity import NonzeroParity, NonzeroParityConfig
from loopwise.tasks.prefix_sums import PrefixSums, PrefixSumsConfig
from loopwise.tasks.problems import numbers


def test_prefix_sums_by_counting():
    task = PrefixSums(PrefixSumsConfig(bits=12))
    problems = task.draw(0, numbers(0, 200))
    for bits, answers in zip(problems.inputs[:, 0].tolist(), problems.targets.tolist(), strict=True):
        assert set(bits) <= {-0.5, 0.5}
        assert answers == [bits[: place + 1].count(0.5) % 2 for place in range(12)]
    assert abs(float((problems.inputs > 0).float().mean()) - 0.5) < 0.03
    assert problems.difficulty.tolist() == [12] * 200
    wrong = problems.targets.clone()
    wrong[5, 3] = 1 - wrong[5, 3]
    assert (~task.verify(problems, wrong)).nonzero().flatten().tolist() == [5]


def test_parity_by_counting():
    task = NonzeroParity(NonzeroParityConfig(entries=10, fewest=3, most=6))
    problems = task.draw(0, numbers(0, 2000))
    for vector, answer, difficulty in zip(
        problems.inputs.tolist(), problems.targets.tolist(), problems.difficulty.tolist(), strict=True
    ):
        assert set(vector) <= {-1.0, 0.0, 1.0}
        assert answer == [vector.count(1.0) % 2]
        assert difficulty == 10 - vector.count(0.0)
    counts = torch.bincount(problems.difficulty, minlength=11)
    assert counts[:3].sum() + counts[7:].sum() == 0
    assert bool(((counts[3:7] / 2000 - 0.25).abs() < 0.04).all())
    filled = (problems.inputs != 0).float().mean(0)
    assert bool(((filled - 0.45).abs() < 0.05).all()), "every place is filled as often"
    assert abs(float((problems.inputs == 1).sum() / (problems.inputs != 0).sum()) - 0.5) < 0.02
    assert not bool(task.verify(problems, 1 - problems.targets).any())


@pytest.mark.parametrize("task", [PrefixSums(PrefixSumsConfig(bits=9)), NonzeroParity(NonzeroParityConfig(entries=9))])
def test_a_problem_depends_on_seed_and_number_alone(task):
    whole = task.draw(2, numbers(0, 8)).inputs
    assert torch.equal(task.draw(2, torch.tensor([6, 0])).inputs, whole[[6, 0]])
    assert not torch.equal(task.draw(3, numbers(0, 8)).inputs, whole)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="bits=0"):
        PrefixSumsConfig(bits=0)
    with pytest.raises(ConfigError, match="most=9"):
        NonzeroParityConfig(entries=8, most=9)
    with pytest.raises(ConfigError, match="fewest=5"):
        NonzeroParityConfig(entries=8, fewest=5, most=4)
