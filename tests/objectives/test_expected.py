"""Expected loss with entropy: values by hand, schedules, and tokens that count only from a loop on."""

import math

import pytest
import torch

from loopwise.errors import ConfigError
from loopwise.objectives import EveryLoop, ExpectedLoss, ObjectiveInputs

HAZARDS = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)[:, None, None]
LOSSES = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)[:, None, None]
ONE = torch.ones(1, 1, dtype=torch.bool)


def inputs_for(objective: ExpectedLoss, **given: object) -> ObjectiveInputs:
    settings: dict[str, object] = {"mask": ONE, "hazards": HAZARDS, **given}
    return ObjectiveInputs(plan=objective.plan(seed=0, step=0, micro=0), **settings)  # type: ignore[arg-type]


def test_worked_example() -> None:
    objective = ExpectedLoss(loops=3, beta=0.1)
    inputs = inputs_for(objective)
    leaving = [0.2, 0.4, 0.4]
    weights = objective.weights(inputs)
    assert weights is not None
    torch.testing.assert_close(weights.flatten(), torch.tensor(leaving, dtype=torch.float64))
    spread = -sum(chance * math.log(chance) for chance in leaving)
    assert objective.gate_loss(inputs, LOSSES).item() == pytest.approx(-0.1 * spread)
    assert objective.metrics(inputs, LOSSES)["beta"] == 0.1


def test_geometric_prior_by_hand() -> None:
    objective = ExpectedLoss(loops=3, beta=0.1, prior=0.3)
    leaving, prior = [0.2, 0.4, 0.4], [0.3, 0.7 * 0.3, 0.7 * 0.7]
    away = sum(chance * math.log(chance / wanted) for chance, wanted in zip(leaving, prior, strict=True))
    assert objective.gate_loss(inputs_for(objective), LOSSES).item() == pytest.approx(0.1 * away)
    at_prior = inputs_for(objective, hazards=torch.full_like(HAZARDS, 0.3))
    assert objective.gate_loss(at_prior, LOSSES).item() == pytest.approx(0, abs=1e-15)


def test_geometric_prior_is_conditioned_too() -> None:
    objective = ExpectedLoss(loops=3, beta=1.0, prior=0.3)
    hazards = HAZARDS.expand(3, 1, 3).clone().requires_grad_()
    # Left at loop 2 or 3 with 0.5 each where 0.3 and 0.7 are expected; at loop 3 alone, as expected; never asked.
    inputs = inputs_for(
        objective,
        hazards=hazards,
        mask=torch.tensor([[True, True, True]]),
        first_loop=torch.tensor([[2, 3, 4]]),
    )
    loss = objective.gate_loss(inputs, LOSSES.expand(3, 1, 3))
    away = 0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.7)
    assert loss.item() == pytest.approx(away / 2)
    loss.backward()
    assert hazards.grad is not None
    assert hazards.grad.isfinite().all()
    assert hazards.grad[:, 0, 1:].abs().max() == 0


def test_conditioned_on_loops_that_count() -> None:
    objective = ExpectedLoss(loops=3, beta=0.0)
    inputs = inputs_for(objective, first_loop=torch.tensor([[2]]))
    weights = objective.weights(inputs)
    assert weights is not None
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64))
    hazards = HAZARDS.clone().requires_grad_()
    total = objective.gate_loss(inputs_for(objective, hazards=hazards, first_loop=torch.tensor([[2]])), LOSSES)
    assert total.item() == 0
    (grad,) = torch.autograd.grad(total, [hazards])
    assert grad.flatten().tolist() == [0, 2 - 1, 0]


def test_a_token_that_never_counts_changes_nothing() -> None:
    objective = ExpectedLoss(loops=3)
    alone = inputs_for(objective, hazards=HAZARDS, mask=ONE)
    hazards = torch.cat([HAZARDS, 1 - HAZARDS, torch.full_like(HAZARDS, float("nan"))], dim=2).requires_grad_()
    losses = torch.cat([LOSSES, LOSSES * 5, LOSSES * 0], dim=2)
    beside = inputs_for(
        objective,
        hazards=hazards,
        mask=torch.tensor([[True, True, False]]),
        first_loop=torch.tensor([[1, 4, 1]]),
    )
    total = objective.gate_loss(beside, losses)
    assert total.item() == pytest.approx(objective.gate_loss(alone, LOSSES).item())
    total.backward()
    assert hazards.grad is not None
    assert hazards.grad[:, 0, 1:].abs().max() == 0


def test_uniform_phase_is_every_loop_and_teaches_no_gate() -> None:
    objective = ExpectedLoss(loops=3, uniform_until=0.5)
    inputs = inputs_for(objective, progress=0.49)
    every = EveryLoop(loops=3).weights(inputs)
    weights = objective.weights(inputs)
    assert weights is not None
    assert every is not None
    assert torch.equal(weights, every)
    assert not objective.gate_loss(inputs, LOSSES).requires_grad
    assert objective.gate_loss(inputs, LOSSES).item() == 0
    later = objective.weights(inputs_for(objective, progress=0.5))
    assert later is not None
    assert not torch.equal(later, every)


def test_beta_moves_in_a_straight_line() -> None:
    objective = ExpectedLoss(beta=0.1, beta_end=0.02, uniform_until=0.2, anneal_until=0.6)
    found = [objective.beta_at(progress) for progress in (0.0, 0.19, 0.2, 0.4, 0.6, 0.9)]
    assert found == pytest.approx([0, 0, 0.1, 0.06, 0.02, 0.02])
    assert ExpectedLoss(beta=0.1).beta_at(0.7) == 0.1


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="beta=-1"):
        ExpectedLoss(beta=-1.0)
    for prior in (0.0, 1.0, -0.5):
        with pytest.raises(ConfigError, match="a hazard between 0 and 1"):
            ExpectedLoss(prior=prior)
    with pytest.raises(ConfigError, match="share of the stage"):
        ExpectedLoss(uniform_until=500.0)
    with pytest.raises(ConfigError, match="without an end"):
        ExpectedLoss(anneal_until=0.5)
    with pytest.raises(ConfigError, match="not after"):
        ExpectedLoss(beta_end=0.05, uniform_until=0.5, anneal_until=0.5)
    objective = ExpectedLoss(loops=3)
    with pytest.raises(ConfigError, match="needs a model with an exit gate"):
        objective.weights(inputs_for(objective, hazards=None))
