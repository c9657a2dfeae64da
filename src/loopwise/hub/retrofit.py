"""A looped model made from a plain Llama or OLMo-2 (McLeish et al. 2025, arXiv 2511.07384).

Some layers become the prelude, some the core, some the coda; those between prelude and core are dropped. The adapter
before the core starts as [0 | I]: it passes the prelude's output on and ignores the state, so that one loop, from
whatever start, is the source model with the dropped layers left out. Training then teaches it to use the state.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from loopwise.errors import CheckpointError, ConfigError
from loopwise.hub.family import Entry, Origin, need, optional
from loopwise.hub.huginn import llama_rotary
from loopwise.hub.locate import locate, read_json
from loopwise.hub.matching import Layout, build
from loopwise.hub.shards import list_tensors
from loopwise.hub.tokenizer import Tokenizer
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM

Source = Literal["llama", "olmo2"]
SOURCES: tuple[Source, ...] = ("llama", "olmo2")

_HUGINN_STD = math.sqrt(2 / (5 * 5280))
"""The authors start every retrofit, whatever its width, with Huginn's spread."""
_BLOCK_NORMS = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "clip_qkv": (None,),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which layers of the source go where."""

    prelude: tuple[int, ...]
    core: tuple[int, ...]
    coda: tuple[int, ...]

    def __post_init__(self) -> None:
        kept = self.kept
        if not self.core:
            raise ConfigError("the core has no layers; give at least one, for example core=10-17")
        if any(later <= earlier for earlier, later in itertools.pairwise(kept)):
            raise ConfigError(f"layers {self}: each may be used once, in the order prelude, core, coda")

    @property
    def kept(self) -> tuple[int, ...]:
        """All layers that are used, in order."""
        return (*self.prelude, *self.core, *self.coda)

    def __str__(self) -> str:
        return " / ".join(_ranges(part) for part in (self.prelude, self.core, self.coda))


def choose_split(layers: int, prelude: int, core: int, coda: int) -> Split:
    """The authors' choice for given sizes: the first layers, the last layers, and the ones right before those.

    TinyLlama (22 layers, 4-8-4) becomes 0-3 / 10-17 / 18-21; 16 layers as 4-6-4 become 0-3 / 6-11 / 12-15. The loss
    after training was lowest so; evenly spaced core layers and those that ShortGPT would keep were worse.

    Raises:
        ConfigError: when the source has too few layers.
    """
    if min(prelude, coda) < 0 or core < 1 or prelude + core + coda > layers:
        raise ConfigError(
            f"retrofit={prelude},{core},{coda}: the source has {layers} layers; allowed are prelude,core,coda that sum "
            f"to {layers} or less, with a core of 1 or more"
        )
    first_coda = layers - coda
    return Split(
        prelude=tuple(range(prelude)),
        core=tuple(range(first_coda - core, first_coda)),
        coda=tuple(range(first_coda, layers)),
    )


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers from text such as "0-3" or "0,2,5-7".

    Raises:
        ConfigError: for anything else.
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ConfigError(f"{text!r} is no list of layers; type for example 10-17, or 0,2,5-7")
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


def read_source(path_or_id: str | Path) -> tuple[Path, dict[str, Any], Source]:
    """Folder, config.json and kind of a plain language model.

    Raises:
        NotFoundError: when there is no such checkpoint.
        CheckpointError: when it is neither a Llama nor an OLMo-2, or has something that a loop could not keep.
    """
    folder = locate(path_or_id)
    raw = read_json(folder / "config.json")
    for source in SOURCES:
        if raw.get("model_type") == source:
            _check_source(raw)
            return folder, raw, source
    raise CheckpointError(
        f"config.json: model_type={raw.get('model_type')!r} cannot be retrofitted; allowed are {', '.join(SOURCES)}"
    )


def _check_source(raw: Mapping[str, Any]) -> None:
    for key, allowed in _EXPECTED.items():
        if key in raw and raw[key] not in allowed:
            raise CheckpointError(f"config.json: {key}={raw[key]!r}; only {allowed[0]!r} can be retrofitted")
    layers = need(raw, "num_hidden_layers", int)
    for key, value in raw.items():
        by_layer = isinstance(value, list) and len(value) == layers and not key.endswith("token_id")
        if by_layer and len({str(item) for item in value}) > 1:
            raise CheckpointError(f"config.json: {key} differs from layer to layer, which layers in a loop cannot keep")


def retrofit(
    path_or_id: str | Path,
    *,
    split: Split | tuple[int, int, int],
    loops: int = 1,
    dtype: str | torch.dtype | None = None,
) -> LoopedLM:
    """A looped model from a plain one.

    Args:
        path_or_id: a transformers checkpoint of type llama or olmo2, folder or hub id.
        split: the layers of each part, or the sizes of prelude, core and coda (see `choose_split`).
        loops: loops that run when nobody says otherwise. Before training every number gives the same answer.
        dtype: None keeps the source's.

    Raises:
        NotFoundError: when there is no such checkpoint.
        CheckpointError: as `read_source`, or when its tensors are not those its config.json implies.
        ConfigError: when the source does not have these layers.
    """
    folder, raw, source = read_source(path_or_id)
    layers = need(raw, "num_hidden_layers", int)
    chosen = split if isinstance(split, Split) else choose_split(layers, *split)
    if chosen.kept[-1] >= layers:
        raise ConfigError(f"layer {chosen.kept[-1]} was asked for; the source has layers 0 to {layers - 1}")
    config = _looped_config(raw, source, chosen, loops)
    layout = _layout(config, source, chosen, layers)
    model = build(config, layout, list_tensors(folder), dtype=dtype, device="cpu", passenger=_leave)
    adapter = model.get_parameter("adapter.weight")
    with torch.no_grad():
        adapter.zero_()
        adapter[:, config.width :].fill_diagonal_(1.0)
    kept_ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
    dtype_name = str(model.embed.weight.dtype).removeprefix("torch.")
    model.origin = Origin(family="huginn_raven", config={**kept_ids, "torch_dtype": dtype_name}, folder=folder)
    model.tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    return model


def _looped_config(raw: Mapping[str, Any], source: Source, split: Split, loops: int) -> LoopedLMConfig:
    heads, width = need(raw, "num_attention_heads", int), need(raw, "hidden_size", int)
    base, scaling = llama_rotary(raw)
    positions = need(raw, "max_position_embeddings", int)
    return LoopedLMConfig(
        vocab_size=need(raw, "vocab_size", int),
        width=width,
        heads=heads,
        kv_heads=optional(raw, "num_key_value_heads", heads, int),
        head_width=optional(raw, "head_dim", width // max(heads, 1), int),
        mlp_width=need(raw, "intermediate_size", int),
        prelude_layers=len(split.prelude),
        core_layers=len(split.core),
        coda_layers=len(split.coda),
        loops=loops,
        trained_loops=(1, loops),
        anytime=True,
        max_positions=positions,
        norm="pre" if source == "llama" else "branch",
        norm_eps=optional(raw, "rms_norm_eps", 1e-6 if source == "llama" else 1e-5, float),
        rotary="half",
        rotary_base=base,
        rotary_scaling=scaling,
        qk_norm=source == "olmo2",
        tied_head=optional(raw, "tie_word_embeddings", False, bool),
        start="normal",
        start_std=_HUGINN_STD,
        injection="adapter",
    )


def _layout(config: LoopedLMConfig, source: Source, split: Split, layers: int) -> Layout:
    table = (config.vocab_size, config.width)
    entries = [
        Entry(name="model.embed_tokens.weight", parameter="embed.weight", shape=table),
        Entry(name="model.norm.weight", parameter="norm.weight", shape=(config.width,)),
    ]
    for stack, numbers in (("prelude", split.prelude), ("core", split.core), ("coda", split.coda)):
        for place, layer in enumerate(numbers):
            entries += _layer_entries(config, source, layer, f"{stack}.{place}")
    if not config.tied_head:
        entries.append(Entry(name="lm_head.weight", parameter="head.weight", shape=table))
    dropped = sorted(set(range(layers)) - set(split.kept))
    passengers = {
        entry.name: entry.shape for layer in dropped for entry in _layer_entries(config, source, layer, "dropped")
    }
    # Early Llama files carry a table that the model computes.
    passengers |= {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (config.head_width // 2,) for layer in range(layers)
    }
    return Layout(
        title=source,
        entries=entries,
        spellings={"model.embed_tokens.weight": ("lm_head.weight",)} if config.tied_head else {},
        passengers=passengers,
    )


def _layer_entries(config: LoopedLMConfig, source: Source, layer: int, ours: str) -> list[Entry]:
    d, f, k = config.width, config.mlp_width, config.head_width
    q, kv = config.heads * k, config.kv_heads * k
    attention, mlp = f"{ours}.attention.branch", f"{ours}.mlp.branch"
    side = "norm_in" if config.norm == "pre" else "norm_out"
    first_norm, second_norm = _BLOCK_NORMS[source]
    rows: list[tuple[str, str, tuple[int, ...], int]] = [
        ("self_attn.q_proj", f"{attention}.qkv", (q, d), 0),
        ("self_attn.k_proj", f"{attention}.qkv", (kv, d), q),
        ("self_attn.v_proj", f"{attention}.qkv", (kv, d), q + kv),
        ("self_attn.o_proj", f"{attention}.out", (d, q), 0),
        ("mlp.gate_proj", f"{mlp}.gate_up", (f, d), 0),
        ("mlp.up_proj", f"{mlp}.gate_up", (f, d), f),
        ("mlp.down_proj", f"{mlp}.down", (d, f), 0),
        (first_norm, f"{ours}.attention.{side}", (d,), 0),
        (second_norm, f"{ours}.mlp.{side}", (d,), 0),
    ]
    if config.qk_norm:
        rows += [
            ("self_attn.q_norm", f"{attention}.q_norm", (q,), 0),
            ("self_attn.k_norm", f"{attention}.k_norm", (kv,), 0),
        ]
    return [
        Entry(
            name=f"model.layers.{layer}.{theirs}.weight",
            parameter=f"{parameter}.weight",
            shape=shape,
            start=start,
            stop=start + shape[0],
        )
        for theirs, parameter, shape, start in rows
    ]


def _leave(name: str, tensor: Tensor) -> None:
    """Dropped layers stay behind."""


def _ranges(numbers: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
