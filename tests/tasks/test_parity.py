import pytest
import torch

from loopwise.errors import ConfigError
from loopwise.tasks.parity import CumulativeParity
from loopwise.tasks.problems import numbers


def test_targets_equal_walking_along() -> None:
    problems = CumulativeParity(length=9).draw(1, numbers(0, 40))
    for signs, targets, difficulty in zip(
        problems.inputs.tolist(), problems.targets.tolist(), problems.difficulty.tolist(), strict=True
    ):
        odd = False
        walked = []
        for sign in signs:
            odd ^= sign == -1
            walked.append(int(odd))
        assert targets == walked
        assert difficulty == signs.count(-1)
    assert set(problems.inputs.unique().tolist()) == {-1.0, 1.0}


def test_the_products_sign_says_the_same() -> None:
    problems = CumulativeParity(length=64).draw(0, numbers(5, 100))
    assert torch.equal((1 - problems.inputs.cumprod(1).long()) // 2, problems.targets)


def test_a_problem_is_a_function_of_seed_and_number() -> None:
    task = CumulativeParity()
    whole, part = task.draw(3, numbers(0, 20)), task.draw(3, torch.tensor([7, 2]))
    assert torch.equal(whole.inputs[[7, 2]], part.inputs)
    assert not torch.equal(whole.inputs, task.draw(4, numbers(0, 20)).inputs)
    assert 0.45 < (CumulativeParity(length=64).draw(0, numbers(0, 300)).inputs == -1).float().mean() < 0.55


def test_chances_of_their_own_spread_difficulties() -> None:
    wide = CumulativeParity(length=16, negatives=(0.0, 1.0)).draw(0, numbers(0, 500)).difficulty.float()
    narrow = CumulativeParity(length=16).draw(0, numbers(0, 500)).difficulty.float()
    assert wide.std() > 2 * narrow.std()


def test_verify_asks_for_every_place() -> None:
    task = CumulativeParity(length=5)
    problems = task.draw(0, numbers(0, 3))
    answers = problems.targets.clone()
    answers[1, 4] = 1 - answers[1, 4]
    assert task.verify(problems, answers).tolist() == [True, False, True]


def test_what_is_no_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="length=0"):
        CumulativeParity(length=0)
    with pytest.raises(ConfigError, match="lower one first"):
        CumulativeParity(negatives=(0.7, 0.2))
