"""The chunked head against the full logits, and what it refuses."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from loopwise.errors import InputError
from loopwise.objectives.head import token_losses


@dataclass
class Case:
    hidden: Tensor
    head: Tensor
    targets: Tensor
    weights: Tensor
    mask: Tensor


def make_case(loops: int, batch: int, tokens: int, width: int, vocab: int, *, keep: float = 0.6, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    mask = torch.rand(batch, tokens) < keep
    return Case(
        hidden=torch.randn(loops, batch, tokens, width, dtype=torch.float64, requires_grad=True),
        head=torch.randn(vocab, width, dtype=torch.float64, requires_grad=True),
        targets=torch.randint(vocab, (batch, tokens)),
        weights=torch.rand(loops, batch, tokens, dtype=torch.float64) * mask,
        mask=mask,
    )


def full_logits(case: Case) -> tuple[Tensor, Tensor]:
    """Weighted sum and losses, with all logits at once."""
    loops = case.hidden.shape[0]
    logits = case.hidden @ case.head.t()
    targets = case.targets.masked_fill(~case.mask, 0).expand(loops, -1, -1)
    losses = functional.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view_as(targets)
    losses = losses * case.mask
    return (losses * case.weights).sum(), losses


@pytest.mark.parametrize(
    ("loops", "batch", "tokens", "width", "vocab"),
    [(1, 1, 1, 1, 1), (1, 2, 7, 5, 11), (4, 3, 5, 8, 17), (3, 1, 13, 4, 2), (2, 4, 16, 6, 97)],
)
@pytest.mark.parametrize("rows", [1, 4, 5, 1000])
@pytest.mark.parametrize("keep", [0.0, 0.6, 1.1])
def test_values_and_gradients_equal_full_logits(
    loops: int, batch: int, tokens: int, width: int, vocab: int, rows: int, keep: float
) -> None:
    case = make_case(loops, batch, tokens, width, vocab, keep=keep)
    value, losses = full_logits(case)
    grads = torch.autograd.grad(value * 1.7, [case.hidden, case.head])
    for hidden in (case.hidden, [case.hidden[loop] for loop in range(loops)]):
        result = token_losses(
            hidden,
            case.head,
            case.targets.masked_fill(~case.mask, -100),
            weights=case.weights,
            mask=case.mask,
            chunk_bytes=rows * vocab * 8,
        )
        found = torch.autograd.grad(result.weighted * 1.7, [case.hidden, case.head])
        torch.testing.assert_close(result.weighted, value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.losses, losses, rtol=1e-12, atol=1e-12)
        for ours, reference in zip(found, grads, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_without_a_mask_all_positions_count() -> None:
    case = make_case(2, 2, 9, 4, 13, keep=2.0)
    bare = token_losses(case.hidden, case.head, case.targets, weights=case.weights)
    masked = token_losses(case.hidden, case.head, case.targets, weights=case.weights, mask=case.mask)
    assert torch.equal(bare.losses, masked.losses)


def test_gradcheck() -> None:
    case = make_case(2, 2, 3, 4, 7)

    def weighted(hidden: Tensor, head: Tensor) -> Tensor:
        return token_losses(
            hidden, head, case.targets, weights=case.weights, mask=case.mask, chunk_bytes=2 * 7 * 8
        ).weighted

    assert torch.autograd.gradcheck(weighted, (case.hidden, case.head))


def test_no_weights_no_gradients() -> None:
    case = make_case(3, 2, 5, 4, 7)
    result = token_losses(case.hidden, case.head, case.targets, mask=case.mask)
    assert result.weighted.item() == 0
    assert not result.losses.requires_grad
    torch.testing.assert_close(result.losses, full_logits(case)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    case = make_case(2, 2, 5, 4, 7)
    getattr(case, frozen).requires_grad_(False)
    live = case.head if frozen == "hidden" else case.hidden
    token_losses(case.hidden, case.head, case.targets, weights=case.weights, mask=case.mask).weighted.backward()
    (reference,) = torch.autograd.grad(full_logits(case)[0], [live])
    torch.testing.assert_close(live.grad, reference, rtol=1e-10, atol=1e-12)
    assert getattr(case, frozen).grad is None


def test_loops_without_gradient_beside_loops_with() -> None:
    case = make_case(3, 2, 5, 4, 7)
    mixed = [case.hidden[0].detach(), case.hidden[1], case.hidden[2].detach()]
    result = token_losses(mixed, case.head, case.targets, weights=case.weights, mask=case.mask)
    found = torch.autograd.grad(result.weighted, [case.hidden, case.head])
    reference = torch.autograd.grad(full_logits(case)[0], [case.hidden, case.head])
    torch.testing.assert_close(found[0][1], reference[0][1], rtol=1e-10, atol=1e-12)
    assert found[0][0].abs().max() == 0
    torch.testing.assert_close(found[1], reference[1], rtol=1e-10, atol=1e-12)


def test_tied_head_collects_both_gradients() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.randint(11, (2, 6)), torch.randint(11, (2, 6))
    weights = torch.full((1, 2, 6), 1 / 12, dtype=torch.float64)
    hidden = torch.tanh(embedding[tokens])
    result = token_losses([hidden], embedding, targets, weights=weights, chunk_bytes=5 * 11 * 8)
    (found,) = torch.autograd.grad(result.weighted, [embedding])
    reference = functional.cross_entropy(
        (torch.tanh(embedding[tokens]) @ embedding.t()).flatten(0, 1), targets.flatten()
    )
    torch.testing.assert_close(found, torch.autograd.grad(reference, [embedding])[0], rtol=1e-10, atol=1e-12)


def test_a_second_backward_through_a_kept_graph_is_the_same() -> None:
    case = make_case(2, 2, 5, 4, 7)
    weighted = token_losses(case.hidden, case.head, case.targets, weights=case.weights, mask=case.mask).weighted
    first = [grad.clone() for grad in torch.autograd.grad(weighted, [case.hidden, case.head], retain_graph=True)]
    double = torch.autograd.grad(weighted * 2, [case.hidden, case.head], retain_graph=True)
    again = torch.autograd.grad(weighted, [case.hidden, case.head])
    for one, two, three in zip(first, double, again, strict=True):
        assert torch.equal(one, three)
        torch.testing.assert_close(one * 2, two)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_losses_are_exact_for_its_logits(autocast: bool) -> None:
    case = make_case(2, 3, 8, 16, 37)
    stored = torch.float32 if autocast else torch.bfloat16
    hidden = case.hidden.detach().to(stored).requires_grad_()
    head = case.head.detach().to(stored).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = token_losses(hidden, head, case.targets, weights=case.weights.float(), mask=case.mask, chunk_bytes=999)
    result.weighted.backward()
    logits = (hidden.detach().bfloat16() @ head.detach().bfloat16().t()).float().flatten(0, 2)
    targets = case.targets.expand(2, -1, -1).flatten()
    losses = functional.cross_entropy(logits, targets, reduction="none").view(2, 3, 8) * case.mask
    assert result.losses.dtype == torch.float32
    torch.testing.assert_close(result.losses, losses, rtol=1e-5, atol=1e-5)
    reference = torch.autograd.grad(full_logits(case)[0], [case.hidden, case.head])
    for tensor, exact in zip((hidden, head), reference, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == stored
        error = (tensor.grad.double() - exact).norm() / exact.norm()
        assert error < 0.03


def test_a_confident_wrong_model_has_a_finite_loss_and_a_sure_right_one_a_tiny_one() -> None:
    hidden = torch.tensor([[[1000.0], [1000.0]]])
    head = torch.tensor([[1.0], [0.0]])
    result = token_losses([hidden], head, torch.tensor([[0, 1]]))
    assert result.losses[0, 0].tolist() == [0.0, 1000.0]


def test_not_a_number_is_passed_on() -> None:
    case = make_case(1, 1, 3, 4, 7, keep=2.0)
    hidden = case.hidden.detach().clone()
    hidden[0, 0, 1] = float("nan")
    result = token_losses(hidden.requires_grad_(), case.head, case.targets, weights=case.weights)
    assert result.losses.isnan().flatten().tolist() == [False, True, False]
    assert result.weighted.isnan()


def test_refusals() -> None:
    case = make_case(2, 2, 3, 4, 7, keep=2.0)
    hidden, head, targets, weights = case.hidden, case.head, case.targets, case.weights
    with pytest.raises(InputError, match="no loops"):
        token_losses([], head, targets)
    with pytest.raises(InputError, match="from 0 to 7, the head has 7 tokens"):
        token_losses(hidden, head, torch.tensor([[0, 1, 2], [3, 4, 7]]))
    with pytest.raises(InputError, match="mask=False"):
        token_losses(hidden, head, torch.full((2, 3), -100))
    with pytest.raises(InputError, match="detach"):
        token_losses(hidden, head, targets, weights=weights.requires_grad_())
    with pytest.raises(InputError, match="float16"):
        token_losses(hidden.half(), head.half(), targets)
    with pytest.raises(InputError, match="cast one to the other"):
        token_losses(hidden.float(), head, targets)
    with pytest.raises(InputError, match=r"weights of shape \(1, 2, 3\)"):
        token_losses(list(hidden), head, targets, weights=weights[:1].detach())


def test_second_derivatives_are_refused() -> None:
    case = make_case(1, 1, 3, 4, 7, keep=2.0)
    weighted = token_losses(case.hidden, case.head, case.targets, weights=case.weights).weighted
    with pytest.raises(InputError, match="second derivatives"):
        torch.autograd.grad(weighted, [case.hidden], create_graph=True)
