"""Load and save language models of every family: each tensor's name and shape is checked, nothing is guessed.

`machines.py` stands on this, and on the readers of what is no language model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopwise.errors import CheckpointError, ConfigError, StorageError, UserError
from loopwise.hub import ctm, trm
from loopwise.hub.family import Family, Origin, SpecialTokens, special_ids
from loopwise.hub.huginn import Huginn
from loopwise.hub.locate import locate, read_json
from loopwise.hub.matching import DTYPES, Layout, build, match
from loopwise.hub.native import Native
from loopwise.hub.ouro import Ouro
from loopwise.hub.shards import StoredTensor, copy_file, list_tensors, weight_files, write_tensors, write_text
from loopwise.hub.tokenizer import Tokenizer
from loopwise.hub.tokenizer_files import read_text
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM, need_language_model

FAMILIES: dict[str, Family] = {family.name: family for family in (Ouro(), Huginn(), Native())}
_COMPANIONS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def load(
    path_or_id: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> LoopedLM:
    """Load a looped language model of any supported family.

    Args:
        path_or_id: a folder with config.json and safetensors, or a hub id (cached; `HF_HUB_OFFLINE=1` is respected).
        dtype: "float32", "bfloat16", ...; None keeps the checkpoint's.
        device: where the weights go.

    Raises:
        NotFoundError: when there is no such checkpoint.
        CheckpointError: when a tensor is missing, unexpected or misshapen, or a file is corrupt.
    """
    folder = locate(path_or_id)
    raw = read_json(folder / "config.json")
    family = family_of(raw)
    stored = list_tensors(folder)
    config = family.read_config(raw, stored.keys())
    origin = Origin(family=family.name, config=raw, folder=folder)

    def keep_passenger(name: str, tensor: Tensor) -> None:
        family.check_passenger(config, name, tensor)
        origin.passengers[name] = tensor.clone()

    layout = layout_of(family, config)
    model = build(config, layout, stored, dtype=dtype, device=device, passenger=keep_passenger)
    for name, others in layout.spellings.items():
        origin.spellings[name] = tuple(spelling for spelling in (name, *others) if spelling in stored)
    model.origin = origin
    model.tokenizer = load_tokenizer(folder, family, raw)
    return model


def load_tokenizer(folder: Path, family: Family, raw: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer beside the weights, with the family's special ids; None when there is no tokenizer.json.

    Raises:
        CheckpointError: when its files are not what they should be.
    """
    special = family.special_tokens(raw)
    if not (folder / "tokenizer.json").is_file():
        return None
    if special == special_ids(raw):
        tokenizer = Tokenizer.load(folder)
    else:
        # The family knows that its published files are wrong, whichever of them the tokenizer would read.
        eos = next(iter(special.eos), None)
        tokenizer = Tokenizer.load(folder, bos_id=special.bos, eos_id=eos, pad_id=special.pad)
        tokenizer.special = replace(tokenizer.special, stop=special.eos)
    # A base model trained from scratch in the family's format has no special tokens for its template's marks.
    if tokenizer.chat_template is None and all(map(tokenizer.names_special, family.chat_marks)):
        tokenizer.chat_template = family.chat_template
    return tokenizer


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of language models a config.json belongs to.

    Raises:
        CheckpointError: when it is none of ours.
    """
    for family in FAMILIES.values():
        if family.reads(raw):
            return family
    for name, reads in (("CTM", ctm.reads), ("TRM or HRM", trm.reads)):
        if reads(raw):
            raise CheckpointError(
                f"config.json is of a {name}, and only a language model will do here; loopwise.load reads it, and "
                "loopwise info and loopwise study take it"
            )
    raise CheckpointError(
        f"config.json: model_type={raw.get('model_type')!r}; supported are {', '.join(FAMILIES)} "
        "(a plain llama or olmo2 becomes a looped model with: loopwise convert SOURCE TARGET retrofit=4,8,4)"
    )


def layout_of(family: Family, config: LoopedLMConfig) -> Layout:
    """What a checkpoint of this family and shape holds."""
    return Layout(
        title=family.name,
        entries=family.entries(config),
        spellings=family.spellings(config),
        passengers=family.passengers(config),
    )


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a checkpoint, as far as their headers tell."""

    tensors: int
    files: int
    bytes: int
    """Size of the files."""
    dtypes: tuple[str, ...]
    """Every dtype that occurs."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is known of a checkpoint without reading its weights."""

    folder: Path
    family: str
    config: LoopedLMConfig
    special: SpecialTokens
    weights: Weights | None
    """None when they are absent or broken."""
    problem: str | None
    """What is wrong with the weights; None when they are whole, or not there at all."""
    dtype: str
    """Dtype of the weights as stored, as config.json says when they are absent, or bfloat16."""
    tokenizer: Tokenizer | None
    """None when there is no tokenizer.json."""


