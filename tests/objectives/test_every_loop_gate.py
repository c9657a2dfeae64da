"""The gate that learns beside the loss of every loop."""

import pytest
import torch

from loopwise.errors import ConfigError
from loopwise.objectives.base import LoopPlan, ObjectiveInputs
from loopwise.objectives.registry import build_objective


def inputs_for(hazards: torch.Tensor | None) -> ObjectiveInputs:
    mask = torch.tensor([[True, False, True]])
    return ObjectiveInputs(plan=LoopPlan(loops=3, read="all"), mask=mask, hazards=hazards)


def test_the_gate_is_taught_to_go_on_while_a_later_loop_is_better() -> None:
    losses = torch.tensor([[[2.0, 9.0, 0.1]], [[2.0, 9.0, 0.2]], [[0.5, 9.0, 0.3]]], dtype=torch.float64)
    hazards = torch.tensor([[[0.3, 0.5, 0.6]], [[0.2, 0.5, 0.7]], [[0.9, 0.5, 0.8]]], dtype=torch.float64)
    hazards.requires_grad_()
    objective = build_objective("every:loops=3,gate=0.5")
    found = objective.gate_loss(inputs_for(hazards), losses)

    # Token 0 gains 1.5 nats at loop 3 from either gate; token 2 only loses by going on: -0.1 from both gates.
    expected = 0.0
    for loop, token, gain in ((0, 0, 1.5), (1, 0, 1.5), (0, 2, -0.1), (1, 2, -0.1)):
        label = torch.sigmoid(torch.tensor(50 * (gain - 0.1), dtype=torch.float64))
        stop = hazards[loop, 0, token]
        expected -= label * torch.log(1 - stop) + (1 - label) * torch.log(stop)
    torch.testing.assert_close(found, 0.5 * expected / 3 / 2)
    found.backward()
    assert hazards.grad is not None
    assert hazards.grad[:2, 0, [0, 2]].abs().min() > 0
    assert hazards.grad[2].abs().max() == 0
    assert hazards.grad[:, 0, 1].abs().max() == 0


def test_without_a_weight_no_gate_is_needed() -> None:
    objective = build_objective("every:loops=3")
    assert not objective.needs_hazards
    assert objective.gate_loss(inputs_for(None), torch.ones(3, 1, 3)) == 0


@pytest.mark.parametrize("text", ["every:gate=-1", "every:loops=1,gate=0.1"])
def test_a_weight_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="gate"):
        build_objective(text)
