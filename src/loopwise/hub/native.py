"""Our own family, which holds every shape we can build: config.json is `LoopedLMConfig`, tensors have our names."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from loopwise.errors import CheckpointError, ConfigError
from loopwise.hub.family import Entry, SpecialTokens, need, section, special_ids, trained_range
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.rotary import RotaryScaling

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


class Native:
    """Reads and writes the family `loopwise`."""

    name = "loopwise"
    chat_template: str | None = None
    chat_marks: tuple[str, ...] = ()

    def reads(self, raw: Mapping[str, Any]) -> bool:
        return raw.get("model_type") == "loopwise"

    def read_config(self, raw: Mapping[str, Any], tensors: Collection[str] | None) -> LoopedLMConfig:
        allowed = [field.name for field in dataclasses.fields(LoopedLMConfig)]
        values = {key: value for key, value in raw.items() if key in allowed}
        unknown = sorted(set(raw) - set(allowed) - {"model_type", "architectures", *_SPECIAL})
        if unknown:
            raise CheckpointError(f"config.json: unknown {', '.join(unknown)}; allowed are {', '.join(allowed)}")
        for key, annotation in get_type_hints(LoopedLMConfig).items():
            if key in values and annotation in (int, float, bool):
                values[key] = need(values, key, annotation)
            elif key in values and get_origin(annotation) is Literal and values[key] not in get_args(annotation):
                allowed_values = ", ".join(get_args(annotation))
                raise CheckpointError(f"config.json: {key}={values[key]!r}; allowed are {allowed_values}")
        if "trained_loops" in values:
            values["trained_loops"] = trained_range({"loopwise": values}, (1, 1))
        try:
            if values.get("rotary_scaling") is not None:
                values["rotary_scaling"] = RotaryScaling(**section(values, "rotary_scaling"))
            return LoopedLMConfig(**values)
        except (TypeError, ConfigError) as error:
            raise CheckpointError(f"config.json: {error}") from None

    def write_config(self, config: LoopedLMConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
        special = {key: raw[key] for key in _SPECIAL if key in raw}
        return {"model_type": "loopwise", **dataclasses.asdict(config), **special}

    def entries(self, config: LoopedLMConfig) -> list[Entry]:
        with torch.device("meta"):
            model = LoopedLM(config)
        return [Entry(name=name, parameter=name, shape=tuple(p.shape)) for name, p in model.named_parameters()]

    def spellings(self, config: LoopedLMConfig) -> dict[str, tuple[str, ...]]:
        return {}

    def passengers(self, config: LoopedLMConfig) -> dict[str, tuple[int, ...]]:
        return {}

    def check_passenger(self, config: LoopedLMConfig, name: str, tensor: Tensor) -> None:
        return None

    def special_tokens(self, raw: Mapping[str, Any]) -> SpecialTokens:
        return special_ids(raw)
