"""Ouro / LoopLM checkpoints (arXiv 2510.25741; model_type `ouro`).

The final norm ends every loop, and the normed state is what the head and the gate read and what is fed back. A layer
has four norms with misleading names: `input_layernorm` and `input_layernorm_2` stand around attention,
`post_attention_layernorm` and `post_attention_layernorm_2` around the MLP.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from loopwise.errors import CheckpointError, ConfigError
from loopwise.hub.family import Entry, SpecialTokens, need, optional, section, special_ids, trained_range
from loopwise.models.config import LoopedLMConfig

_SMOLLM2_VOCABULARY = 49152
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Ouro:
    """Reads and writes Ouro's config.json and tensor names."""

    name = "ouro"
    chat_template: str | None = _CHATML
    chat_marks: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")

    def reads(self, raw: Mapping[str, Any]) -> bool:
        return raw.get("model_type") == "ouro"

    def read_config(self, raw: Mapping[str, Any], tensors: Collection[str] | None) -> LoopedLMConfig:
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"config.json: hidden_act={raw['hidden_act']!r}; Ouro checkpoints use 'silu'")
        if raw.get("use_sliding_window"):
            raise CheckpointError("config.json: use_sliding_window=true; no published Ouro uses it, and it is not read")
        if set(raw.get("layer_types") or ()) - {"full_attention"}:
            raise CheckpointError("config.json: layer_types other than full_attention; no published Ouro has them")
        rope = section(raw, "rope_parameters")
        if section(raw, "rope_scaling").get("rope_type", rope.get("rope_type", "default")) != "default":
            raise CheckpointError("config.json: scaled rotary positions; Ouro checkpoints use plain ones")
        heads, width = need(raw, "num_attention_heads", int), need(raw, "hidden_size", int)
        loops = need(raw, "total_ut_steps", int)
        return LoopedLMConfig(
            vocab_size=need(raw, "vocab_size", int),
            width=width,
            heads=heads,
            kv_heads=optional(raw, "num_key_value_heads", heads, int),
            head_width=optional(raw, "head_dim", width // max(heads, 1), int),
            mlp_width=need(raw, "intermediate_size", int),
            core_layers=need(raw, "num_hidden_layers", int),
            loops=loops,
            trained_loops=trained_range(raw, (1, loops)),
            anytime=optional(section(raw, "loopwise"), "anytime", True, bool),
            max_positions=need(raw, "max_position_embeddings", int),
            norm="pre_branch",
            norm_eps=optional(raw, "rms_norm_eps", 1e-6, float),
            loop_norm=True,
            final_norm=False,
            rotary="half",
            rotary_base=optional(raw, "rope_theta", optional(rope, "rope_theta", 10_000.0, float), float),
            tied_head=optional(raw, "tie_word_embeddings", False, bool),
            gate=True,
        )

    def write_config(self, config: LoopedLMConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
        fits = (
            config.norm == "pre_branch"
            and config.loop_norm
            and not (config.final_norm or config.coda_norm or config.qk_bias or config.qk_norm)
            and config.rotary == "half"
            and config.rotary_scaling is None
            and (config.start, config.injection, config.embed_scale) == ("embeddings", "none", 1.0)
            and config.prelude_layers == config.coda_layers == 0
            and config.gate
        )
        if not fits:
            raise ConfigError("this model's shape does not fit an Ouro checkpoint; type: family=loopwise")
        if self.reads(raw) and self.read_config(raw, None) == config:
            return dict(raw)
        rope = section(raw, "rope_parameters")
        return {
            **raw,
            **({"rope_parameters": rope | {"rope_theta": config.rotary_base}} if rope else {}),
            **({"layer_types": ["full_attention"] * config.core_layers} if raw.get("layer_types") else {}),
            "model_type": "ouro",
            "architectures": ["OuroForCausalLM"],
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.core_layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rotary_base,
            "tie_word_embeddings": config.tied_head,
            "total_ut_steps": config.loops,
            "early_exit_threshold": raw.get("early_exit_threshold", 1.0),
            "loopwise": {"trained_loops": list(config.trained_loops), "anytime": config.anytime},
        }

    def entries(self, config: LoopedLMConfig) -> list[Entry]:
        d, f, k = config.width, config.mlp_width, config.head_width
        q, kv = config.heads * k, config.kv_heads * k
        entries = [Entry(name="model.embed_tokens.weight", parameter="embed.weight", shape=(config.vocab_size, d))]
        for i in range(config.core_layers):
            theirs, ours = f"model.layers.{i}", f"core.{i}"
            fused, gated = f"{ours}.attention.branch.qkv.weight", f"{ours}.mlp.branch.gate_up.weight"
            for name, parameter, shape, start in (
                ("self_attn.q_proj", fused, (q, d), 0),
                ("self_attn.k_proj", fused, (kv, d), q),
                ("self_attn.v_proj", fused, (kv, d), q + kv),
                ("self_attn.o_proj", f"{ours}.attention.branch.out.weight", (d, q), 0),
                ("mlp.gate_proj", gated, (f, d), 0),
                ("mlp.up_proj", gated, (f, d), f),
                ("mlp.down_proj", f"{ours}.mlp.branch.down.weight", (d, f), 0),
                ("input_layernorm", f"{ours}.attention.norm_in.weight", (d,), 0),
                ("input_layernorm_2", f"{ours}.attention.norm_out.weight", (d,), 0),
                ("post_attention_layernorm", f"{ours}.mlp.norm_in.weight", (d,), 0),
                ("post_attention_layernorm_2", f"{ours}.mlp.norm_out.weight", (d,), 0),
            ):
                stop = start + shape[0]
                entries.append(
                    Entry(name=f"{theirs}.{name}.weight", parameter=parameter, shape=shape, start=start, stop=stop)
                )
        entries += [
            Entry(name="model.norm.weight", parameter="norm.weight", shape=(d,)),
            Entry(name="model.early_exit_gate.weight", parameter="gate.weight", shape=(1, d)),
            Entry(name="model.early_exit_gate.bias", parameter="gate.bias", shape=(1,)),
        ]
        if not config.tied_head:
            entries.append(Entry(name="lm_head.weight", parameter="head.weight", shape=(config.vocab_size, d)))
        return entries

    def spellings(self, config: LoopedLMConfig) -> dict[str, tuple[str, ...]]:
        return {"model.embed_tokens.weight": ("lm_head.weight",)} if config.tied_head else {}

    def passengers(self, config: LoopedLMConfig) -> dict[str, tuple[int, ...]]:
        return {}

    def check_passenger(self, config: LoopedLMConfig, name: str, tensor: Tensor) -> None:
        return None

    def special_tokens(self, raw: Mapping[str, Any]) -> SpecialTokens:
        """Published configs say bos = eos = pad = 0; chat needs <|im_start|> = 1 and <|im_end|> = 2."""
        stated = special_ids(raw)
        if raw.get("vocab_size") == _SMOLLM2_VOCABULARY and set(stated.eos) <= {0}:
            return SpecialTokens(bos=1, eos=(2, 0), pad=0)
        return stated
