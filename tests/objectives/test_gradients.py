"""Whole losses on a toy looped model: against the plain formula under autograd, and against finite differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from loopwise.objectives import Objective, ObjectiveInputs, build_objective, objective_loss

LOOPS, BATCH, TOKENS, WIDTH, VOCAB = 4, 2, 5, 6, 9
Formula = Callable[[list[Tensor], list[Tensor]], Tensor]


class Toy(nn.Module):
    """An embedding, one tanh layer that is looped, a gate, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.core = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, 1)
        self.double()

    def run(self, tokens: Tensor, loops: int, backprop: int | None = None) -> tuple[list[Tensor], Tensor]:
        start = self.embedding(tokens)
        state, states, hazards = start, [], []
        for loop in range(1, loops + 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (backprop is None or loop > loops - backprop)):
                state = torch.tanh(self.core(state) + start)
                states.append(state)
                hazards.append(torch.sigmoid(self.gate(state)).squeeze(-1))
        return states, torch.stack(hazards)


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


TOKENS_IN = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % VOCAB
TARGETS = (TOKENS_IN * 5 + 3) % VOCAB
MASK = torch.tensor([[True, True, False, True, True], [True, False, True, True, True]])
FIRST = torch.tensor([[1, 2, 1, 4, 3], [1, 1, 2, 5, 2]])


def total_of(
    objective: Objective, model: Toy, *, progress: float = 0.9, first_loop: Tensor | None = None, share: float = 1.0
) -> Tensor:
    plan = objective.plan(seed=0, step=0, micro=0)
    with torch.set_grad_enabled(objective.trains == "model"):
        states, hazards = model.run(TOKENS_IN, plan.loops, plan.backprop)
    if objective.trains == "gate":
        hazards = torch.sigmoid(model.gate(torch.stack(states).detach())).squeeze(-1)
    inputs = ObjectiveInputs(plan=plan, mask=MASK, hazards=hazards, first_loop=first_loop, progress=progress)
    return objective_loss(
        objective,
        inputs,
        hidden=[states[loop - 1] for loop in plan.loops_read],
        head_weight=model.embedding.weight,
        targets=TARGETS,
        share=share,
        chunk_bytes=3 * VOCAB * 8,
    ).total


def per_token(model: Toy) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and hazards of each loop at real tokens, from full logits."""
    states, hazards = model.run(TOKENS_IN, LOOPS)
    losses = [
        functional.cross_entropy(state[MASK] @ model.embedding.weight.t(), TARGETS[MASK], reduction="none")
        for state in states
    ]
    return losses, [hazard[MASK] for hazard in hazards]


def stage_one(losses: list[Tensor], hazards: list[Tensor]) -> Tensor:
    total, left = torch.zeros(()), torch.ones(())
    for loop, (loss, hazard) in enumerate(zip(losses, hazards, strict=True), start=1):
        chance = left if loop == LOOPS else hazard * left
        total = total + chance * loss + 0.07 * chance * chance.log()
        left = left * (1 - hazard)
    return total.mean()


def stage_one_geometric(losses: list[Tensor], hazards: list[Tensor]) -> Tensor:
    total, left = torch.zeros(()), torch.ones(())
    for loop, (loss, hazard) in enumerate(zip(losses, hazards, strict=True), start=1):
        chance = left if loop == LOOPS else hazard * left
        expected = 0.6 ** (loop - 1) * (1.0 if loop == LOOPS else 0.4)
        total = total + chance * loss + 0.07 * chance * (chance / expected).log()
        left = left * (1 - hazard)
    return total.mean()


def stage_two(losses: list[Tensor], hazards: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for loop in range(1, LOOPS):
        gain = (losses[loop - 1] - losses[loop]).detach().clamp_min(0)
        total = total + functional.binary_cross_entropy(1 - hazards[loop], torch.sigmoid(7.0 * (gain - 0.005)))
    return total / LOOPS


def last(losses: list[Tensor], hazards: list[Tensor]) -> Tensor:
    return losses[-1].mean()


def every(losses: list[Tensor], hazards: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("last", last),
        ("every", every),
        ("expected:beta=0.07", stage_one),
        ("expected:beta=0.07,prior=0.4", stage_one_geometric),
        ("calibrate:rule=as-written,sharpness=7,gamma=0.005", stage_two),
    ],
)
def test_total_and_gradient_equal_the_plain_formula(toy: Toy, text: str, formula: Formula) -> None:
    objective = build_objective(text)
    total = total_of(objective, toy)
    reference = formula(*per_token(toy))
    torch.testing.assert_close(total, reference, rtol=1e-12, atol=1e-12)
    total.backward()
    if objective.trains == "gate":
        toy.embedding.weight.requires_grad_(False)
        toy.core.requires_grad_(False)
        reference = formula(*per_token(toy))
    named = {name: parameter for name, parameter in toy.named_parameters() if parameter.requires_grad}
    expected = torch.autograd.grad(reference, list(named.values()), allow_unused=True)
    for (name, parameter), grad in zip(named.items(), expected, strict=True):
        if grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-12, msg=name)
    if objective.trains == "gate":
        assert toy.embedding.weight.grad is None
        assert toy.core.weight.grad is None


@pytest.mark.parametrize(
    "text",
    [
        "last",
        "every",
        "expected:beta=0.07",
        "expected:beta=0.2,beta_end=0.01,uniform_until=0.5",
        "expected:beta=0.2,prior=0.7",
        "calibrate:rule=as-written,sharpness=7,gamma=0.005",
        "calibrate:rule=unclamped,sharpness=7",
        "calibrate:rule=next-loop,sharpness=7",
        "calibrate:rule=best-later,sharpness=7",
        "random-depth:sampler=fixed,loops=3,backprop=none",
    ],
)
@pytest.mark.parametrize("first_loop", [None, FIRST], ids=["all-loops", "from-first-loop"])
def test_gradients_equal_central_differences(toy: Toy, text: str, first_loop: Tensor | None) -> None:
    objective = build_objective(text)
    parameters = list(toy.gate.parameters() if objective.trains == "gate" else toy.parameters())
    total_of(objective, toy, first_loop=first_loop, share=0.6).backward()
    step = 1e-6
    torch.manual_seed(1)
    for parameter in parameters:
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                values.append(total_of(objective, toy, first_loop=first_loop, share=0.6).item())
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        slope = (values[0] - values[1]) / (2 * step)
        assert (grad * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_truncated_window_equals_a_constant_prefix(toy: Toy) -> None:
    objective = build_objective("random-depth:sampler=fixed,loops=4,backprop=2")
    total_of(objective, toy).backward()
    with torch.no_grad():
        prefix = toy.run(TOKENS_IN, 2)[0][-1]
    start = toy.embedding(TOKENS_IN)
    state = prefix
    for _ in range(2):
        state = torch.tanh(toy.core(state) + start)
    reference = functional.cross_entropy(state[MASK] @ toy.embedding.weight.t(), TARGETS[MASK])
    expected = torch.autograd.grad(reference, [toy.embedding.weight, toy.core.weight])
    for parameter, grad in zip((toy.embedding.weight, toy.core.weight), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-12)


def test_share_scales_the_whole_loss(toy: Toy) -> None:
    objective = build_objective("expected")
    torch.testing.assert_close(total_of(objective, toy, share=0.3), total_of(objective, toy) * 0.3)
