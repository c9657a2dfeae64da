"""PonderNet's loss: the truncation rule, the KL, an expectation written out; ACT's cost."""

import pytest
import torch

from loopwise.errors import ConfigError, InputError
from loopwise.models.pondering import ACTState
from loopwise.objectives.pondering import Ponder, act_loss, divergence, ponder_loss, truncated_geometric


@pytest.mark.parametrize("prior", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("loops", [1, 2, 7])
def test_the_prior_sums_to_one_and_its_tail_goes_to_the_last_loop(prior, loops):
    found = truncated_geometric(prior, loops)
    expected = [prior * (1 - prior) ** n for n in range(loops - 1)] + [(1 - prior) ** (loops - 1)]
    assert found.tolist() == pytest.approx(expected)
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


def test_the_divergence_is_zero_at_the_prior_and_only_there():
    hazards = torch.full((6, 3), 0.3, dtype=torch.float64)
    losses = torch.zeros_like(hazards)
    ponder = Ponder(prior=0.3, beta=1.0)
    assert float(ponder_loss(losses, hazards, ponder)) == pytest.approx(0, abs=1e-12)
    hazards[2, 1] = 0.5
    assert float(ponder_loss(losses, hazards, ponder)) > 1e-3
    # The last hazard is never used: the last loop takes what is left.
    hazards[2, 1], hazards[5] = 0.3, 0.99
    assert float(ponder_loss(losses, hazards, ponder)) == pytest.approx(0, abs=1e-12)


def test_the_loss_written_out():
    hazards = torch.tensor([[0.2, 0.5], [0.4, 0.1], [0.7, 0.3]], dtype=torch.float64)
    losses = torch.tensor([[1.0, 2.0], [0.5, 0.3], [0.1, 4.0]], dtype=torch.float64)
    total = 0.0
    for unit in range(2):
        a, b = hazards[0, unit].item(), hazards[1, unit].item()
        p = [a, (1 - a) * b, (1 - a) * (1 - b)]
        q = [0.25, 0.75 * 0.25, 0.75 * 0.75]
        total += sum(chance * loss for chance, loss in zip(p, losses[:, unit].tolist(), strict=True))
        total += 0.1 * sum(
            chance * torch.tensor(chance / prior).log().item() for chance, prior in zip(p, q, strict=True)
        )
    assert float(ponder_loss(losses, hazards, Ponder(prior=0.25, beta=0.1))) == pytest.approx(total / 2, rel=1e-6)


def test_gradients_equal_differences_also_at_hazards_of_zero_and_one():
    hazards = torch.tensor([[0.2, 0.9], [0.4, 0.3], [0.7, 0.3]], dtype=torch.float64, requires_grad=True)
    losses = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: ponder_loss(x, y, Ponder(prior=0.2, beta=0.5)), (losses, hazards))
    extreme = torch.tensor([[0.0, 1.0], [1.0, 0.5], [0.5, 0.5]], requires_grad=True)
    value = ponder_loss(losses.detach().float(), extreme, Ponder())
    value.backward()
    assert bool(value.isfinite())
    assert bool(extreme.grad.isfinite().all())


def test_a_loop_never_left_at_adds_nothing():
    leaving = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    value = divergence(leaving, torch.tensor([0.5, 0.5], dtype=torch.float64))
    value.backward()
    assert value.item() == pytest.approx(torch.tensor(2.0).log().item())
    assert bool(leaving.grad.isfinite().all())


def test_act_adds_the_price_of_loops_and_remainder():
    state = ACTState(
        latest=torch.zeros(2, 1), mixed=torch.zeros(2, 1), spent=torch.tensor([0.4, 0.0]), loops=torch.tensor([3, 1])
    )
    losses = torch.tensor([1.0, 2.0])
    assert float(act_loss(losses, state, 0.1)) == pytest.approx((1.0 + 0.36 + 2.0 + 0.2) / 2)
    assert float(act_loss(losses, state, 0.0)) == pytest.approx(1.5)


def test_what_cannot_be_is_refused():
    for prior in (0.0, 1.0):
        with pytest.raises(ConfigError, match="prior="):
            Ponder(prior=prior)
    with pytest.raises(ConfigError, match=r"beta=-0\.1"):
        Ponder(beta=-0.1)
    state = ACTState(latest=torch.zeros(1), mixed=torch.zeros(1), spent=torch.zeros(1), loops=torch.ones(1).long())
    with pytest.raises(ConfigError, match=r"tau=-1\.0"):
        act_loss(torch.zeros(1), state, -1.0)
    with pytest.raises(InputError, match="one of each per loop"):
        ponder_loss(torch.zeros(3, 2), torch.zeros(4, 2), Ponder())
