"""Huginn and the retrofitted Raven models (arXiv 2502.05171, 2511.07384; model_type `huginn_raven`).

Three kinds share the model_type and differ in their code, which the stored names tell apart:
Huginn itself has four norms per block and applies the final norm before the coda and again after it; a retrofitted
Llama (or TinyLlama) has plain pre-norm blocks; a retrofitted OLMo-2 normalises branch outputs, queries and keys. The
retrofitted kinds rotate halves and go into the coda without a norm.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from loopwise.errors import CheckpointError, ConfigError
from loopwise.hub.family import Entry, SpecialTokens, need, optional, section, special_ids, trained_range
from loopwise.models.config import LoopedLMConfig
from loopwise.nn.block import NormLayout
from loopwise.nn.rotary import RotaryScaling, rotary_tables

Kind = Literal["huginn", "llama", "olmo"]
_NORMS: dict[Kind, NormLayout] = {"huginn": "pre_post", "llama": "pre", "olmo": "branch"}
_HUGINN_VOCABULARY = 65536


class Huginn:
    """Reads and writes Huginn's and the retrofitted models' config.json and tensor names."""

    name = "huginn_raven"
    chat_template: str | None = None
    chat_marks: tuple[str, ...] = ()

    def reads(self, raw: Mapping[str, Any]) -> bool:
        return raw.get("model_type") == "huginn_raven"

    def read_config(self, raw: Mapping[str, Any], tensors: Collection[str] | None) -> LoopedLMConfig:
        for key, allowed in (
            ("injection_type", "linear"),
            ("state_init", "like-init"),
            ("nonlin_name", "SiLU"),
            ("mlp_class_name", "GatedMLP"),
            ("initial_state_mode", "random"),
            ("test_time_noise", 0),
        ):
            if raw.get(key, allowed) != allowed:
                raise CheckpointError(f"config.json: {key}={raw[key]!r}; only {allowed!r} is read")
        kind = _kind(raw, tensors)
        width = need(raw, "n_embd", int)
        heads = optional(raw, "n_heads", None, int) or need(raw, "num_attention_heads", int)
        sizes = section(raw, "init_values")
        std = optional(sizes, "std", math.sqrt(2 / (5 * max(width, 1))), float)
        scale = optional(sizes, "embed_scale", math.sqrt(max(width, 1)), float)
        loops = need(raw, "mean_recurrence", int)
        base, scaling = (need(raw, "rope_base", float), None) if kind == "huginn" else llama_rotary(raw, "rope_base")
        return LoopedLMConfig(
            vocab_size=optional(raw, "padded_vocab_size", None, int) or need(raw, "vocab_size", int),
            width=width,
            heads=heads,
            kv_heads=heads if kind == "huginn" else optional(raw, "num_key_value_heads", heads, int),
            head_width=optional(raw, "head_dim", width // max(heads, 1), int),
            mlp_width=need(raw, "intermediate_size", int),
            prelude_layers=need(raw, "n_layers_in_prelude", int),
            core_layers=need(raw, "n_layers_in_recurrent_block", int),
            coda_layers=need(raw, "n_layers_in_coda", int),
            loops=loops,
            # Depth was drawn at random around the mean (log-normal Poisson); 2 means covers 95% of the draws.
            trained_loops=trained_range(raw, (1, 2 * loops)),
            anytime=True,
            max_positions=need(raw, "block_size", int),
            norm=_NORMS[kind],
            norm_eps=need(raw, "norm_eps", float),
            coda_norm=kind == "huginn",
            rotary="interleaved" if kind == "huginn" else "half",
            rotary_base=base,
            rotary_scaling=scaling,
            qk_bias=optional(raw, "qk_bias", False, bool),
            qk_norm=kind == "olmo",
            embed_scale=scale,
            tied_head=optional(raw, "tie_embeddings", True, bool),
            start="normal",
            start_std=std * scale,
            injection="adapter",
            adapter_bias=optional(raw, "bias", False, bool),
        )

    def write_config(self, config: LoopedLMConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
        kinds = [kind for kind, norm in _NORMS.items() if norm == config.norm]
        fits = (
            bool(kinds)
            and (config.injection, config.start) == ("adapter", "normal")
            and config.final_norm
            and not (config.loop_norm or config.gate)
            and config.coda_norm == (kinds[0] == "huginn")
            and config.rotary == ("interleaved" if kinds[0] == "huginn" else "half")
            and config.qk_norm == (kinds[0] == "olmo")
        )
        if not fits:
            raise ConfigError("this model's shape does not fit a huginn_raven checkpoint; type: family=loopwise")
        if self.reads(raw) and self.read_config(raw, self._telling_names(kinds[0])) == config:
            return dict(raw)
        written = {
            **raw,
            "model_type": "huginn_raven",
            "architectures": ["RavenForCausalLM"],
            "vocab_size": config.vocab_size,
            "padded_vocab_size": config.vocab_size,
            "n_embd": config.width,
            "n_heads": config.heads,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            "n_layers": config.layers,
            "intermediate_size": config.mlp_width,
            "n_layers_in_prelude": config.prelude_layers,
            "n_layers_in_recurrent_block": config.core_layers,
            "n_layers_in_coda": config.coda_layers,
            "mean_recurrence": config.loops,
            "block_size": config.max_positions,
            "max_position_embeddings": config.max_positions,
            "norm_eps": config.norm_eps,
            "rope_base": config.rotary_base,
            "qk_bias": config.qk_bias,
            "bias": config.adapter_bias,
            "tie_embeddings": config.tied_head,
            "injection_type": "linear",
            "state_init": "like-init",
            "init_values": section(raw, "init_values")
            | {"std": config.start_std / config.embed_scale, "embed_scale": config.embed_scale},
            "loopwise": {"trained_loops": list(config.trained_loops), "kind": kinds[0]},
        }
        if kinds[0] != "huginn":
            written["rope_theta"] = config.rotary_base
        if config.rotary_scaling is not None:
            scaling = config.rotary_scaling
            written["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_positions,
            }
        return written

    def entries(self, config: LoopedLMConfig) -> list[Entry]:
        d, f, k = config.width, config.mlp_width, config.head_width
        q, kv = config.heads * k, config.kv_heads * k
        entries = [Entry(name="transformer.wte.weight", parameter="embed.weight", shape=(config.vocab_size, d))]
        for theirs_stack, ours_stack, layers in (
            ("prelude", "prelude", config.prelude_layers),
            ("core_block", "core", config.core_layers),
            ("coda", "coda", config.coda_layers),
        ):
            for i in range(layers):
                theirs, ours = f"transformer.{theirs_stack}.{i}", f"{ours_stack}.{i}"
                pairs: list[tuple[str, str, tuple[int, ...]]] = [
                    ("attn.Wqkv.weight", "attention.branch.qkv.weight", (q + 2 * kv, d)),
                    ("attn.proj.weight", "attention.branch.out.weight", (d, q)),
                    ("mlp.fc.weight", "mlp.branch.gate_up.weight", (2 * f, d)),
                    ("mlp.proj.weight", "mlp.branch.down.weight", (d, f)),
                    *((theirs_norm, ours_norm, (d,)) for theirs_norm, ours_norm in _block_norms(config.norm)),
                ]
                if config.qk_bias:
                    pairs.append(("attn.qk_bias", "attention.branch.qk_bias", (2, 1, config.heads, k)))
                if config.qk_norm:
                    pairs.append(("attn.q_norm.weight", "attention.branch.q_norm.weight", (q,)))
                    pairs.append(("attn.k_norm.weight", "attention.branch.k_norm.weight", (kv,)))
                entries += [
                    Entry(name=f"{theirs}.{their}", parameter=f"{ours}.{our}", shape=shape)
                    for their, our, shape in pairs
                ]
        entries.append(Entry(name="transformer.adapter.weight", parameter="adapter.weight", shape=(d, 2 * d)))
        if config.adapter_bias:
            entries.append(Entry(name="transformer.adapter.bias", parameter="adapter.bias", shape=(d,)))
        entries.append(Entry(name="transformer.ln_f.weight", parameter="norm.weight", shape=(d,)))
        if not config.tied_head:
            entries.append(Entry(name="lm_head.weight", parameter="head.weight", shape=(config.vocab_size, d)))
        return entries

    def spellings(self, config: LoopedLMConfig) -> dict[str, tuple[str, ...]]:
        return {"transformer.wte.weight": ("lm_head.weight",)} if config.tied_head else {}

    def passengers(self, config: LoopedLMConfig) -> dict[str, tuple[int, ...]]:
        return {"freqs_cis": (1, config.max_positions, 1, config.head_width // 2, 2)}

    def check_passenger(self, config: LoopedLMConfig, name: str, tensor: Tensor) -> None:
        positions = torch.arange(config.max_positions)
        tables = rotary_tables(positions, config.head_width, config.rotary_base, torch.float32, config.rotary_scaling)
        if not torch.allclose(torch.stack(tables, dim=-1)[None, :, None], tensor.float(), atol=1e-3):
            raise CheckpointError(f"{name} is not the rotary table of rope_base={config.rotary_base}; mend config.json")

    def special_tokens(self, raw: Mapping[str, Any]) -> SpecialTokens:
        """Huginn's published config leaves the ids to its code: bos 65504, eos 65505, end of turn 65508, pad 65509."""
        stated = special_ids(raw)
        if raw.get("vocab_size") == _HUGINN_VOCABULARY and not stated.eos:
            return SpecialTokens(bos=65504, eos=(65505, 65508), pad=65509)
        return stated

    def _telling_names(self, kind: Kind) -> tuple[str, ...]:
        return {
            "huginn": ("transformer.core_block.0.norm_4.weight",),
            "llama": ("transformer.core_block.0.norm_2.weight",),
            "olmo": ("transformer.core_block.0.attn.q_norm.weight",),
        }[kind]


