"""Checkpoints of TRM (SamsungSAILMontreal/TinyRecursiveModels) and HRM (sapientinc/HRM), read and written.

A folder holds `config.json`, the dict that the authors' constructors take, and `model.safetensors` with their tensor
names. What their trainers write are pickles, which are never read; convert one with their own code first.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopwise.errors import CheckpointError, ConfigError, StorageError
from loopwise.hub.family import Entry, need, optional, section, trained_range
from loopwise.hub.locate import locate, read_json
from loopwise.hub.matching import Layout, Place, match, resolve_dtype
from loopwise.hub.shards import StoredTensor, list_tensors, read_tensors, write_tensors, write_text
from loopwise.models.trm import TRM
from loopwise.models.trm_config import TRMConfig

_MARK = "embed_tokens.embedding_weight"
"""Found in every checkpoint; what stands before it depends on what wrapped the model (loss head, compiler)."""
_POSITIONS = {"rope": "rotary", "learned": "learned", "none": "none"}
_WIDTH_MULTIPLE = 256
_SHARD_BYTES = 5 * 10**9


def reads(raw: Mapping[str, Any]) -> bool:
    """Whether this config.json is a TRM's or HRM's. A language model that thinks in such cycles (HRM-Text) is none."""
    return "H_cycles" in raw and "seq_len" in raw and "model_type" not in raw


def load_trm(
    path_or_id: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> TRM:
    """A TRM or HRM with the authors' weights, in eval mode.

    Args:
        path_or_id: a folder with config.json and safetensors, or a hub id.
        dtype: "float32", "bfloat16", ...; None keeps the checkpoint's.
        device: where the weights go.

    Raises:
        NotFoundError: when there is no such checkpoint, or only a pickle.
        CheckpointError: when config.json or a tensor is missing, unexpected or misshapen.
    """
    folder = locate(path_or_id)
    raw = read_json(folder / "config.json")
    stored = list_tensors(folder)
    model, places = fitting(raw, stored)
    model = model.to(resolve_dtype(dtype, stored)).to_empty(device=device)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in read_tensors(stored):
            own[places[name].entry.parameter].copy_(tensor)
    return model.eval()


def fitting(raw: Mapping[str, Any], stored: Mapping[str, StoredTensor] | None) -> tuple[TRM, dict[str, Place]]:
    """A model without memory (on `meta`) of the shape that config.json states, and where each stored tensor goes.

    Args:
        stored: None when only config.json is there.

    Raises:
        CheckpointError: when config.json cannot be read, or does not fit the tensors.
    """
    places: dict[str, Place] = {}
    if stored is None:
        config = read_config(raw)
    else:
        prefix = next((name.removesuffix(_MARK) for name in stored if name.endswith(_MARK)), None)
        if prefix is None:
            raise CheckpointError(f"no tensor is called ...{_MARK}; this is no checkpoint of TRM or HRM")
        config = read_config(raw, [name.removeprefix(prefix) for name in stored])
        places = match(Layout(title="trm", entries=entries(config, prefix)), stored)
    with torch.device("meta"):
        return TRM(config), places


def save_trm(model: TRM, path: str | Path, *, raw: Mapping[str, Any] | None = None) -> None:
    """Write config.json and model.safetensors as the authors' code names things.

    Args:
        path: the folder; made when it is not there.
        raw: their config.json, whose further keys (batch size, exploration, ...) are kept.

    Raises:
        ConfigError: when their format cannot hold the model's shape.
        StorageError: when the disk refuses.
    """
    written = write_config(model.config, raw or {})
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors: dict[str, Tensor] = {
        entry.name: own[entry.parameter].detach() for entry in entries(model.config, "inner.")
    }
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error}; choose another") from None
    write_tensors(folder, dict(sorted(tensors.items())), shard_bytes=_SHARD_BYTES)
    write_text(folder / "config.json", json.dumps(written, indent=1) + "\n")


def read_config(raw: Mapping[str, Any], tensors: Collection[str] | None = None) -> TRMConfig:
    """Our configuration from theirs; HRM is told by its second network.

    Args:
        tensors: stored names, without what wrapped the model; TRM's code ignores `H_layers`, and only they tell then.

    Raises:
        CheckpointError: when a key is missing, of another kind, or of a value that is not read.
    """
    answer_layers = need(raw, "H_layers", int)
    if tensors is not None and not any(name.startswith("H_level.") for name in tensors):
        answer_layers = 0
    width, puzzle_width = need(raw, "hidden_size", int), optional(raw, "puzzle_emb_ndim", 0, int)
    needed = -(-puzzle_width // max(width, 1))
    # HRM's code knows no length and puts as many places as the embedding fills; in TRM's, 0 says so.
    prefix = optional(raw, "puzzle_emb_len", 0 if answer_layers else 16, int) or needed
    places, expansion = need(raw, "seq_len", int), need(raw, "expansion", float)
    across = optional(raw, "mlp_t", False, bool)
    positions = need(raw, "pos_encodings", str)
    if positions not in _POSITIONS:
        raise CheckpointError(f"config.json: pos_encodings={positions!r}; read are {', '.join(_POSITIONS)}")
    own = section(raw, "loopwise")
    try:
        return TRMConfig(
            vocab_size=need(raw, "vocab_size", int),
            places=places,
            width=width,
            heads=need(raw, "num_heads", int),
            layers=need(raw, "L_layers", int),
            answer_layers=answer_layers,
            mlp_width=inner_width(expansion, width),
            mixing="mlp" if across else "attention",
            mixing_width=inner_width(expansion, places + prefix) if across else 0,
            # A table of angles that no attention reads: published configurations of MLPs leave it on.
            positions="none" if across and positions == "rope" else _POSITIONS[positions],  # type: ignore[arg-type]
            rotary_base=optional(raw, "rope_theta", 10_000.0, float),
            norm_eps=optional(raw, "rms_norm_eps", 1e-5, float),
            cycles=need(raw, "H_cycles", int),
            inner_cycles=need(raw, "L_cycles", int),
            window=optional(own, "window", "step" if answer_layers else "recursion", str),
            prefix=prefix,
            puzzles=need(raw, "num_puzzle_identifiers", int) if puzzle_width else 1,
            puzzle_width=puzzle_width,
            halts="positive" if optional(raw, "no_ACT_continue", not answer_layers, bool) else "over-continue",
            trained_loops=trained_range(raw, (1, need(raw, "halt_max_steps", int))),
        )
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from None


def write_config(config: TRMConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Their configuration from ours, keeping the keys of `raw` that describe something else.

    Raises:
        ConfigError: when one `expansion` cannot give the widths of both MLPs.
    """
    if raw and read_config(raw) == config:
        return dict(raw)
    across = config.mixing == "mlp"
    expansion = float(raw.get("expansion", 0.0)) or _expansion(config)
    positions = next(theirs for theirs, ours in _POSITIONS.items() if ours == config.positions)
    written = {
        "batch_size": 1,
        "halt_exploration_prob": 0.1,
        "forward_dtype": "float32",
        **raw,
        "seq_len": config.places,
        "puzzle_emb_ndim": config.puzzle_width,
        "puzzle_emb_len": config.prefix,
        "num_puzzle_identifiers": config.puzzles,
        "vocab_size": config.vocab_size,
        "H_cycles": config.cycles,
        "L_cycles": config.inner_cycles,
        "H_layers": config.answer_layers,
        "L_layers": config.layers,
        "hidden_size": config.width,
        "expansion": expansion,
        "num_heads": config.heads,
        "pos_encodings": positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rotary_base,
        "halt_max_steps": config.trained_loops[1],
        "mlp_t": across,
        "no_ACT_continue": config.halts == "positive",
        "loopwise": {"window": config.window, "trained_loops": list(config.trained_loops)},
    }
    # What their format has no word for would come back changed.
    back = read_config(written)
    if back != config:
        different = [name for name in vars(config) if getattr(back, name) != getattr(config, name)]
        raise ConfigError(
            f"the authors' format cannot hold this model ({', '.join(different)}); its MLPs are multiples of "
            f"{_WIDTH_MULTIPLE} that follow from one `expansion` (see loopwise.hub.trm.inner_width)"
        )
    return written


