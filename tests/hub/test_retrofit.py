"""A retrofitted model with one loop is transformers' own model with only the kept layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopwise.errors import CheckpointError, ConfigError, NotFoundError
from loopwise.hub.checkpoints import load, save
from loopwise.hub.retrofit import Split, choose_split, parse_layers, retrofit
from loopwise.nn.rotary import RotaryScaling, rotary_tables

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TOKENS = torch.arange(34).reshape(2, 17) * 5 % 97


def plain_model(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of transformers in which every weight matters."""
    from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(3)
    values = SHAPE | {"rope_parameters": STRETCHED if kind == "llama" else {"rope_type": "default", "rope_theta": 1e5}}
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**(values | {"tie_word_embeddings": True} | changes)))
    else:
        model = Olmo2ForCausalLM(Olmo2Config(**(values | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                1 + 0.2 * torch.randn_like(parameter) if "norm" in name else 0.2 * torch.randn_like(parameter)
            )
    return model.to(dtype).eval()


class WideRotary(torch.nn.Module):
    """Tables that do not fall back to float32; that they are the right ones, the float32 comparison shows."""

    def __init__(self, base: float, scaling: RotaryScaling | None) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = rotary_tables(position_ids, 8, self.base, torch.float64, self.scaling)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def widen(model: Any) -> Any:
    """transformers computes norms and rotations in float32 always; for a comparison in float64 they are replaced."""
    stretched = RotaryScaling(factor=8.0, original_positions=16)
    llama = model.config.model_type == "llama"
    model.model.rotary_emb = WideRotary(500_000.0, stretched) if llama else WideRotary(1e5, None)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                wide = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                wide.weight = child.weight
                setattr(parent, name, wide)
    return model


def only_layers(model: Any, kept: tuple[int, ...]) -> Any:
    model.model.layers = torch.nn.ModuleList([model.model.layers[layer] for layer in kept])
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    return model


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_one_loop_is_the_source_without_the_dropped_layers(
    kind: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    source = plain_model(kind, dtype)
    source.save_pretrained(tmp_path / "source")
    split = Split(prelude=(0, 1), core=(3, 4), coda=(5,))
    model = retrofit(tmp_path / "source", split=split)
    assert model.embed.weight.dtype == dtype
    if dtype == torch.float64:
        source = widen(source)
    expected = only_layers(source, split.kept)(TOKENS, use_cache=False).logits
    assert (expected - source(TOKENS.flip(1), use_cache=False).logits).abs().max() > 0.1
    for start in ("zero", 7, None):
        assert torch.allclose(model(TOKENS, start=start).logits, expected, rtol=0, atol=tolerance)
    # The adapter ignores the state, so before training further loops change nothing.
    assert torch.allclose(model(TOKENS, loops=1).logits, expected, rtol=0, atol=tolerance)

    save(model, tmp_path / "looped")
    raw = json.loads((tmp_path / "looped" / "config.json").read_text())
    assert raw["model_type"] == "huginn_raven"
    assert [raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [1, 2, 0]
    again = load(tmp_path / "looped")
    assert again.config == model.config
    assert all(torch.equal(first, second) for first, second in zip(again.parameters(), model.parameters(), strict=True))
    assert torch.equal(again(TOKENS, start=7).logits, model(TOKENS, start=7).logits)


@torch.no_grad()
def test_the_adapter_can_learn_to_use_the_state(tmp_path: Path) -> None:
    plain_model("llama").save_pretrained(tmp_path)
    model = retrofit(tmp_path, split=(2, 2, 2), loops=3)
    assert model.config.loops == 3
    before = model(TOKENS, start=1).logits
    model.get_parameter("adapter.weight")[:, :32] += 0.1 * torch.eye(32)
    assert not torch.allclose(model(TOKENS, start=1).logits, before, atol=1e-3)
    assert not torch.allclose(model(TOKENS, start=1).logits, model(TOKENS, start=1, loops=1).logits, atol=1e-3)


def test_heads_stay_tied_or_untied_as_they_were(tmp_path: Path) -> None:
    for tied in (True, False):
        folder = tmp_path / str(tied)
        plain_model("llama", tie_word_embeddings=tied).save_pretrained(folder)
        assert (retrofit(folder, split=(1, 2, 1)).head is None) == tied


def test_the_older_spelling_of_config_json(tmp_path: Path) -> None:
    plain_model("llama").save_pretrained(tmp_path)
    new = retrofit(tmp_path, split=(1, 2, 1)).config
    raw = json.loads((tmp_path / "config.json").read_text())
    stretched = raw.pop("rope_parameters")
    raw["rope_theta"] = stretched.pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": stretched}))
    assert retrofit(tmp_path, split=(1, 2, 1)).config == new
    assert new.rotary_scaling is not None
    assert new.rotary_base == 500_000.0


def test_the_authors_choice_of_layers() -> None:
    assert str(choose_split(22, 4, 8, 4)) == "0-3 / 10-17 / 18-21"
    assert str(choose_split(16, 4, 6, 4)) == "0-3 / 6-11 / 12-15"
    assert str(choose_split(16, 2, 4, 2)) == "0-1 / 10-13 / 14-15"
    assert str(choose_split(4, 0, 4, 0)) == "none / 0-3 / none"


def test_lists_of_layers() -> None:
    assert parse_layers("0-3") == (0, 1, 2, 3)
    assert parse_layers("0,2,5-7") == (0, 2, 5, 6, 7)
    for wrong in ("", "a", "3-", "1;2", "-1"):
        with pytest.raises(ConfigError, match="is no list of layers; type for example 10-17"):
            parse_layers(wrong)


@pytest.mark.parametrize("sizes", [(3, 3, 3), (4, 0, 2), (-1, 2, 2)])
def test_sizes_that_the_source_does_not_have(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=r"the source has 8 layers; allowed are"):
        choose_split(8, *sizes)


def test_splits_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="each may be used once, in the order prelude, core, coda"):
        Split(prelude=(0, 1), core=(1, 2), coda=())
    with pytest.raises(ConfigError, match="in the order"):
        Split(prelude=(4,), core=(1, 2), coda=())
    with pytest.raises(ConfigError, match="the core has no layers"):
        Split(prelude=(0,), core=(), coda=(1,))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type='gpt2' cannot be retrofitted; allowed are llama, olmo2"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu' can be retrofitted"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"sliding_window": 128}, "sliding_window=128"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"layer_types": ["full_attention"] * 5 + ["sliding_attention"]}, "layer_types differs from layer to layer"),
    ({"residual_scales": [1, 1, 1, 1, 1, 0.5]}, "residual_scales differs from layer to layer"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary positions of type 'yarn'"),
    ({"num_hidden_layers": 7}, "missing"),
    ({"hidden_size": 40}, "misshapen"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_a_loop_could_not_keep(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    plain_model("llama").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        retrofit(tmp_path, split=(1, 2, 1))
    assert "\n" not in str(caught.value)


def test_tensors_are_checked_in_dropped_layers_too(tmp_path: Path) -> None:
    plain_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.layers.2.extra.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected \(model.layers.2.extra.weight\)"):
        retrofit(tmp_path, split=(1, 2, 1))
    inverse = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for layer in range(6)}
    save_file(tensors | inverse, tmp_path / "model.safetensors")
    retrofit(tmp_path, split=(1, 2, 1))


def test_layers_and_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        retrofit(tmp_path / "none", split=(1, 1, 1))
    plain_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="layer 9 was asked for; the source has layers 0 to 5"):
        retrofit(tmp_path, split=Split(prelude=(0,), core=(1,), coda=(9,)))
