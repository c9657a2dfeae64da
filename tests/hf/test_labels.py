"""`labels` give the chosen objective's loss, computed here once more from the logits of every loop."""

import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from loopwise.errors import ConfigError, InputError
from loopwise.hf import LoopedForCausalLM, wrap
from loopwise.objectives import ExpectedLoss, RandomDepth

tiny = runpy.run_path(str(Path(__file__).parents[1] / "models/naive_lm.py"))["tiny"]
TOKENS = torch.tensor([[3, 1, 22, 7, 7, 0], [5, 5, 9, 14, 2, 8]])


def pairs(labels: torch.Tensor) -> list[tuple[int, int]]:
    """(row, column) of the tokens that are asked for their successor."""
    return [(b, t) for b in range(len(labels)) for t in range(labels.shape[1] - 1) if labels[b, t + 1] != -100]


def naive_loss(model: LoopedForCausalLM, labels: torch.Tensor, loops: int, objective: str, beta: float = 0.1) -> float:
    """The definitions, token by token in Python floats."""
    with torch.no_grad():
        out = model.model(TOKENS, loops=loops, collect=("logits", "signals"))
    total = 0.0
    asked = pairs(labels)
    for b, t in asked:
        losses = [float(F.cross_entropy(out.loop_logits[r, b, t].double(), labels[b, t + 1])) for r in range(loops)]
        if objective == "last":
            total += losses[-1]
        elif objective == "every":
            total += sum(losses) / loops
        else:
            alive, leaving = 1.0, []
            for r in range(loops):
                hazard = float(out.loop_signals[r, b, t]) if r < loops - 1 else 1.0
                leaving.append(alive * hazard)
                alive *= 1 - hazard
            total += sum(p * loss for p, loss in zip(leaving, losses, strict=True))
            total += beta * sum(p * math.log(p) for p in leaving if p > 0)
    return total / len(asked)


@pytest.mark.parametrize("objective", ["last", "every", "expected", "expected:beta=0.03"])
@pytest.mark.parametrize("loops", [1, 3])
def test_the_loss_is_the_objectives(objective: str, loops: int) -> None:
    model = wrap(tiny("ouro", loops=loops))
    model.objective = objective
    labels = TOKENS.clone()
    labels[0, :3] = -100
    labels[1, 4] = -100
    beta = 0.03 if "beta" in objective else 0.1
    expected = naive_loss(model, labels, loops, objective.split(":")[0], beta)
    for training in (False, True):
        assert model.train(training)(TOKENS, labels=labels).loss.item() == pytest.approx(expected, abs=1e-10)
    told = model(TOKENS, labels=labels, num_loops=2).loss.item()
    assert told == pytest.approx(naive_loss(model, labels, 2, objective.split(":")[0], beta), abs=1e-10)


def test_the_default_is_stage_one_with_a_gate_and_the_last_loop_without() -> None:
    gated, plain = wrap(tiny("ouro", loops=2)), wrap(tiny("llama", loops=2))
    assert gated.objective == ExpectedLoss(loops=2)
    assert gated(TOKENS, labels=TOKENS).loss.item() == pytest.approx(
        naive_loss(gated, TOKENS, 2, "expected"), abs=1e-10
    )
    assert plain(TOKENS, labels=TOKENS).loss.item() == pytest.approx(naive_loss(plain, TOKENS, 2, "last"), abs=1e-10)
    plain.config.num_loops = 3
    assert plain.objective.loops == 3
    plain.objective = "last:loops=1"
    assert plain.objective.loops == 1
    with pytest.raises(ConfigError, match="needs an exit gate"):
        plain.objective = "expected"
    with pytest.raises(ConfigError, match="did you mean 'expected'"):
        gated.objective = "expectd"


