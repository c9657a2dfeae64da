"""Stablemax by its definition, and the losses of a segment by hand."""

import math

import pytest
import torch

from loopwise.objectives.deep_supervision import (
    going_on_target,
    log_stablemax,
    segment_loss,
    stablemax_cross_entropy,
)
from loopwise.tasks.problems import IGNORED


def test_stablemax_is_its_definition():
    logits = torch.tensor([-3.0, -0.5, 0.0, 0.25, 7.0], dtype=torch.float64)
    s = torch.tensor([1 / 4, 1 / 1.5, 1.0, 1.25, 8.0], dtype=torch.float64)
    assert torch.allclose(log_stablemax(logits).exp(), s / s.sum(), rtol=1e-14)


def test_its_gradient_is_finite_everywhere_and_agrees_with_differences():
    logits = torch.tensor([[-4.0, 3.0, 1.0, -1.0], [2.0, -0.1, 0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: stablemax_cross_entropy(x[:, None], torch.tensor([[1], [2]])), (logits,))
    far = torch.tensor([[0.0, 1.0, -1.0, 1e30]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log_stablemax(far).sum(), far)
    assert slope.isfinite().all()


def test_places_that_are_not_asked_do_not_count():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, IGNORED, 3], [IGNORED, IGNORED, IGNORED]])
    losses = stablemax_cross_entropy(logits, targets)
    alone = -log_stablemax(logits[0].double())
    assert losses.dtype == torch.float64
    assert losses[0] == pytest.approx(float(alone[0, 1] + alone[2, 3]) / 2)
    assert losses[1] == 0


def test_a_segment_loss_by_hand():
    prediction = torch.tensor([[[1.0, 0.0]], [[0.0, -1.0]]], dtype=torch.float64)
    targets = torch.tensor([[0], [1]])
    halt = torch.tensor([2.0, -1.0], dtype=torch.float64)
    loss = segment_loss(prediction, targets, torch.tensor([True, False]), halt)
    # stablemax: 2 / 3 for the first, (1 / 2) / (3 / 2) for the second
    assert float(loss.answer) == pytest.approx((math.log(3 / 2) + math.log(3)) / 2)
    assert float(loss.halting) == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2)
    assert float(loss.total) == pytest.approx(float(loss.answer) + 0.5 * float(loss.halting))
    go_on = (torch.tensor([0.0, 0.0], dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64))
    both = segment_loss(prediction, targets, torch.tensor([True, False]), halt, go_on)
    assert float(both.halting - loss.halting) == pytest.approx(math.log(2))


def test_the_target_of_going_on_is_the_better_choice_ahead():
    ahead = torch.tensor([[1.0, 3.0], [2.0, -1.0], [1.0, 3.0]])
    expected = torch.tensor([3.0, 2.0, 1.0]).sigmoid()
    assert torch.equal(going_on_target(ahead, torch.tensor([False, False, True])), expected)
