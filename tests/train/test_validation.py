"""Validation against full logits, and what it does where nothing counts."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from loopwise.train import validation
from loopwise.train.batches import Batch
from loopwise.train.guards import state_norms, token_correlation
from loopwise.train.validation import Validation, validate

tiny = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]


def make_batch(rows: int, seed: int, *, first_loop: bool) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets, chances = torch.randint(23, (3, rows, 5), generator=generator)
    return Batch(
        tokens=tokens,
        targets=targets,
        documents=torch.tensor([[0, 0, 1, 1, 1]] * rows),
        mask=chances < 17,
        first_loop=torch.randint(1, 4, (rows, 5), generator=generator) if first_loop else None,
    )


@pytest.mark.parametrize("first_loop", [False, True], ids=["all-loops", "from-first-loop"])
@pytest.mark.parametrize("shape", ["ouro", "huginn"])
def test_every_token_weighs_the_same_whatever_its_batch_or_chunk(
    shape: str, first_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "_CHUNK", 4)
    model = tiny(shape, core_layers=1)
    batches = [make_batch(rows, seed, first_loop=first_loop) for seed, rows in enumerate((2, 3))]
    found = validate(model, batches, (1, 3))
    losses: dict[int, list[float]] = {1: [], 3: []}
    hits: dict[int, list[float]] = {1: [], 3: []}
    shares: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in batches:
            out = model(batch.tokens, documents=batch.documents, loops=3, collect=("logits", "signals"))
            for loop in losses:
                mask = batch.mask if batch.first_loop is None else batch.mask & (batch.first_loop <= loop)
                logits, wanted = out.loop_logits[loop - 1][mask], batch.targets[mask]
                losses[loop] += functional.cross_entropy(logits, wanted, reduction="none").tolist()
                hits[loop] += (logits.argmax(-1) == wanted).double().tolist()
            if model.gate is not None:
                first, second = out.loop_signals[0], out.loop_signals[1]
                stacked = torch.stack([first, (1 - first) * second, (1 - first) * (1 - second)])
                shares.append(stacked[:, batch.mask])
    for loop in losses:
        assert found.losses[loop] == pytest.approx(sum(losses[loop]) / len(losses[loop]))
        assert found.accuracies[loop] == pytest.approx(sum(hits[loop]) / len(hits[loop]))
    if model.gate is None:
        assert found.exits is None
        assert found.mean_exit is None
    else:
        mean = torch.cat(shares, 1).mean(1)
        assert found.exits == pytest.approx(mean.tolist())
        assert found.mean_exit == pytest.approx(float(mean @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)))


def test_states_are_described_per_row() -> None:
    model = tiny("ouro", core_layers=1)
    batches = [make_batch(rows, seed, first_loop=False) for seed, rows in enumerate((1, 3))]
    found = validate(model, batches, (2,))
    with torch.no_grad():
        states = [model(b.tokens, documents=b.documents, loops=2, collect=("states",)).loop_states for b in batches]
    norms = [state_norms(s) for s in states]
    assert found.norms == pytest.approx([(norms[0][loop] + 3 * norms[1][loop]) / 4 for loop in range(2)])
    alike = [token_correlation(s[-1], b.mask) for s, b in zip(states, batches, strict=True)]
    assert found.correlation == pytest.approx((alike[0] + 3 * alike[1]) / 4)


def test_a_mean_over_nothing_is_not_a_number() -> None:
    batch = make_batch(2, 0, first_loop=False)
    late = Batch(**vars(batch) | {"first_loop": torch.full_like(batch.tokens, 3)})
    found = validate(tiny("ouro", core_layers=1), [late], (1, 3))
    assert math.isnan(found.losses[1])
    assert math.isnan(found.accuracies[1])
    assert found.losses[3] > 0


def test_figures_name_every_number() -> None:
    found = Validation(
        losses={1: 2.0, 4: 1.0}, accuracies={1: 0.25, 4: 0.5}, exits=[0.5, 0.5], correlation=0.1, norms=[1.0, 2.0]
    )
    assert found.figures(bytes_per_token=None) == {
        "validation_loss_loop_1": 2.0,
        "validation_loss_loop_4": 1.0,
        "validation_accuracy_loop_1": 0.25,
        "validation_accuracy_loop_4": 0.5,
        "validation_exit_loop": 1.5,
        "validation_exit_share_loop_1": 0.5,
        "validation_exit_share_loop_2": 0.5,
        "validation_token_correlation": 0.1,
        "validation_state_norm_loop_1": 1.0,
        "validation_state_norm_loop_2": 2.0,
    }
    assert found.figures(bytes_per_token=2.0)["validation_bits_per_byte_loop_4"] == pytest.approx(0.5 / math.log(2))
