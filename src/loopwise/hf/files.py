"""Checkpoint folders for the bridge: everything goes through `loopwise.hub`, where names and shapes are checked."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from transformers import GenerationConfig

from loopwise.errors import CheckpointError, ConfigError, InputError, NotFoundError
from loopwise.hf.config import CONFIGS, LoopedPreTrainedConfig, unknown_key
from loopwise.hub.checkpoints import FAMILIES, load, save
from loopwise.hub.family import Origin, special_ids
from loopwise.hub.locate import locate, read_json
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM
from loopwise.objectives import Objective

if TYPE_CHECKING:
    from loopwise.hf.model import LoopedForCausalLM

_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_OWN = ("config", "dtype", "device_map", "objective", "generation_config")
# Permissions and notes of the caller that ask for nothing.
_HARMLESS = (
    "trust_remote_code",
    "torch_dtype",
    "_from_auto",
    "adapter_kwargs",
    "use_safetensors",
    "attn_implementation",
)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint, read."""

    model: LoopedLM
    config: LoopedPreTrainedConfig
    generation_config: GenerationConfig
    objective: str | Objective | None


def load_checkpoint(name: str | Path, options: dict[str, Any]) -> Loaded:
    """Read a folder or a hub id; see `LoopedForCausalLM.from_pretrained` for the options."""
    options = {key: value for key, value in options.items() if value is not None}
    folder = _fetch(name, {key: options.pop(key) for key in _HUB if key in options})
    if options.get("adapter_kwargs", {}).get("_adapter_model_path"):
        raise ConfigError(f"{name} holds an adapter; type peft.AutoPeftModelForCausalLM.from_pretrained({str(name)!r})")
    if options.get("attn_implementation", "sdpa") != "sdpa" or options.get("use_safetensors", True) is not True:
        raise ConfigError("a looped model is read from safetensors and uses 'sdpa' attention; leave the options out")
    dtype = options.pop("dtype", None) or options.get("torch_dtype")
    own = {key: options.pop(key) for key in _OWN if key in options}
    changed = {key: value for key, value in options.items() if key not in _HARMLESS}
    raw = read_json(folder / "config.json")
    config = own.get("config")
    if config is None:
        if raw.get("model_type") not in CONFIGS:
            raise CheckpointError(f"config.json: model_type={raw.get('model_type')!r}; it is {', '.join(CONFIGS)} here")
        config, changed = CONFIGS[raw["model_type"]].from_dict(
            raw, return_unused_kwargs=True, name_or_path=str(name), **changed
        )
    for key, value in changed.items():
        raise ConfigError(f"{key}={value!r}: {unknown_key(key, (*_OWN, *_HUB, 'num_loops'), raw)}")
    model = load(folder, dtype=None if dtype == "auto" else dtype, device=_device(own.get("device_map")))
    config.remember_tensors([entry.name for entry in FAMILIES[config.model_type].entries(model.config)])
    model = _rebuilt(model, config.looped)
    config.dtype = model.embed.weight.dtype
    return Loaded(
        model=model,
        config=config,
        generation_config=own.get("generation_config") or _generation_config(folder, model),
        objective=own.get("objective"),
    )


