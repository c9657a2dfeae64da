"""How one family of checkpoints names things: its config.json, its tensors, and where they go in a `LoopedLM`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from loopwise.errors import CheckpointError
from loopwise.models.config import LoopedLMConfig


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a checkpoint: rows `start` to `stop` of one of our parameters, seen in the family's shape."""

    name: str
    """The family's name."""
    parameter: str
    """Our parameter."""
    shape: tuple[int, ...]
    """The family's shape."""
    start: int = 0
    """First row of our parameter."""
    stop: int | None = None
    """Row after the last; None for the end."""

    def of(self, parameter: Tensor) -> Tensor:
        """The view of our parameter that this tensor fills."""
        return parameter[self.start : self.stop].view(self.shape)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Token ids with a role; None or empty when the checkpoint has none."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    """Any of these ends a generation."""
    pad: int | None = None


@dataclass(kw_only=True)
class Origin:
    """Where a model's weights came from, kept so that saving writes the same files back."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    """config.json as it was read."""
    folder: Path | None = None
    """Folder with tokenizer and other files."""
    spellings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For a tensor that has several names, the names that were in the file."""
    passengers: dict[str, Tensor] = field(default_factory=dict)
    """Stored tensors that the model computes itself (rotary tables), kept to be written back."""


@runtime_checkable
class Family(Protocol):
    """A translator between one family's files and ours. Stateless."""

    name: str
    """What `loopwise info` and `loopwise convert` call it."""
    chat_template: str | None
    """For checkpoints that bring none; None when the family has no convention."""
    chat_marks: tuple[str, ...]
    """Special tokens that this template writes; it is of no use to a vocabulary without them."""

    def reads(self, raw: Mapping[str, Any]) -> bool:
        """Whether this config.json is of the family."""
        ...

    def read_config(self, raw: Mapping[str, Any], tensors: Collection[str] | None) -> LoopedLMConfig:
        """Our configuration from theirs; `tensors` are the stored names, None when only config.json is there."""
        ...

    def write_config(self, config: LoopedLMConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Their configuration from ours, keeping keys of `raw` that we do not understand."""
        ...

    def entries(self, config: LoopedLMConfig) -> list[Entry]:
        """Every tensor that must be stored, in file order."""
        ...

    def spellings(self, config: LoopedLMConfig) -> dict[str, tuple[str, ...]]:
        """Other names under which an entry may be stored as well or instead."""
        ...

    def passengers(self, config: LoopedLMConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of tensors that may be stored although the model computes them."""
        ...

    def check_passenger(self, config: LoopedLMConfig, name: str, tensor: Tensor) -> None:
        """Refuse a passenger that contradicts what the model would compute.

        Raises:
            CheckpointError: when it does.
        """
        ...

    def special_tokens(self, raw: Mapping[str, Any]) -> SpecialTokens:
        """Token ids with a role, with the family's known mistakes mended."""
        ...


Kind = type[int] | type[float] | type[bool] | type[str]
_IN_WORDS: dict[Kind, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def need(raw: Mapping[str, Any], key: str, kind: Kind) -> Any:
    """A key of config.json that must be there and of this kind.

    Raises:
        CheckpointError: when it is missing or of another kind.
    """
    if key not in raw:
        raise CheckpointError(f"config.json has no {key!r}; this family needs it")
    value = raw[key]
    wrong_bool = isinstance(value, bool) and kind is not bool
    if wrong_bool or not isinstance(value, (int, float) if kind is float else kind):
        raise CheckpointError(f"config.json: {key}={value!r}; {_IN_WORDS[kind]} is needed")
    return kind(value)


def optional(raw: Mapping[str, Any], key: str, default: Any, kind: Kind) -> Any:
    """A key of config.json that may be missing or null.

    Raises:
        CheckpointError: when it is there and of another kind.
    """
    return default if raw.get(key) is None else need(raw, key, kind)


def section(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object inside config.json; empty when it is missing or null.

    Raises:
        CheckpointError: when it is there and no object.
    """
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"config.json: {key}={value!r}; an object is needed")
    return value or {}


def trained_range(raw: Mapping[str, Any], default: tuple[int, int]) -> tuple[int, int]:
    """Fewest and most trained loops, which no family but ours states: we keep them under `loopwise`.

    Raises:
        CheckpointError: when it is no pair of whole numbers.
    """
    stated = section(raw, "loopwise").get("trained_loops", list(default))
    if not isinstance(stated, list) or len(stated) != 2 or not all(type(bound) is int for bound in stated):
        raise CheckpointError(f"config.json: loopwise.trained_loops={stated!r}; [fewest, most] is needed")
    return stated[0], stated[1]


def special_ids(raw: Mapping[str, Any]) -> SpecialTokens:
    """bos, eos and pad as config.json states them (eos may be a list).

    Raises:
        CheckpointError: when one of them is no token id.
    """
    eos = raw.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(end) is int for end in ends):
        raise CheckpointError(f"config.json: eos_token_id={eos!r}; a token id or a list of them is needed")
    return SpecialTokens(
        bos=optional(raw, "bos_token_id", None, int),
        eos=tuple(ends),
        pad=optional(raw, "pad_token_id", None, int),
    )
