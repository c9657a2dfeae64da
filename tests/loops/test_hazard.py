"""Exit probabilities from hazards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopwise.loops.hazard import (
    continuation_cross_entropy,
    entropy,
    exit_cdf,
    exit_distribution,
    mean_exit_loop,
)

hazard = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e-12, 1e-45, 1 - 1e-7]))


def naive(hazards: list[float]) -> list[float]:
    probabilities = []
    for loop, value in enumerate(hazards):
        survived = 1.0
        for earlier in hazards[:loop]:
            survived *= 1 - earlier
        probabilities.append(survived if loop == len(hazards) - 1 else value * survived)
    return probabilities


def test_worked_example() -> None:
    hazards = torch.tensor([[0.1], [0.5], [0.9], [0.3]], dtype=torch.float64)
    torch.testing.assert_close(
        exit_distribution(hazards)[:, 0], torch.tensor([0.1, 0.45, 0.405, 0.045], dtype=torch.float64)
    )
    torch.testing.assert_close(exit_cdf(hazards)[:, 0], torch.tensor([0.1, 0.55, 0.955, 1.0], dtype=torch.float64))
    assert mean_exit_loop(exit_distribution(hazards)).item() == pytest.approx(0.1 + 0.9 + 1.215 + 0.18)


@given(st.lists(hazard, min_size=1, max_size=12))
def test_distribution_and_its_cdf(values: list[float]) -> None:
    hazards = torch.tensor(values, dtype=torch.float64)
    leaving = exit_distribution(hazards)
    torch.testing.assert_close(leaving, torch.tensor(naive(values), dtype=torch.float64), rtol=0, atol=1e-14)
    assert abs(leaving.sum().item() - 1) < 1e-14
    assert (leaving >= 0).all()
    torch.testing.assert_close(exit_cdf(hazards), leaving.cumsum(0), rtol=0, atol=1e-14)
    assert exit_cdf(hazards)[-1] == 1


@given(st.lists(hazard, min_size=1, max_size=32))
def test_sums_to_one_in_float32(values: list[float]) -> None:
    leaving = exit_distribution(torch.tensor(values, dtype=torch.float32))
    assert abs(leaving.double().sum().item() - 1) < 4e-6


def test_narrow_hazards_are_widened() -> None:
    hazards = torch.full((4, 2), 0.3, dtype=torch.bfloat16)
    for values in (exit_distribution(hazards), exit_cdf(hazards), entropy(hazards), mean_exit_loop(hazards)):
        assert values.dtype == torch.float32


def test_entropy_of_known_distributions() -> None:
    even = torch.full((8, 3), 1 / 8, dtype=torch.float64)
    torch.testing.assert_close(entropy(even), torch.full((3,), 8.0, dtype=torch.float64).log())
    assert entropy(torch.tensor([0.0, 1.0, 0.0])).item() == 0


@pytest.mark.parametrize("logit", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_gradients_stay_finite_when_the_gate_saturates(logit: float) -> None:
    logits = torch.full((4, 3), logit, requires_grad=True)
    hazards = torch.sigmoid(logits)
    leaving = exit_distribution(hazards)
    wanted = torch.tensor([0.0, 0.5, 1.0])
    surprise = continuation_cross_entropy(hazards, wanted.expand(4, 3)).sum()
    total = (leaving * torch.arange(4.0)[:, None]).sum() + entropy(leaving).sum() + surprise
    total.backward()
    assert torch.isfinite(total)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_gradients_equal_finite_differences() -> None:
    torch.manual_seed(0)
    hazards = (torch.rand(4, 3, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    targets = torch.rand(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(exit_distribution, hazards)
    assert torch.autograd.gradcheck(lambda values: entropy(exit_distribution(values)), hazards)
    assert torch.autograd.gradcheck(lambda values: continuation_cross_entropy(values, targets), hazards)


def test_continuation_cross_entropy_is_binary_cross_entropy() -> None:
    torch.manual_seed(0)
    hazards, targets = torch.rand(5, 7, dtype=torch.float64), torch.rand(5, 7, dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy(1 - hazards, targets, reduction="none")
    torch.testing.assert_close(continuation_cross_entropy(hazards, targets), expected, rtol=1e-12, atol=1e-12)