def _fetch(name: str | Path, hub: dict[str, Any]) -> Path:
    """The local folder of a checkpoint."""
    if not hub or Path(name).expanduser().is_dir():
        return locate(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.jinja", "*.safetensors"], **hub))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotFoundError(f"{name}: not a folder here, and not to be had from the hub: {reason}") from None


def _device(device_map: Any) -> str | torch.device:
    if isinstance(device_map, Mapping) and len(device_map) == 1:
        device_map = next(iter(device_map.values()))
    if device_map is None:
        return "cpu"
    if device_map == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or "cpu"
    if isinstance(device_map, int):
        device_map = f"cuda:{device_map}"
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ConfigError(
            f'device_map={device_map!r}: a looped model stays on one device; allowed are "cpu", "cuda:0", "auto", ...'
        ) from None


def _rebuilt(model: LoopedLM, wanted: LoopedLMConfig) -> LoopedLM:
    """The same weights under changed settings.

    Raises:
        ConfigError: when the settings ask for other tensors.
    """
    wanted = replace(wanted, trained_loops=model.config.trained_loops)
    if wanted == model.config:
        return model
    with torch.device("meta"):
        changed = LoopedLM(wanted)
    shapes = {name: parameter.shape for name, parameter in changed.named_parameters()}
    if shapes != {name: parameter.shape for name, parameter in model.named_parameters()}:
        raise ConfigError("the changed keys of config.json ask for other tensors than the checkpoint holds")
    changed.load_state_dict(model.state_dict(), assign=True)
    changed.origin, changed.tokenizer = model.origin, model.tokenizer
    return changed


def config_of(model: LoopedLM) -> LoopedPreTrainedConfig:
    """The configuration of a model that was read or built by Loopwise."""
    origin = model.origin or Origin(family="loopwise")
    # As it would be read from a file: lists for tuples.
    raw = json.loads(json.dumps(FAMILIES[origin.family].write_config(model.config, origin.config)))
    config = CONFIGS[origin.family](**{key: value for key, value in raw.items() if key != "model_type"})
    config.remember_tensors([entry.name for entry in FAMILIES[origin.family].entries(model.config)])
    config.name_or_path = "" if origin.folder is None else str(origin.folder)
    config.dtype = model.embed.weight.dtype
    return config


def _generation_config(folder: Path, model: LoopedLM) -> GenerationConfig:
    """generation_config.json with the family's right special ids."""
    found = GenerationConfig()
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(folder)
    if model.origin is None:
        return found
    special = FAMILIES[model.origin.family].special_tokens(model.origin.config)
    mended = special != special_ids(model.origin.config)
    bos, eos, pad = special.bos, special.eos, special.pad
    if not mended and not eos and model.tokenizer is not None:
        bos, eos, pad = model.tokenizer.bos_id, model.tokenizer.stop_ids, model.tokenizer.pad_id
    ends = list(eos) if len(eos) > 1 else next(iter(eos), None)
    for name, value in (("bos_token_id", bos), ("eos_token_id", ends), ("pad_token_id", pad)):
        if value is not None and (mended or getattr(found, name) is None):
            setattr(found, name, value)
    return found


def save_checkpoint(
    wrapped: "LoopedForCausalLM", folder: Path, state_dict: Mapping[str, Tensor] | None, max_shard_size: int | str
) -> None:
    """Write a folder; see `LoopedForCausalLM.save_pretrained`."""
    model, config = wrapped.model, replace(wrapped.model.config, loops=wrapped.config.num_loops)
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in (wrapped.state_dict() if state_dict is None else state_dict).items()
    }
    with torch.device("meta"):
        written = LoopedLM(config)
    if weights.keys() != dict(written.named_parameters()).keys():
        extra = sorted(weights.keys() ^ dict(written.named_parameters()).keys())[0]
        raise ConfigError(
            f"the weights are not those of a plain model ({extra}); with adapters type model.merge_and_unload() first, "
            "or save the adapter alone through peft"
        )
    written.load_state_dict(weights, assign=True)
    origin = model.origin or Origin(family=wrapped.config.model_type)
    written.origin = replace(origin, config=wrapped.config.to_dict())
    written.tokenizer = model.tokenizer
    save(written, folder, shard_bytes=_bytes(max_shard_size))
    wrapped.generation_config.save_pretrained(folder)


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"([0-9]+)\s*([A-Z]*)", size.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"max_shard_size={size!r}; give bytes, or a text such as '5GB'")
    return int(found[1]) * _UNITS[found[2]]


def load_family_tensors(
    model: LoopedLM, family: str, tensors: Mapping[str, Tensor], *, strict: bool
) -> _IncompatibleKeys:
    """Fill a model from tensors in a family's names.

    Raises:
        InputError: when names or shapes do not fit; without `strict` missing and unexpected names are only returned.
    """
    translator = FAMILIES[family]
    spellings = translator.spellings(model.config)
    parameters = dict(model.named_parameters())
    used: set[str] = set(translator.passengers(model.config))
    missing = []
    with torch.no_grad():
        for entry in translator.entries(model.config):
            names = [name for name in (entry.name, *spellings.get(entry.name, ())) if name in tensors]
            used.update(names)
            if not names:
                missing.append(entry.name)
                continue
            target, tensor = entry.of(parameters[entry.parameter]), tensors[names[0]]
            if target.shape != tensor.shape:
                raise InputError(f"{names[0]} is {list(tensor.shape)} and should be {list(target.shape)}")
            target.copy_(tensor)
    unexpected = sorted(tensors.keys() - used)
    if strict and (missing or unexpected):
        raise InputError(f"tensors missing: {missing[:5]}; unexpected: {unexpected[:5]}")
    return _IncompatibleKeys(missing, unexpected)