def test_parts_of_a_step_add_up_to_the_whole() -> None:
    model = wrap(tiny("ouro"))
    labels = TOKENS.clone()
    labels[0, :4] = -100
    model(TOKENS, labels=labels).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    parts = [
        model(TOKENS[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=count).loss
        for row, count in ((0, torch.tensor(7)), (1, 7))
    ]
    sum(parts).backward()
    assert sum(parts).item() == pytest.approx(model(TOKENS, labels=labels).loss.item(), abs=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=0, atol=1e-12)


def test_padding_and_packed_documents_are_asked_nothing_across_their_borders() -> None:
    model = wrap(tiny("coda"))
    row = TOKENS[1:, :4]
    alone = model(row, labels=row).loss
    padded = torch.cat((torch.zeros(1, 2, dtype=torch.long), row), dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(model(padded, attention_mask=mask, labels=padded).loss, alone, rtol=0, atol=1e-12)
    packed = torch.cat((row, TOKENS[:1, :3]), dim=1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    second = model(TOKENS[:1, :3], labels=TOKENS[:1, :3]).loss
    together = model(packed, position_ids=positions, labels=packed).loss
    torch.testing.assert_close(together, (3 * alone + 2 * second) / 5, rtol=0, atol=1e-12)


def test_a_step_without_labels_is_no_loss() -> None:
    model = wrap(tiny("ouro"))
    out = model(TOKENS, labels=torch.full_like(TOKENS, -100), num_items_in_batch=0)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    with pytest.raises(InputError, match="labels of shape"):
        model(TOKENS, labels=TOKENS[:, 1:])


def test_training_leaves_the_logits_out_unless_asked() -> None:
    model = wrap(tiny("coda")).train()
    assert model(TOKENS, labels=TOKENS).logits is None
    model.logits_in_training = True
    torch.testing.assert_close(model(TOKENS, labels=TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-12)
    states = model(TOKENS, labels=TOKENS, output_hidden_states=True).hidden_states
    whole = model(TOKENS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(torch.stack(states), torch.stack(whole), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", ["ouro", "huginn"])
def test_recomputing_each_loop_gives_the_same_gradients(shape: str) -> None:
    model = wrap(tiny(shape)).train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
            assert model.gradient_checkpointing
        model.zero_grad()
        torch.manual_seed(5)
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match="each loop is recomputed"):
        model._set_gradient_checkpointing(True, every_n_layers=2)


def test_the_gate_alone_is_calibrated() -> None:
    model = wrap(tiny("ouro")).train()
    model.objective = "calibrate"
    model(TOKENS, labels=TOKENS).loss.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {"model.gate.weight", "model.gate.bias"}


def test_random_depth_and_start_come_from_torchs_generator() -> None:
    model = wrap(tiny("huginn", trained_loops=(1, 100))).train()
    model.objective = "random-depth:loops=3,backprop=1"

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(TOKENS, labels=TOKENS).loss.item()

    assert loss(0) == loss(0)
    assert len({loss(seed) for seed in range(4)}) == 4
    depths = {RandomDepth(loops=3).depth(seed=seed, step=0, micro=0) for seed in range(20)}
    assert len(depths) > 3
    model.eval()
    assert loss(0) == loss(1) == pytest.approx(naive_loss(model, TOKENS, 3, "last"), abs=1e-10)


def test_truncated_gradients_survive_autocast() -> None:
    model = wrap(tiny("ouro").float()).train()
    gradients = []
    for enabled in (False, True):
        model.objective = "last:loops=3,backprop=1"
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append(model.model.core[0].mlp.branch.down.weight.grad.clone())
    assert torch.nn.functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.98


def test_objectives_that_change_need_to_know_how_far_training_is() -> None:
    model = wrap(tiny("ouro")).train()
    model.objective = "expected:beta=0.2,beta_end=0.0"
    with pytest.raises(ConfigError, match="ObjectiveProgress"):
        model(TOKENS, labels=TOKENS)
    model.progress = 1.0
    assert model(TOKENS, labels=TOKENS).loss.item() == pytest.approx(
        naive_loss(model, TOKENS, 3, "expected", beta=0.0), abs=1e-10
    )