def inner_width(expansion: float, width: int) -> int:
    """Features inside their gated MLP: expansion * width * 2/3, rounded up to a multiple of 256."""
    return -(-round(expansion * width * 2 / 3) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def _expansion(config: TRMConfig) -> float:
    return config.mlp_width * 1.5 / config.width


def entries(config: TRMConfig, prefix: str) -> list[Entry]:
    """Every stored tensor: their name, our parameter or buffer, and its shape."""
    with torch.device("meta"):
        model = TRM(config)
    shapes = {name: tuple(p.shape) for name, p in [*model.named_parameters(), *model.named_buffers()]}
    return [Entry(name=prefix + _theirs(name), parameter=name, shape=shape) for name, shape in shapes.items()]


_NAMES = {
    "embeddings.tokens.weight": _MARK,
    "embeddings.positions.weight": "embed_pos.embedding_weight",
    "embeddings.puzzles.weight": "puzzle_emb.weights",
    "head.weight": "lm_head.weight",
    "halt_head.weight": "q_head.weight",
    "halt_head.bias": "q_head.bias",
    "answer_start": "H_init",
    "latent_start": "L_init",
}
_PARTS = {
    "attention.qkv": "self_attn.qkv_proj",
    "attention.out": "self_attn.o_proj",
    "across.gate_up": "mlp_t.gate_up_proj",
    "across.down": "mlp_t.down_proj",
    "mlp.gate_up": "mlp.gate_up_proj",
    "mlp.down": "mlp.down_proj",
}
_NETS = {"latent_net": "L_level", "answer_net": "H_level"}


def _theirs(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    net, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"{_NETS[net]}.layers.{layer}.{_PARTS[part]}.weight"
