"""One micro-batch against the plain formulas: full logits, nothing chunked or split, in float64."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from loopwise.models.accounting import count_flops
from loopwise.models.looped_lm import LoopedLM
from loopwise.objectives.base import LoopPlan, Objective
from loopwise.objectives.registry import build_objective
from loopwise.train.batches import Batch
from loopwise.train.step import (
    autocast,
    counted_tokens,
    executed_flops,
    micro_batch_loss,
    plan_step,
    read_hazards,
    training_start,
)

tiny = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]
LOOPS, ROWS, TOKENS = 3, 3, 5
Formula = Callable[[list[Tensor], list[Tensor], Batch], Tensor]


def make_batch(*, first_loop: bool = False, seed: int = 0) -> Batch:
    """Two documents in a row, some positions that do not count, and unequal numbers of those that do."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(23, (2, ROWS, TOKENS), generator=generator)
    mask = torch.tensor([[True, True, True, True, True], [False, True, True, False, True], [False] * 4 + [True]])
    return Batch(
        tokens=tokens,
        targets=targets,
        documents=torch.tensor([[0, 0, 0, 1, 1]] * ROWS),
        mask=mask,
        first_loop=torch.randint(1, LOOPS + 1, (ROWS, TOKENS), generator=generator) if first_loop else None,
    )