def inspect(path_or_id: str | Path) -> Inspection:
    """Look at a checkpoint: its config.json, and its weights' headers if they are there. Fetches no weights.

    Raises:
        NotFoundError: when there is no such folder, hub id or config.json.
        CheckpointError: when config.json is of no family we know, or cannot be read.
    """
    folder = locate(path_or_id, weights=False)
    raw = read_json(folder / "config.json")
    family = family_of(raw)
    stored, problem = headers(folder)
    weights: Weights | None = None
    config = family.read_config(raw, stored.keys() if stored else None)
    if stored:
        try:
            match(layout_of(family, config), stored)
            weights = weigh(folder, stored)
        except CheckpointError as error:
            problem = str(error)
    return Inspection(
        folder=folder,
        family=family.name,
        config=config,
        special=family.special_tokens(raw),
        weights=weights,
        problem=problem,
        dtype=_dtype_name(raw, stored or {}),
        tokenizer=load_tokenizer(folder, family, raw),
    )


def headers(folder: Path) -> tuple[dict[str, StoredTensor] | None, str | None]:
    """The stored tensors as their files' headers tell, None where no weights are; and what is wrong with the files."""
    try:
        if any(file.is_file() for file in weight_files(folder)):
            return list_tensors(folder), None
    except UserError as error:
        return None, str(error)
    return None, None


def weigh(folder: Path, stored: Mapping[str, StoredTensor]) -> Weights:
    """How much is stored."""
    files = weight_files(folder)
    return Weights(
        tensors=len(stored),
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()})),
    )


def _dtype_name(raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> str:
    found = [str(tensor.dtype) for tensor in stored.values() if tensor.dtype is not None]
    stated = [raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) in DTYPES]
    return next(iter([*found, *stated]), "bfloat16").removeprefix("torch.")


def save(
    model: LoopedLM,
    path: str | Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json, weights and tokenizer into a folder, in the model's own family.

    A model that was loaded and not changed is written back bit for bit.

    Args:
        path: the folder; made when it is not there.
        family: another family to write ("ouro", "huginn_raven", "loopwise"); the shape must allow it.
        dtype: convert the weights; None keeps them.
        shard_bytes: files larger than this are split.

    Raises:
        ConfigError: when the family cannot hold the model's shape, or the model is no language model.
        StorageError: when the disk refuses; a checkpoint that was there before stays whole.
    """
    need_language_model(model, instead="to write it, type: loopwise.hub.ctm.save_ctm or loopwise.hub.trm.save_trm")
    origin = model.origin or Origin(family="loopwise")
    chosen = origin.family if family is None else family
    if chosen not in FAMILIES:
        raise ConfigError(f"family={chosen!r}: allowed are {', '.join(FAMILIES)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    writer = FAMILIES[chosen]
    same_family = chosen == origin.family
    raw = writer.write_config(model.config, origin.config if same_family and origin.config else _special_ids(model))
    tensors: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for entry in writer.entries(model.config):
        tensor = entry.of(parameters[entry.parameter].detach())
        tensor = tensor if dtype is None else tensor.to(DTYPES[dtype])
        names = (origin.spellings.get(entry.name) if same_family else None) or (entry.name,)
        for number, name in enumerate(names):
            tensors[name] = tensor if number == 0 else tensor.clone()
    for key in ("dtype", "torch_dtype"):
        if key in raw:
            raw[key] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if same_family:
        tensors |= origin.passengers

    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error}; choose another") from None
    write_tensors(folder, dict(sorted(tensors.items())), shard_bytes=shard_bytes)
    _write_companions(model, origin, folder, same_family=same_family)
    # Last, so that a folder with config.json is a whole checkpoint.
    write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")


def _special_ids(model: LoopedLM) -> dict[str, Any]:
    """Token ids with a role, as every family's config.json spells them."""
    if model.origin is not None and model.origin.config:
        special = FAMILIES[model.origin.family].special_tokens(model.origin.config)
        bos, eos, pad = special.bos, special.eos, special.pad
    elif model.tokenizer is not None:
        bos, eos, pad = model.tokenizer.bos_id, model.tokenizer.stop_ids, model.tokenizer.pad_id
    else:
        return {}
    ends: list[int] | int | None = list(eos) if len(eos) > 1 else next(iter(eos), None)
    ids = {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": pad}
    return {key: value for key, value in ids.items() if value is not None}


def _write_companions(model: LoopedLM, origin: Origin, target: Path, *, same_family: bool) -> None:
    """Tokenizer and generation files: as they were, unless the tokenizer or the family is another one now."""
    source, tokenizer = origin.folder, model.tokenizer
    own = source / "tokenizer.json" if source is not None else None
    changed = tokenizer is not None and (own is None or not own.is_file() or read_text(own) != tokenizer.serialized)
    if tokenizer is not None and (changed or not same_family):
        tokenizer.save(target)
    elif source is not None and same_family and source.resolve() != target.resolve():
        for file in sorted({*(source / name for name in _COMPANIONS), *source.glob("*.jinja")}):
            if file.is_file():
                copy_file(file, target / file.name)
