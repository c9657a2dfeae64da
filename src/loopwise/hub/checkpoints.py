"""Load and save checkpoints of every family: each tensor's name and shape is checked, nothing is guessed."""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopwise.errors import CheckpointError, ConfigError, StorageError
from loopwise.hub.family import Family, Origin
from loopwise.hub.huginn import Huginn
from loopwise.hub.locate import locate, read_json
from loopwise.hub.native import Native
from loopwise.hub.ouro import Ouro
from loopwise.hub.shards import StoredTensor, list_tensors, read_tensors, write_tensors, write_text

from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM

FAMILIES: dict[str, Family] = {family.name: family for family in (Ouro(), Huginn(), Native())}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_NAMES = 5
_COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


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
    places = _match(family, config, stored, origin)

    with torch.device("meta"):
        model = LoopedLM(config)
    model = model.to(_resolve_dtype(dtype, stored, places)).to_empty(device=device)
    parameters = dict(model.named_parameters())
    passengers = family.passengers(config)
    with torch.no_grad():
        repeats_last = sorted(stored, key=lambda name: name in places and places[name][1])
        for name, tensor in read_tensors({name: stored[name] for name in repeats_last}):
            if name in passengers:
                family.check_passenger(config, name, tensor)
                origin.passengers[name] = tensor.clone()
                continue
            entry, duplicate = places[name]
            target = entry.of(parameters[entry.parameter])
            if not duplicate:
                target.copy_(tensor)
            elif not torch.equal(target, tensor.to(target)):
                raise CheckpointError(f"{name} and {entry.name} are tied in config.json but differ in the file")
    model.origin = origin
    model.tokenizer = None
    return model.eval()


def read_config(path_or_id: str | Path) -> tuple[LoopedLMConfig, Family]:
    """The configuration alone; works without any weights.

    Raises:
        NotFoundError, CheckpointError: as `load`.
    """
    folder = locate(path_or_id)
    raw = read_json(folder / "config.json")
    family = family_of(raw)
    has_weights = any(folder.glob("*.safetensors"))
    return family.read_config(raw, list_tensors(folder).keys() if has_weights else None), family


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family a config.json belongs to.

    Raises:
        CheckpointError: when it is none of ours.
    """
    for family in FAMILIES.values():
        if family.reads(raw):
            return family
    raise CheckpointError(
        f"config.json: model_type={raw.get('model_type')!r}; supported are {', '.join(FAMILIES)} "
        "(a plain Llama or OLMo-2 becomes a looped model with: loopwise convert)"
    )


def _match(
    family: Family, config: LoopedLMConfig, stored: Mapping[str, StoredTensor], origin: Origin
) -> dict[str, tuple[Any, bool]]:
    """Where each stored tensor goes, and whether it only repeats another one."""
    places: dict[str, tuple[Any, bool]] = {}
    problems: list[str] = []
    missing: list[str] = []
    other_names = family.spellings(config)
    for entry in family.entries(config):
        names = [name for name in (entry.name, *other_names.get(entry.name, ())) if name in stored]
        if not names:
            missing.append(entry.name)
        for name in names:
            places[name] = (entry, name != names[0])
            if stored[name].shape != entry.shape:
                problems.append(f"{name} has shape {stored[name].shape}, config.json implies {entry.shape}")
        if entry.name in other_names:
            origin.spellings[entry.name] = tuple(names)
    for name, shape in family.passengers(config).items():
        if name in stored and stored[name].shape != shape:
            problems.append(f"{name} has shape {stored[name].shape}, config.json implies {shape}")
    unexpected = sorted(set(stored) - set(places) - set(family.passengers(config)))
    if missing:
        problems.insert(0, f"missing {_listed(missing)}")
    if unexpected:
        problems.insert(0, f"unexpected {_listed(unexpected)}")
    if problems:
        shown = "; ".join(problems[:_MOST_NAMES]) + ("; ..." if len(problems) > _MOST_NAMES else "")
        raise CheckpointError(f"the weights do not fit config.json ({family.name}): {shown}")
    return places


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return f"{len(names)} ({', '.join(names[:_MOST_NAMES])}{f' and {more} more' if more > 0 else ''})"


def _resolve_dtype(
    asked: str | torch.dtype | None, stored: Mapping[str, StoredTensor], places: Mapping[str, Any]
) -> torch.dtype:
    kinds = [stored[name].dtype for name in places]
    if None in kinds:
        name = next(name for name in places if stored[name].dtype is None)
        raise CheckpointError(f"{name} is stored in a dtype that weights do not have; allowed are {', '.join(DTYPES)}")
    if isinstance(asked, torch.dtype):
        return asked
    if asked is not None:
        if asked not in DTYPES:
            raise ConfigError(f"dtype={asked!r}: allowed are {', '.join(DTYPES)}")
        return DTYPES[asked]
    found = sorted({str(kind) for kind in kinds})
    kept = kinds[0]
    if len(found) > 1:
        warnings.warn(
            f"the checkpoint mixes {', '.join(found)}; everything is loaded as {kept}", UserWarning, stacklevel=3
        )
    return kept


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
        ConfigError: when the family cannot hold the model's shape.
        StorageError: when the disk refuses; files that were there before stay whole.
    """
    origin = model.origin or Origin(family="loopwise")
    chosen = origin.family if family is None else family
    if chosen not in FAMILIES:
        raise ConfigError(f"family={chosen!r}: allowed are {', '.join(FAMILIES)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    writer = FAMILIES[chosen]
    same_family = chosen == origin.family
    raw = writer.write_config(model.config, origin.config if same_family else _special_only(origin, model))
    tensors: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for entry in writer.entries(model.config):
        tensor = entry.of(parameters[entry.parameter].detach())
        tensor = tensor if dtype is None else tensor.to(DTYPES[dtype])
        names = (origin.spellings.get(entry.name) if same_family else None) or (entry.name,)
        for number, name in enumerate(names):
            tensors[name] = tensor if number == 0 else tensor.clone()
    if same_family:
        tensors |= origin.passengers
    for key in ("dtype", "torch_dtype"):
        if key in raw:
            raw[key] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")

    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error}") from None
    write_tensors(folder, dict(sorted(tensors.items())), shard_bytes=shard_bytes)
    _copy_companions(origin.folder, folder)
    if model.tokenizer is not None and not (folder / "tokenizer.json").is_file():
        model.tokenizer.save(folder)
    # Last, so that a folder with config.json is a whole checkpoint.
    write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")


def _special_only(origin: Origin, model: LoopedLM) -> dict[str, Any]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return {key: value for key, value in origin.config.items() if key.endswith("_token_id")}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {key: value for key, value in ids.items() if value is not None}


def _copy_companions(source: Path | None, target: Path) -> None:
    if source is None or source.resolve() == target.resolve():
        return
    for file in sorted({*(source / name for name in _COPIED), *source.glob("*.jinja")}):
        if file.is_file():
            try:
                shutil.copyfile(file, target / file.name)
            except OSError as error:
                raise StorageError(f"cannot write {target / file.name}: {error}; free space") from None