def unrolled(
    model: LoopedLM, batch: Batch, plan: LoopPlan, start: Tensor | None, prefix: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Token losses and hazards after each loop, from full logits. `prefix`: constants for the states without grad."""
    context = model.encode(batch.tokens, documents=batch.documents)
    state = model.initial_state(context, start)
    losses, hazards = [], []
    for loop in range(1, plan.loops + 1):
        frozen = plan.backprop is not None and loop <= plan.loops - plan.backprop
        with torch.set_grad_enabled(not frozen):
            state = model.step(state, context, loop)
        if frozen and prefix is not None:
            state = prefix[loop - 1]
        logits = model.readout(state, context)
        losses.append(functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none"))
        if model.gate is not None:
            hazards.append(model.hazard(state))
    return losses, hazards


def asked(batch: Batch, loop: int) -> Tensor:
    """1.0 where a token's loss counts after this loop."""
    counts = batch.mask if batch.first_loop is None else batch.mask & (batch.first_loop <= loop)
    return counts.double()


def last(losses: list[Tensor], hazards: list[Tensor], batch: Batch) -> Tensor:
    counts = asked(batch, len(losses))
    return (losses[-1] * counts).sum() / counts.sum()


def every(losses: list[Tensor], hazards: list[Tensor], batch: Batch) -> Tensor:
    counts = torch.stack([asked(batch, loop) for loop in range(1, LOOPS + 1)])
    per_token = (torch.stack(losses) * counts).sum(0) / counts.sum(0).clamp_min(1)
    return per_token.sum() / batch.mask.sum()


def exits(hazards: list[Tensor], batch: Batch) -> list[Tensor]:
    """Exit probabilities, given that one leaves where the loss counts."""
    left, shares = torch.ones_like(hazards[0]), []
    for loop, hazard in enumerate(hazards, 1):
        leaves = hazard * asked(batch, loop) if loop < len(hazards) else torch.ones_like(hazard)
        shares.append(left * leaves)
        left = left * (1 - leaves)
    return shares


def expected(losses: list[Tensor], hazards: list[Tensor], batch: Batch) -> Tensor:
    shares = exits(hazards, batch)
    total = torch.zeros_like(losses[0])
    for share, loss in zip(shares, losses, strict=True):
        total = total + share * loss + 0.07 * torch.where(share > 0, share * share.clamp_min(1e-300).log(), 0.0)
    return (total * batch.mask).sum() / batch.mask.sum()


def calibration(rule: str) -> Formula:
    def formula(losses: list[Tensor], hazards: list[Tensor], batch: Batch) -> Tensor:
        values = [loss.detach() for loss in losses]
        total = torch.zeros_like(values[0])
        for t in range(LOOPS):
            if rule in ("as-written", "unclamped"):
                gain = values[t - 1] - values[t] if t else None
                if gain is not None and rule == "as-written":
                    gain = gain.clamp_min(0)
            else:
                later = values[t + 1 : t + 2] if rule == "next-loop" else values[t + 1 :]
                gain = values[t] - torch.stack(later).amin(0) if later else None
            if gain is not None:
                label = torch.sigmoid(7.0 * (gain - 0.005))
                total = total + functional.binary_cross_entropy(1 - hazards[t], label, reduction="none")
        return (total * batch.mask).sum() / LOOPS / batch.mask.sum()

    return formula


def every_with_gate(losses: list[Tensor], hazards: list[Tensor], batch: Batch) -> Tensor:
    values = [loss.detach() for loss in losses]
    total = torch.zeros_like(values[0])
    for t in range(LOOPS - 1):
        label = torch.sigmoid(50.0 * (values[t] - torch.stack(values[t + 1 :]).amin(0) - 0.02))
        total = total + functional.binary_cross_entropy(1 - hazards[t], label, reduction="none")
    return every(losses, hazards, batch) + 0.3 * (total * batch.mask).sum() / LOOPS / batch.mask.sum()


OBJECTIVES: dict[str, Formula] = {
    "last:loops=3": last,
    "last:loops=3,backprop=2": last,
    "every:loops=3": every,
    "every:loops=3,backprop=1": every,
    "every:loops=3,gate=0.3,gamma=0.02": every_with_gate,
    "expected:loops=3,beta=0.07": expected,
    "expected:loops=3,beta=0.07,backprop=2": expected,
    "expected:loops=3,beta=0.3,beta_end=0.07,uniform_until=0.5": expected,
    "expected:loops=3,uniform_until=1": every,
    "random-depth:loops=3,sampler=fixed,backprop=2": last,
    "random-depth:loops=2,sampler=uniform,backprop=none": last,
} | {
    f"calibrate:loops=3,sharpness=7,gamma=0.005,rule={rule}": calibration(rule)
    for rule in ("as-written", "unclamped", "next-loop", "best-later")
}


def parameters(model: LoopedLM, objective: Objective) -> dict[str, Tensor]:
    """What the objective trains; the rest is frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(objective.trains == "model" or name.startswith("gate."))
        parameter.grad = None
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def model_for(objective: Objective) -> tuple[LoopedLM, Tensor | None]:
    """Ouro where there is a gate to teach, else Huginn from a random start that does not require grad."""
    if objective.needs_hazards:
        return tiny("ouro", core_layers=1), None
    model = tiny("huginn")
    start = training_start(model, make_batch(), seed=3, step=4, micro=1)
    assert start is not None
    assert not start.requires_grad
    return model, start


def gradients(total: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(named[name]) if g is None else g for name, g in zip(named, found, strict=True)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("first_loop", [False, True], ids=["all-loops", "from-first-loop"])
@pytest.mark.parametrize("text", OBJECTIVES)
def test_loss_and_gradients_equal_the_plain_formula(text: str, first_loop: bool, recompute: bool) -> None:
    objective = build_objective(text)
    plan = objective.plan(seed=0, step=0, micro=0)
    batch = make_batch(first_loop=first_loop)
    if objective.name in ("last", "random-depth") and not bool(asked(batch, plan.loops).any()):
        pytest.skip("nothing counts at this depth")
    model, start = model_for(objective)
    named = parameters(model, objective)
    total = micro_batch_loss(
        model, batch, objective, plan, progress=1.0 if "beta_end" in text else 0.9, start=start, recompute=recompute
    ).loss.total
    reference = OBJECTIVES[text](*unrolled(model, batch, plan, start), batch)
    torch.testing.assert_close(total, reference, rtol=1e-12, atol=1e-12)
    found, wanted = gradients(total, named), gradients(reference, named)
    for name in named:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12, msg=name)
    assert any(float(gradient.abs().max()) > 0 for gradient in found.values())


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("last:loops=3,backprop=1", last),
        ("random-depth:loops=3,sampler=fixed,backprop=2", last),
        ("every:loops=3,backprop=2", every),
        ("expected:loops=3,beta=0.07,backprop=1", expected),
    ],
)
def test_windows_equal_central_differences_with_a_constant_prefix(text: str, formula: Formula) -> None:
    objective = build_objective(text)
    plan = objective.plan(seed=0, step=0, micro=0)
    batch = make_batch()
    model, start = model_for(objective)
    named = parameters(model, objective)
    found = gradients(micro_batch_loss(model, batch, objective, plan, progress=0.9, start=start).loss.total, named)
    with torch.no_grad():
        context = model.encode(batch.tokens, documents=batch.documents)
        state, prefix = model.initial_state(context, start), []
        for loop in range(1, LOOPS + 1):
            state = model.step(state, context, loop)
            prefix.append(state)
    constants = torch.stack(prefix)
    generator = torch.Generator().manual_seed(1)
    step = 1e-5
    for name, parameter in named.items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                parameter.add_(direction, alpha=sign * step)
                values.append(float(formula(*unrolled(model, batch, plan, start, constants), batch)))
        slope = (values[0] - values[1]) / (2 * step)
        assert float((found[name] * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize(
    "text",
    [
        "last:loops=3",
        "every:loops=3",
        "expected:loops=3",
        "calibrate:loops=3,rule=unclamped",
        "random-depth:loops=3,sampler=fixed",
    ],
)
def test_two_micro_batches_are_one_large_batch(text: str) -> None:
    objective = build_objective(text)
    model = tiny("ouro", core_layers=1)
    named = parameters(model, objective)
    whole = make_batch(first_loop=True)
    halves = [
        Batch(**{name: None if value is None else value[rows] for name, value in vars(whole).items()})
        for rows in (slice(0, 1), slice(1, 3))
    ]
    plan = objective.plan(seed=0, step=0, micro=0)
    total = micro_batch_loss(model, whole, objective, plan, progress=0.9).loss.total
    wanted = gradients(total, named)
    works = plan_step(objective, halves, seed=0, step=0)
    assert sum(work.share for work in works) == pytest.approx(1)
    assert works[0].share != pytest.approx(0.5)
    parts = [
        micro_batch_loss(model, work.batch, objective, work.plan, progress=0.9, share=work.share).loss.total
        for work in works
    ]
    torch.testing.assert_close(parts[0] + parts[1], total, rtol=1e-12, atol=1e-12)
    found = [gradients(part, named) for part in parts]
    for name in named:
        torch.testing.assert_close(found[0][name] + found[1][name], wanted[name], rtol=1e-9, atol=1e-12, msg=name)


def test_shares_follow_the_tokens_that_count_at_the_drawn_depth() -> None:
    objective = build_objective("random-depth:loops=2,sampler=uniform")
    batches = [make_batch(first_loop=True, seed=seed) for seed in range(3)]
    works = plan_step(objective, batches, seed=5, step=7)
    assert [work.plan for work in works] == [objective.plan(seed=5, step=7, micro=micro) for micro in range(3)]
    counts = [float(asked(work.batch, work.plan.loops).sum()) for work in works]
    assert [work.share for work in works] == pytest.approx([count / sum(counts) for count in counts])


def test_a_gate_is_judged_at_every_token_whatever_its_first_loop() -> None:
    batch = make_batch(first_loop=True)
    late = Batch(**vars(batch) | {"first_loop": torch.full((ROWS, TOKENS), 99)})
    plan = LoopPlan(loops=3, read="all")
    assert counted_tokens(build_objective("every:loops=3"), late, plan) == 0
    assert counted_tokens(build_objective("calibrate:loops=3"), late, plan) == int(batch.mask.sum())


def test_a_step_in_which_nothing_counts_moves_nothing() -> None:
    objective = build_objective("expected:loops=3")
    batch = Batch(**vars(make_batch()) | {"mask": torch.zeros(ROWS, TOKENS, dtype=torch.bool)})
    model = tiny("ouro", core_layers=1)
    (work,) = plan_step(objective, [batch], seed=0, step=0)
    total = micro_batch_loss(model, work.batch, objective, work.plan, progress=0.9, share=work.share).loss.total
    assert total.item() == 0
    found = gradients(total, dict(model.named_parameters()))
    assert all(float(gradient.abs().max()) == 0 for gradient in found.values())


def test_starts_are_addressed_by_everything_that_should_change_them() -> None:
    model = tiny("huginn")
    batch = make_batch()
    first = training_start(model, batch, seed=0, step=0, micro=0)
    assert first is not None
    assert torch.equal(first, training_start(model, batch, seed=0, step=0, micro=0))
    for other in ({"seed": 1}, {"step": 1}, {"micro": 1}):
        found = training_start(model, batch, **{"seed": 0, "step": 0, "micro": 0} | other)
        assert found is not None
        assert not bool((found == first).any())
    assert not bool((first[0] == first[1]).any())
    assert not bool((first[:, 0] == first[:, 1]).any())
    assert training_start(tiny("ouro"), batch, seed=0, step=0, micro=0) is None


@pytest.mark.parametrize("backprop", [None, 1, 2])
def test_autocast_cuts_no_gradient_off_and_keeps_gates_wide(backprop: int | None) -> None:
    batch = make_batch()
    model = tiny("ouro", core_layers=1).float()
    named = dict(model.named_parameters())
    objective = build_objective("expected:loops=3", backprop=backprop)
    plan = objective.plan(seed=0, step=0, micro=0)
    wide = micro_batch_loss(model, batch, objective, plan, progress=0.9).loss.total
    with autocast("cpu", "bfloat16"):
        result = micro_batch_loss(model, batch, objective, plan, progress=0.9)
        assert result.inputs.hazards is not None
        assert result.inputs.hazards.dtype == torch.float32
    narrow = result.loss.total
    assert narrow.item() != wide.item()
    assert narrow.item() == pytest.approx(wide.item(), rel=2e-2)
    found, wanted = gradients(narrow, named), gradients(wide, named)
    for name in named:
        cosine = functional.cosine_similarity(found[name].flatten(), wanted[name].flatten(), dim=0)
        # A window shorter than the loops leaves Ouro's embeddings, which only start the first loop, without gradient.
        assert cosine.item() > 0.98 or not (found[name].any() or wanted[name].any()), name


def test_a_gate_under_autocast_equals_the_gate_without() -> None:
    model = tiny("ouro", core_layers=1).float()
    states = [torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    wanted = read_hazards(model, states)
    with autocast("cpu", "bfloat16"):
        found = read_hazards(model, states)
    assert found is not None
    assert wanted is not None
    assert torch.equal(found, wanted)
    assert read_hazards(tiny("huginn"), states) is None


def test_flops_count_what_runs_forward_and_where_gradient_flows() -> None:
    config = tiny("huginn").config
    flops = count_flops(config, context=8)
    f0, fr = flops.fixed, flops.per_loop
    settings = {"tokens": 10, "context": 16}
    assert executed_flops(config, LoopPlan(loops=4), trains="model", **settings) == 10 * (12 * fr + 3 * f0)
    window = LoopPlan(loops=6, backprop=2)
    assert executed_flops(config, window, trains="model", **settings) == 10 * (10 * fr + 3 * f0)
    everywhere = LoopPlan(loops=3, read="all")
    assert executed_flops(config, everywhere, trains="model", **settings) == 10 * (9 * fr + 9 * f0)
    assert executed_flops(config, everywhere, trains="gate", **settings) == 10 * (3 * fr + 3 * f0)
