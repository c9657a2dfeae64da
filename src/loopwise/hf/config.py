"""config.json of our families as transformers sees it: the file's own keys, and the names that tools ask for."""

import copy
import difflib
from collections.abc import Collection
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedConfig

from loopwise.errors import ConfigError
from loopwise.hub.checkpoints import FAMILIES
from loopwise.models.config import LoopedLMConfig

_KEPT_IN_FILE = frozenset({"model_type", "auto_map", *GenerationConfig._get_default_generation_params()})


class LoopedPreTrainedConfig(PreTrainedConfig):
    """The keys of one family's config.json as attributes; setting one changes the model that is built from it.

    The names that other tools ask for are there too, as other spellings of the file's keys or worked out from them:
    `hidden_size`, `num_hidden_layers` (the layers that are stored, whatever the loops), `num_attention_heads`,
    `num_key_value_heads`, `head_dim`, `intermediate_size`, `vocab_size`, `max_position_embeddings`,
    `tie_word_embeddings` and `num_loops`, the loops that run when nobody says otherwise. Only the file's keys are
    written back.

    Raises:
        CheckpointError: when the keys are not what the family needs.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def _read(self, keys: dict[str, Any]) -> None:
        file_keys = {"model_type": self.model_type, **keys}
        looped = FAMILIES[self.model_type].read_config(file_keys, None)
        # `__init__` of the parent takes any key as an attribute, and some of a family's keys mean another thing to it.
        super().__init__(architectures=keys.get("architectures"), dtype=keys.get("dtype") or keys.get("torch_dtype"))
        self._file_keys = file_keys
        self._tensor_names: tuple[str, ...] | None = None
        for key, value in file_keys.items():
            if not self._stays_in_file(key):
                setattr(self, key, copy.deepcopy(value))
        for name, value in _standard_names(looped).items():
            if self.attribute_map.get(name, name) not in file_keys:
                setattr(self, name, value)

    def _stays_in_file(self, key: str) -> bool:
        return (
            key in _KEPT_IN_FILE
            or key in self.attribute_map
            or key in PreTrainedConfig.__dataclass_fields__
            or isinstance(getattr(type(self), key, None), property)
        )

    @property
    def looped(self) -> LoopedLMConfig:
        """The shape and the choices that the keys describe now."""
        return FAMILIES[self.model_type].read_config(self.to_dict(), self._tensor_names)

    def remember_tensors(self, names: Collection[str]) -> None:
        """Note the names in the checkpoint's files: Huginn's three kinds are told apart by them."""
        self._tensor_names = tuple(names)

    def to_dict(self) -> dict[str, Any]:
        return {
            key: copy.deepcopy(value if self._stays_in_file(key) else self.__dict__.get(key, value))
            for key, value in self._file_keys.items()
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration in `config_dict`, with some of its keys changed.

        Returns:
            The configuration; with `return_unused_kwargs=True` a tuple of it and the arguments that are no keys.

        Raises:
            ConfigError: for an argument that is no key of this config.json, unless they are returned.
        """
        returns_unused = kwargs.pop("return_unused_kwargs", False)
        for ours in ("_from_auto", "_from_pipeline"):
            kwargs.pop(ours, None)
        name_or_path = kwargs.pop("name_or_path", None)
        attention = kwargs.pop("attn_implementation", None)
        if attention not in (None, "sdpa"):
            raise ConfigError(f"attn_implementation={attention!r}: a looped model uses 'sdpa'; leave it out")
        dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or dtype
        changed = {}
        for key in list(kwargs):
            if (spelled := cls.attribute_map.get(key, key)) in config_dict:
                changed[spelled] = kwargs.pop(key)
        config = cls(**{key: value for key, value in {**config_dict, **changed}.items() if key != "model_type"})
        if name_or_path is not None:
            config.name_or_path = name_or_path
        if dtype not in (None, "auto"):
            config.dtype = dtype
        if returns_unused:
            return config, kwargs
        for key, value in kwargs.items():
            if value is not None:
                raise ConfigError(f"{key}={value!r}: {unknown_key(key, cls.attribute_map, config_dict)}")
        return config


def unknown_key(key: str, named: Collection[str], file_keys: Collection[str]) -> str:
    """What to say of an argument that is none of these names and no key of config.json."""
    near = difflib.get_close_matches(key, {*named, *file_keys}, n=1, cutoff=0.75)
    return f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(named)}, and the keys of config.json"


def _standard_names(looped: LoopedLMConfig) -> dict[str, Any]:
    return {
        "hidden_size": looped.width,
        "num_hidden_layers": looped.layers,
        "num_attention_heads": looped.heads,
        "num_key_value_heads": looped.kv_heads,
        "head_dim": looped.head_width,
        "intermediate_size": looped.mlp_width,
        "vocab_size": looped.vocab_size,
        "max_position_embeddings": looped.max_positions,
        "tie_word_embeddings": looped.tied_head,
        "num_loops": looped.loops,
    }


class LoopwiseConfig(LoopedPreTrainedConfig):
    """Our own family."""

    model_type = "loopwise"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_loops": "loops",
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head_width",
        "intermediate_size": "mlp_width",
        "max_position_embeddings": "max_positions",
        "tie_word_embeddings": "tied_head",
    }

    def __init__(self, **keys: Any) -> None:
        self._read(keys)


class OuroConfig(LoopedPreTrainedConfig):
    """Ouro's config.json."""

    model_type = "ouro"
    attribute_map: ClassVar[dict[str, str]] = {"num_loops": "total_ut_steps"}

    def __init__(self, **keys: Any) -> None:
        self._read(keys)


class HuginnRavenConfig(LoopedPreTrainedConfig):
    """The config.json of Huginn and of the retrofitted Raven models."""

    model_type = "huginn_raven"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_loops": "mean_recurrence",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "block_size",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **keys: Any) -> None:
        self._read(keys)


CONFIGS: dict[str, type[LoopedPreTrainedConfig]] = {
    kind.model_type: kind for kind in (LoopwiseConfig, OuroConfig, HuginnRavenConfig)
}
"""Family to configuration class."""
