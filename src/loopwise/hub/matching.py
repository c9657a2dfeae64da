"""Put stored tensors where they belong: every name and shape is checked before a byte is read."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loopwise.errors import CheckpointError, CheckpointWarning, ConfigError
from loopwise.hub.family import Entry
from loopwise.hub.shards import StoredTensor, read_tensors
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_NAMES = 5


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a checkpoint of a known shape must, may and need not hold."""

    title: str
    """What messages call it."""
    entries: list[Entry]
    """Tensors that must be there."""
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other names under which an entry may be stored as well or instead."""
    passengers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Names and shapes of tensors that may be there and fill no parameter."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one stored tensor goes."""

    entry: Entry
    repeats: bool
    """Whether it is only another copy, to be compared with the first."""


def match(layout: Layout, stored: Mapping[str, StoredTensor]) -> dict[str, Place]:
    """The place of each stored tensor that fills a parameter.

    Raises:
        CheckpointError: one line with all that is unexpected, missing and misshapen.
    """
    places: dict[str, Place] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for entry in layout.entries:
        names = [name for name in (entry.name, *layout.spellings.get(entry.name, ())) if name in stored]
        if not names:
            missing.append(entry.name)
        for name in names:
            places[name] = Place(entry=entry, repeats=name != names[0])
            misshapen += _misshapen(name, stored[name], entry.shape)
    for name, shape in layout.passengers.items():
        if name in stored:
            misshapen += _misshapen(name, stored[name], shape)
    unexpected = sorted(stored.keys() - places.keys() - layout.passengers.keys())
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:_MOST_NAMES])}{', ...' if len(names) > _MOST_NAMES else ''})"
        for kind, names in (("unexpected", unexpected), ("missing", missing), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the tensors are not those that config.json ({layout.title}) implies: {'; '.join(problems)}"
        )
    return places


def _misshapen(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> list[str]:
    return [] if stored.shape == shape else [f"{name} is {list(stored.shape)} and should be {list(shape)}"]


def build(
    config: LoopedLMConfig,
    layout: Layout,
    stored: Mapping[str, StoredTensor],
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device,
    passenger: Callable[[str, Tensor], None],
) -> LoopedLM:
    """A model with the stored weights. Parameters that no entry names are left unset.

    Args:
        dtype: None keeps the stored one.
        passenger: called with each stored passenger.

    Raises:
        CheckpointError: when names, shapes, dtypes or copies of one tensor do not agree.
        ConfigError: for a dtype that weights cannot have.
    """
    places = match(layout, stored)
    with torch.device("meta"):
        model = LoopedLM(config)
    model = model.to(resolve_dtype(dtype, {name: stored[name] for name in places})).to_empty(device=device)
    parameters = dict(model.named_parameters())
    wanted = {name: stored[name] for name in stored if name in places and not places[name].repeats}
    repeats = {name: stored[name] for name in stored if name in places and places[name].repeats}
    riding = {name: stored[name] for name in stored if name in layout.passengers}
    with torch.no_grad():
        for name, tensor in read_tensors(riding):
            passenger(name, tensor)
        for name, tensor in read_tensors(wanted):
            entry = places[name].entry
            entry.of(parameters[entry.parameter]).copy_(tensor)
        for name, tensor in read_tensors(repeats):
            entry = places[name].entry
            kept = entry.of(parameters[entry.parameter])
            if not torch.equal(kept, tensor.to(kept)):
                raise CheckpointError(
                    f"{name} and {entry.name} are tied in config.json but differ in the file; untie them or remove one"
                )
    return model.eval()


def resolve_dtype(asked: str | torch.dtype | None, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype to load as.

    Raises:
        CheckpointError: when a tensor is stored as something that is no weight (quantised, integer).
        ConfigError: for an unknown dtype.
    """
    for name, tensor in stored.items():
        if tensor.dtype is None:
            raise CheckpointError(
                f"{name} is stored in a dtype that weights do not have (quantised?); allowed are {', '.join(DTYPES)}"
            )
    if asked is not None:
        found = DTYPES.get(asked) if isinstance(asked, str) else asked
        if found is None or found not in DTYPES.values():
            raise ConfigError(f"dtype={str(asked).removeprefix('torch.')}: allowed are {', '.join(DTYPES)}")
        return found
    kinds = [tensor.dtype for tensor in stored.values() if tensor.dtype is not None]
    if len(set(kinds)) > 1:
        listed = ", ".join(sorted({str(kind).removeprefix("torch.") for kind in kinds}))
        warnings.warn(
            f"the checkpoint mixes {listed}; everything is loaded as {str(kinds[0]).removeprefix('torch.')}, "
            "the embeddings' dtype; give dtype=... to choose another",
            CheckpointWarning,
            stacklevel=4,
        )
    return kinds[0]
