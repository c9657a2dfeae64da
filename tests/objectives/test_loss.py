"""Putting an objective together with hidden states that do not fit its plan, or a model without a gate."""

import pytest
import torch

from loopwise.errors import ConfigError, InputError
from loopwise.objectives import ObjectiveInputs, build_objective, objective_loss

STATES = torch.randn(4, 2, 3, 5)
TARGETS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(("text", "hidden"), [("last", STATES), ("every", STATES[:3]), ("every", list(STATES[-1:]))])
def test_as_many_hidden_states_as_loops_read(text: str, hidden: torch.Tensor) -> None:
    objective = build_objective(text)
    inputs = ObjectiveInputs(plan=objective.plan(seed=0, step=0, micro=0), mask=TARGETS == 0)
    with pytest.raises(InputError, match=r"plan\.loops_read"):
        objective_loss(objective, inputs, hidden=hidden, head_weight=torch.randn(7, 5), targets=TARGETS)


@pytest.mark.parametrize("text", ["expected", "calibrate"])
def test_a_gate_is_needed(text: str) -> None:
    objective = build_objective(text)
    assert objective.needs_hazards
    inputs = ObjectiveInputs(plan=objective.plan(seed=0, step=0, micro=0), mask=TARGETS == 0)
    with pytest.raises(ConfigError, match="exit gate"):
        objective_loss(objective, inputs, hidden=STATES, head_weight=torch.randn(7, 5), targets=TARGETS)
