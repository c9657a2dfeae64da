"""Gate calibration: each label rule by hand, bounds, and the loss against plain binary cross-entropy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from loopwise.errors import ConfigError
from loopwise.objectives import Calibration, ObjectiveInputs, continuation_labels
from loopwise.objectives.calibration import LABEL_RULES

GAINS = {
    # losses 2.00, 2.10, 1.90, 1.95
    "as-written": [0.0, 0.2, 0.0],
    "unclamped": [-0.1, 0.2, -0.05],
    "next-loop": [-0.1, 0.2, -0.05],
    "best-later": [0.1, 0.2, -0.05],
}
LOSSES = torch.tensor([2.0, 2.1, 1.9, 1.95], dtype=torch.float64)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("rule", LABEL_RULES)
def test_labels_by_hand(rule: str) -> None:
    labels = continuation_labels(LOSSES, rule=rule)
    assert labels.targets.tolist() == pytest.approx([sigmoid(50 * (gain - 0.005)) for gain in GAINS[rule]])
    judged = torch.arange(1, 5)[labels.gates].tolist()
    assert judged == ([2, 3, 4] if rule in ("as-written", "unclamped") else [1, 2, 3])


@given(st.lists(st.floats(0, 20), min_size=2, max_size=8))
def test_as_written_never_asks_for_more_than_its_bound(losses: list[float]) -> None:
    labels = continuation_labels(torch.tensor(losses, dtype=torch.float64), rule="as-written")
    assert labels.targets.min().item() >= sigmoid(-0.25) - 1e-12


@given(st.lists(st.floats(0, 20), min_size=2, max_size=8))
def test_best_later_looks_at_all_later_loops(losses: list[float]) -> None:
    labels = continuation_labels(torch.tensor(losses, dtype=torch.float64), rule="best-later", sharpness=1.0, gamma=0.0)
    expected = [sigmoid(loss - min(losses[loop + 1 :])) for loop, loss in enumerate(losses[:-1])]
    assert labels.targets.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("rule", LABEL_RULES)
def test_loss_is_binary_cross_entropy_over_real_tokens(rule: str) -> None:
    torch.manual_seed(0)
    objective = Calibration(loops=4, rule=rule, sharpness=3.0, gamma=0.01)
    losses = torch.rand(4, 2, 5, dtype=torch.float64)
    hazards = torch.rand(4, 2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 5) < 0.7
    plan = objective.plan(seed=0, step=0, micro=0)
    first_loop = torch.full((2, 5), 9)
    inputs = ObjectiveInputs(plan=plan, mask=mask, hazards=hazards, first_loop=first_loop)
    assert objective.weights(inputs) is None
    total = objective.gate_loss(inputs, losses)
    labels = continuation_labels(losses, rule=rule, sharpness=3.0, gamma=0.01)
    expected = sum(
        functional.binary_cross_entropy((1 - hazard)[mask], target[mask])
        for hazard, target in zip(hazards[labels.gates], labels.targets, strict=True)
    )
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(total, expected / 4, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(total, [hazards])
    idle = {"as-written": 0, "unclamped": 0, "next-loop": 3, "best-later": 3}[rule]
    assert grad[idle].abs().max() == 0
    assert grad[:, ~mask].abs().sum() == 0
    assert (grad[1, mask] != 0).all()


def test_metrics() -> None:
    objective = Calibration(loops=4, rule="best-later")
    mask = torch.tensor([[True, False]])
    hazards = torch.tensor([0.1, 0.9, 0.9, 0.5], dtype=torch.float64)[:, None, None].expand(4, 1, 2)
    plan = objective.plan(seed=0, step=0, micro=0)
    losses = LOSSES[:, None, None] * mask
    figures = objective.metrics(ObjectiveInputs(plan=plan, mask=mask, hazards=hazards), losses)
    wanted = [sigmoid(objective.sharpness * (gain - objective.gamma)) for gain in GAINS["best-later"]]
    assert figures["go_on_wanted"] == pytest.approx(sum(wanted) / 3)
    assert figures["gate_agreement"] == pytest.approx(2 / 3)
    assert figures["loss_loop_3"] == pytest.approx(1.9)
    assert figures["exit_first"] == pytest.approx(0.1)


def test_the_rule_is_always_named() -> None:
    assert str(Calibration()) == "calibrate:rule=best-later"
    assert Calibration.trains == "gate"


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="as-written, unclamped, next-loop, best-later"):
        Calibration(rule="as_written")
    with pytest.raises(ConfigError, match="no gate to judge"):
        Calibration(loops=1)
    with pytest.raises(ConfigError, match="positive"):
        Calibration(sharpness=0.0)