def _kind(raw: Mapping[str, Any], tensors: Collection[str] | None) -> Kind:
    """Which of the three kinds: from the stored names, else from what config.json lets slip."""
    if tensors is not None:
        if any(name.endswith(".attn.q_norm.weight") for name in tensors):
            return "olmo"
        return "huginn" if any(name.endswith(".norm_4.weight") for name in tensors) else "llama"
    own = section(raw, "loopwise").get("kind")
    if own in _NORMS:
        return own  # type: ignore[no-any-return]  # checked against the table just above
    code = str(raw.get("auto_map", ""))
    for kind in ("olmo", "llama"):
        if f"minimal_{kind}" in code:
            return kind
    return "huginn" if raw.get("qk_bias", False) else "llama"


def _block_norms(norm: NormLayout) -> list[tuple[str, str]]:
    if norm == "pre_post":
        return [
            ("norm_1.weight", "attention.norm_in.weight"),
            ("norm_2.weight", "attention.norm_out.weight"),
            ("norm_3.weight", "mlp.norm_in.weight"),
            ("norm_4.weight", "mlp.norm_out.weight"),
        ]
    side = "norm_in" if norm == "pre" else "norm_out"
    return [("norm_1.weight", f"attention.{side}.weight"), ("norm_2.weight", f"mlp.{side}.weight")]


def llama_rotary(raw: Mapping[str, Any], base_key: str = "rope_theta") -> tuple[float, RotaryScaling | None]:
    """Base and stretching of the rotary positions of a Llama-type config.json, in the old and the new spelling.

    Args:
        base_key: where the base stands when neither spelling of `rope_theta` is there.

    Raises:
        CheckpointError: for another kind of stretching than Llama 3's.
    """
    new = section(raw, "rope_parameters")
    old = section(raw, "rope_scaling")
    base = raw.get("rope_theta", new.get("rope_theta", raw.get(base_key)))
    given = old or new
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"config.json: rotary positions of type {kind!r}; only 'llama3' or 'default' is read")
    scaling = None
    if kind == "llama3":
        scaling = RotaryScaling(
            factor=need(given, "factor", float),
            low_frequency_factor=need(given, "low_freq_factor", float),
            high_frequency_factor=need(given, "high_freq_factor", float),
            original_positions=need(given, "original_max_position_embeddings", int),
        )
    return need({"rope_theta": 10_000.0 if base is None else base}, "rope_theta", float), scaling
