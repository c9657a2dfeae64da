"""Configured as a plain Llama or OLMo-2, a LoopedLM is one."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from loopwise.models.looped_lm import LoopedLM

naive = runpy.run_path(str(Path(__file__).with_name("naive_lm.py")))
TOKENS = torch.tensor([[3, 1, 22, 7, 7, 0, 18, 4, 4, 2, 11, 9], [5, 5, 9, 14, 2, 8, 21, 20, 19, 0, 1, 6]])
SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NORMS = {
    "llama": {"input_layernorm": "attention.norm_in", "post_attention_layernorm": "mlp.norm_in"},
    "olmo2": {"post_attention_layernorm": "attention.norm_out", "post_feedforward_layernorm": "mlp.norm_out"},
}


def give_weights(theirs: torch.nn.Module, ours: LoopedLM) -> None:
    """Our random weights under their names, so that norms differ from 1."""
    mine = ours.state_dict()
    named = {
        "model.embed_tokens.weight": mine["embed.weight"],
        "model.norm.weight": mine["norm.weight"],
        "lm_head.weight": mine["head.weight"],
    }
    for layer in range(ours.config.core_layers):
        here, there = f"core.{layer}", f"model.layers.{layer}"
        q, k, v = mine[f"{here}.attention.branch.qkv.weight"].split([16, 8, 8])
        gate, up = mine[f"{here}.mlp.branch.gate_up.weight"].chunk(2)
        named |= {f"{there}.self_attn.{name}_proj.weight": part for name, part in (("q", q), ("k", k), ("v", v))}
        named |= {f"{there}.mlp.gate_proj.weight": gate, f"{there}.mlp.up_proj.weight": up}
        named[f"{there}.self_attn.o_proj.weight"] = mine[f"{here}.attention.branch.out.weight"]
        named[f"{there}.mlp.down_proj.weight"] = mine[f"{here}.mlp.branch.down.weight"]
        for norm, own in NORMS[theirs.config.model_type].items():
            named[f"{there}.{norm}.weight"] = mine[f"{here}.{own}.weight"]
        if theirs.config.model_type == "olmo2":
            for norm in ("q_norm", "k_norm"):
                named[f"{there}.self_attn.{norm}.weight"] = mine[f"{here}.attention.branch.{norm}.weight"]
    theirs.load_state_dict(named, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "llama3", "olmo2"])
def test_logits_are_theirs(kind: str, dtype: torch.dtype) -> None:
    if kind == "olmo2":
        theirs = Olmo2ForCausalLM(Olmo2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
        ours = naive["tiny"]("llama", norm="branch", qk_norm=True, norm_eps=1e-5, rotary_base=500.0)
    else:
        rope = LLAMA3 if kind == "llama3" else {"rope_type": "default", "rope_theta": 10_000.0}
        theirs = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope))
        ours = naive["tiny"]("llama", rotary_scaling=naive["STRETCH"] if kind == "llama3" else None)
    assert theirs.config.rms_norm_eps == ours.config.norm_eps
    theirs, ours = theirs.to(dtype).eval(), ours.to(dtype)
    give_weights(theirs, ours)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        logits = ours(TOKENS, loops=1).logits
    # Their rotary tables are float32 in every model.
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 if dtype == torch.float32 else 2e-6)
    assert float(expected.std()) > 0.1
