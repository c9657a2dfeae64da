"""Adapters on the core: one set for all loops, trained through all of them, merged into the family's own tensors."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import loopwise
from loopwise.errors import ConfigError
from loopwise.hf import CORE_LINEAR, LoopedForCausalLM, wrap

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
tiny = runpy.run_path(str(TESTS / "models/naive_lm.py"))["tiny"]
TOKENS = torch.tensor([[3, 1, 22, 7, 7, 0], [5, 5, 9, 14, 2, 8]])


def adapted(model: LoopedForCausalLM, *, targets: str | list[str] = CORE_LINEAR, **options: object) -> PeftModel:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)
    found = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return found


def test_exactly_the_cores_matrices_learn() -> None:
    model = adapted(wrap(tiny("coda")))
    learning = {name.split(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    base = "base_model.model.model.core"
    branches = ("attention.branch.qkv", "attention.branch.out", "mlp.branch.gate_up", "mlp.branch.down")
    assert learning == {f"{base}.{layer}.{branch}" for layer in (0, 1) for branch in branches}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_the_gradient_is_the_sum_over_loops() -> None:
    """One backward pass through three loops, against one in which each loop has an adapter of its own."""
    model = adapted(wrap(tiny("ouro", loops=3)))
    model.base_model.model.objective = "every"
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    looped = model.base_model.model.model
    together = {name: parameter.grad for name, parameter in looped.named_parameters() if "lora_" in name}

    copies = [
        {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in looped.named_parameters()
            if "lora_" in name
        }
        for _ in range(3)
    ]
    context = looped.encode(TOKENS)
    state = looped.initial_state(context)
    losses = []

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = looped

        def forward(self, state: torch.Tensor, loop: int) -> torch.Tensor:
            return self.inner.step(state, context, loop)

    for loop, own in enumerate(copies, 1):
        state = functional_call(Step(), {f"inner.{name}": tensor for name, tensor in own.items()}, (state, loop))
        logits = looped.readout(state, context)[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()))
    torch.stack(losses).mean().backward()
    for name, gradient in together.items():
        parts = [own[name].grad for own in copies]
        assert all(part.abs().max() > 1e-6 for part in parts)
        torch.testing.assert_close(gradient, sum(parts), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-6), ("float64", 1e-10)])
@pytest.mark.parametrize("family", ["ouro-tiny", "huginn-tiny"])
def test_merged_weights_are_a_plain_checkpoint_that_says_the_same(
    family: str, dtype: str, tolerance: float, tmp_path: Path
) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(GOLDEN / family, dtype=dtype, num_loops=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.1)
        unmerged = model(input_ids=TOKENS).logits
        untouched = AutoModelForCausalLM.from_pretrained(GOLDEN / family, dtype=dtype, num_loops=2)(TOKENS).logits
        assert (unmerged - untouched).abs().max() > 1e-3
        with pytest.raises(ConfigError, match=r"model\.merge_and_unload\(\) first"):
            model.base_model.model.save_pretrained(tmp_path)
        qkv = model.base_model.model.model.core[1].attention.branch.qkv
        expected = qkv.weight.double() + 2 * qkv.lora_B.default.weight.double() @ qkv.lora_A.default.weight.double()
        model.merge_and_unload().save_pretrained(tmp_path)
        again = loopwise.load(tmp_path)
        written = again.core[1].attention.branch.qkv.weight.double()
        torch.testing.assert_close(written, expected, rtol=0, atol=1e-6 if dtype == "float32" else 1e-12)
        # Root mean squares: in float32 single logits differ by the rounding of six layers.
        assert (again(TOKENS).logits - unmerged).square().mean().sqrt() <= tolerance * unmerged.square().mean().sqrt()
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(GOLDEN / family / "model.safetensors").keys()


def test_an_adapter_is_saved_alone_and_found_again(tmp_path: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(GOLDEN / "ouro-tiny"))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    with torch.no_grad():
        expected = model(input_ids=TOKENS, num_loops=2).logits
        for again in (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(GOLDEN / "ouro-tiny"), tmp_path),
            AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        ):
            assert torch.equal(again(input_ids=TOKENS, num_loops=2).logits, expected)
    options = {"max_new_tokens": 4, "num_loops": 2, "do_sample": False}
    assert torch.equal(model.generate(input_ids=TOKENS, **options), again.generate(input_ids=TOKENS, **options))


def test_a_whole_head_can_be_trained_beside_the_adapters(tmp_path: Path) -> None:
    model = adapted(wrap(tiny("ouro")), modules_to_save=["head"])
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    head = model.base_model.model.model.head.modules_to_save["default"].weight
    assert head.grad.abs().max() > 0
    with torch.no_grad():
        head.add_(1.0)
        changed = model(input_ids=TOKENS).logits
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, changed, rtol=0, atol=1e-10)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(loopwise.load(tmp_path)(TOKENS).logits, changed, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("shape", "target"), [("ouro", "gate"), ("ouro", "head"), ("huginn", "embed")])
def test_adapters_that_would_be_ignored_are_refused(shape: str, target: str) -> None:
    model = adapted(wrap(tiny(shape)), targets=[target])
    with pytest.raises(ConfigError, match=f"an adapter on '{target}' would be ignored"):
        model(input_ids=TOKENS)
