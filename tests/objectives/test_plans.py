"""Plans, weights and metrics of the objectives whose weights are known beforehand."""

from typing import Any

import pytest
import torch

from loopwise.errors import ConfigError
from loopwise.objectives import EveryLoop, LastLoop, LoopPlan, ObjectiveInputs

MASK = torch.tensor([[True, True, False], [True, False, True]])
FIRST = torch.tensor([[1, 2, 1], [3, 1, 4]])


def inputs_for(objective: LastLoop | EveryLoop, **given: Any) -> ObjectiveInputs:
    return ObjectiveInputs(plan=objective.plan(seed=0, step=0, micro=0), mask=MASK, **given)


def test_last_reads_the_last_loop_and_averages_over_tokens() -> None:
    objective = LastLoop(loops=3, backprop=2)
    assert objective.plan(seed=5, step=7, micro=1) == LoopPlan(loops=3, backprop=2, read="last")
    weights = objective.weights(inputs_for(objective))
    assert weights is not None
    assert weights.tolist() == [[[0.25, 0.25, 0.0], [0.25, 0.0, 0.25]]]


def test_last_leaves_out_tokens_asked_only_beyond_it() -> None:
    objective = LastLoop(loops=3)
    weights = objective.weights(inputs_for(objective, first_loop=FIRST))
    assert weights is not None
    torch.testing.assert_close(weights[0, 1], torch.tensor([1 / 3, 0, 0], dtype=torch.float64))
    assert weights.sum().item() == pytest.approx(1)


def test_every_weighs_each_token_alike_over_the_loops_that_count() -> None:
    objective = EveryLoop(loops=3)
    weights = objective.weights(inputs_for(objective, first_loop=FIRST))
    assert weights is not None
    third = 1 / 3
    expected = torch.zeros(3, 2, 3, dtype=torch.float64)
    expected[:, 0, 0] = third / 3
    expected[1:, 0, 1] = third / 2
    expected[2, 1, 0] = third
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("objective", [LastLoop(loops=2), EveryLoop(loops=2)])
def test_nothing_counts(objective: LastLoop | EveryLoop) -> None:
    inputs = ObjectiveInputs(plan=objective.plan(seed=0, step=0, micro=0), mask=torch.zeros(2, 3, dtype=torch.bool))
    weights = objective.weights(inputs)
    assert weights is not None
    assert weights.abs().sum() == 0
    assert objective.metrics(inputs, torch.zeros_like(weights)) == {}


def test_metrics_by_loop_and_by_exit() -> None:
    objective = EveryLoop(loops=3)
    losses = torch.tensor([4.0, 2.0, 1.0])[:, None, None] * MASK
    hazards = torch.tensor([0.5, 0.5, 0.9])[:, None, None].expand(3, 2, 3).clone()
    hazards[:, ~MASK] = float("nan")
    figures = objective.metrics(inputs_for(objective, hazards=hazards), losses)
    assert figures == pytest.approx(
        {
            "loss_loop_1": 4.0,
            "loss_loop_2": 2.0,
            "loss_loop_3": 1.0,
            "exit_loop": 0.5 + 2 * 0.25 + 3 * 0.25,
            "exit_entropy": 1.5 * 0.6931471805599453,
            "exit_first": 0.5,
        }
    )


def test_metrics_leave_out_loops_at_which_nothing_counts() -> None:
    objective = EveryLoop(loops=3)
    figures = objective.metrics(inputs_for(objective, first_loop=torch.full((2, 3), 2)), torch.ones(3, 2, 3))
    assert figures == {"loss_loop_2": 1.0, "loss_loop_3": 1.0}


def test_plans_are_checked() -> None:
    with pytest.raises(ConfigError, match="give 1 to 4"):
        LastLoop(loops=4, backprop=5)
    with pytest.raises(ConfigError, match="at least one loop"):
        EveryLoop(loops=0)
    assert list(LoopPlan(loops=3, read="all").loops_read) == [1, 2, 3]
    assert list(LoopPlan(loops=3).loops_read) == [3]
