"""Checkpoints of Continuous Thought Machines, the authors' and our own.

The authors' format (SakanaAI/continuous-thought-machines, and their hub ids such as `SakanaAI/ctm-maze-large`) is a
config.json with the arguments of their constructor and a model.safetensors with the names of their modules. Their
older .pt files are pickles, which run code when they are read: they are refused.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from loopwise.configuration import from_dict, to_dict
from loopwise.errors import CheckpointError, ConfigError
from loopwise.hub.family import need, optional
from loopwise.hub.locate import locate, read_json
from loopwise.hub.matching import resolve_dtype
from loopwise.hub.shards import StoredTensor, list_tensors, read_tensors, write_tensors, write_text
from loopwise.models.ctm import CTM
from loopwise.models.ctm_config import CTMConfig
from loopwise.nn.synchronisation import pair_up, sides_of

CTMFamily = Literal["sakana", "loopwise"]
_OURS = "loopwise-ctm"
_SHARD_BYTES = 5 * 2**30
_WHOLE_NUMBERS = ("_pairs", "_neuron_indices_left", "_neuron_indices_right", ".num_batches_tracked")
_BACKBONES = {"none": "given", "parity_backbone": "parity"}
_RESNETS = ("resnet18-1", "resnet18-2", "resnet34-1", "resnet34-2")
_PAIRINGS = ("first-last", "random", "random-pairing")
_POSITIONS = {"none": "none", "custom-rotational-1d": "rotation"}
_ARGUMENTS = (
    "iterations",
    "d_model",
    "d_input",
    "heads",
    "n_synch_out",
    "n_synch_action",
    "synapse_depth",
    "memory_length",
    "deep_nlms",
    "memory_hidden_dims",
    "do_layernorm_nlm",
    "backbone_type",
    "positional_embedding_type",
    "out_dims",
    "prediction_reshaper",
    "dropout",
    "dropout_nlm",
    "neuron_select_type",
    "n_random_pairing_self",
)


def reads(raw: Mapping[str, Any]) -> bool:
    """Whether this config.json is a CTM's, the authors' or ours."""
    return raw.get("model_type") == _OURS or "backbone_type" in raw


def load_ctm(
    path_or_id: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> CTM:
    """A CTM from a folder or hub id, in eval mode.

    Args:
        path_or_id: a folder with config.json and safetensors, or a hub id.
        dtype: "float32", "bfloat16", ...; None keeps the checkpoint's.
        device: where the weights go.

    Raises:
        NotFoundError: when there is no such folder, or no safetensors in it (pickles are never read).
        CheckpointError: when the files are broken, or are of a machine that we cannot build.
    """
    folder = locate(path_or_id)
    raw = read_json(folder / "config.json")
    stored = list_tensors(folder)
    model = fitting(raw, stored)
    kind = resolve_dtype(dtype, weights_among(stored))
    tensors = dict(read_tensors(stored))
    if raw.get("model_type") != _OURS:
        # Of a tensor that theirs holds under two names only one may be stored; `fitting` saw to the rest.
        tensors = from_authors({**to_authors(model.state_dict(), model.config), **tensors}, model.config)
    model.load_state_dict(tensors)
    return model.to(device=device, dtype=kind).eval()


def weights_among(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensors but for those of whole numbers: the neurons of pairs, and counts of batches."""
    return {name: tensor for name, tensor in stored.items() if not name.endswith(_WHOLE_NUMBERS)}


def fitting(raw: Mapping[str, Any], stored: Mapping[str, StoredTensor] | None) -> CTM:
    """A new machine of the shape that config.json states, whose tensors are those that are stored.

    Args:
        stored: None when only config.json is there.

    Raises:
        CheckpointError: when config.json is of a machine that we cannot build, or does not fit the tensors.
    """
    shapes = None if stored is None else {name: tensor.shape for name, tensor in stored.items()}
    ours = raw.get("model_type") == _OURS
    config = _our_config(raw) if ours else read_config(raw, shapes)
    model = CTM(config)
    if shapes is None:
        return model
    wanted = model.state_dict() if ours else to_authors(model.state_dict(), config)
    # Theirs holds one tensor under two names here; safetensors keeps one of them, and which may differ.
    spare = set() if ours or config.pairing != "first-last" else {name for name in wanted if "neuron_indices" in name}
    missing = sorted(wanted.keys() - shapes.keys() - spare)
    unknown = sorted(shapes.keys() - wanted.keys() - spare)
    if missing or unknown:
        told = [f"without {', '.join(missing[:3])}"] * bool(missing) + [f"with {', '.join(unknown[:3])}"] * bool(
            unknown
        )
        raise CheckpointError(f"the checkpoint holds tensors {' and '.join(told)}, which does not fit its config.json")
    for name, shape in shapes.items():
        if name in wanted and shape != tuple(wanted[name].shape):
            right = tuple(wanted[name].shape)
            raise CheckpointError(f"{name} has shape {shape}; config.json asks for {right}")
    return model


def save_ctm(model: CTM, folder: str | Path, *, family: CTMFamily = "sakana") -> None:
    """Write a CTM so that the authors' code reads it, or, with `family="loopwise"`, any CTM in our own format.

    Raises:
        ConfigError: when the machine has a part that the authors' code has not.
        StorageError: when the disk refuses.
    """
    if family not in ("sakana", "loopwise"):
        raise ConfigError(f"family={family!r}; allowed are sakana, loopwise")
    config, state = model.config, {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if family == "loopwise":
        raw, tensors = {"model_type": _OURS, **to_dict(config)}, state
    else:
        raw, tensors = write_config(config), to_authors(state, config)
        if config.pairing == "first-last":
            tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("indices_right")}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, tensors, shard_bytes=_SHARD_BYTES)
    write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")


def read_config(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None) -> CTMConfig:
    """Our configuration from the authors' arguments; what theirs finds at the first call is read from the shapes.

    Args:
        shapes: of the stored tensors; None when only config.json is there.

    Raises:
        CheckpointError: when it is no CTM's, or one with parts that we do not have.
    """
    unknown = sorted(key for key, value in raw.items() if key not in _ARGUMENTS and value not in (None, False))
    if unknown:
        raise CheckpointError(f"config.json: unknown {', '.join(unknown)}; a CTM's keys are {', '.join(_ARGUMENTS)}")
    backbone = need(raw, "backbone_type", str)
    kind = backbone if backbone in _RESNETS else _BACKBONES.get(backbone)
    if kind is None:
        known = ", ".join((*_BACKBONES, *_RESNETS))
        raise CheckpointError(f"config.json: backbone_type={backbone!r} is not built here; there are {known}")
    positions = optional(raw, "positional_embedding_type", "none", str)
    if positions not in _POSITIONS:
        raise CheckpointError(
            f"config.json: positional_embedding_type={positions!r} is not built here; there are {', '.join(_POSITIONS)}"
        )
    pairing = optional(raw, "neuron_select_type", "random-pairing", str)
    if pairing not in _PAIRINGS:
        raise CheckpointError(f"config.json: neuron_select_type={pairing!r}; allowed are {', '.join(_PAIRINGS)}")
    classes, places = need(raw, "out_dims", int), None
    shape = raw.get("prediction_reshaper", [-1])
    if shape != [-1]:
        fits = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
        if not fits or shape[0] * shape[1] != classes:
            raise CheckpointError(
                f"config.json: prediction_reshaper={shape!r} with out_dims={classes}; [-1], or [places, classes] whose "
                "product is out_dims, is needed"
            )
        places, classes = shape
    entry = {"given": "kv_proj.0.weight", "parity": None}.get(kind, "initial_rgb.weight")
    if entry is not None and shapes is None:
        raise CheckpointError(
            f"config.json of a CTM with backbone_type={backbone!r} does not tell the channels of its input; its "
            "weights do, and they are not here: put *.safetensors beside it, or fetch them with loopwise.load"
        )
    channels = None if entry is None or shapes is None else shapes.get(entry, ())
    if channels is not None and len(channels) < 2:
        raise CheckpointError(f"the checkpoint has no matrix {entry}, which backbone_type={backbone!r} needs")
    deep = optional(raw, "deep_nlms", True, bool)
    if need(raw, "heads", int) == 0:
        raise CheckpointError("config.json: heads=0; a CTM without attention (the authors' sorter) is not built here")
    try:
        return CTMConfig(
            ticks=need(raw, "iterations", int),
            neurons=need(raw, "d_model", int),
            width=need(raw, "d_input", int),
            heads=need(raw, "heads", int),
            memory=need(raw, "memory_length", int),
            classes=classes,
            places=places,
            neuron_models="deep" if deep else "shallow",
            neuron_hidden=need(raw, "memory_hidden_dims", int) if deep else None,
            neuron_norm=optional(raw, "do_layernorm_nlm", False, bool),
            synapse_depth=need(raw, "synapse_depth", int),
            pairing=pairing,
            out_neurons=need(raw, "n_synch_out", int),
            action_neurons=need(raw, "n_synch_action", int),
            # Their scripts leave a number there that other pairings do not look at.
            self_pairs=optional(raw, "n_random_pairing_self", 0, int) if pairing == "random-pairing" else 0,
            backbone=kind,  # type: ignore[arg-type]
            channels=None if channels is None else channels[1],
            positions=_POSITIONS[positions],  # type: ignore[arg-type]
            dropout=optional(raw, "dropout", 0.0, float),
            neuron_dropout=optional(raw, "dropout_nlm", None, float),
        )
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from None


def write_config(config: CTMConfig) -> dict[str, Any]:
    """The authors' arguments from our configuration.

    Raises:
        ConfigError: when theirs has no such part.
    """
    backbones = {ours: theirs for theirs, ours in _BACKBONES.items()} | {kind: kind for kind in _RESNETS}
    lacking = (
        f"backbone={config.backbone!r}" * (config.backbone not in backbones)
        or "pairing='none'" * (config.pairing == "none")
        or "neuron_models='none'" * (config.neuron_models == "none")
        or "positions='rotation' for given features" * (config.positions != "none" and config.backbone == "given")
    )
    if lacking:
        raise ConfigError(f"the authors' CTM has no {lacking}; type: save_ctm(model, folder, family='loopwise')")
    places = config.places
    return {
        "iterations": config.ticks,
        "d_model": config.neurons,
        "d_input": config.width,
        "heads": config.heads,
        "n_synch_out": config.out_neurons,
        "n_synch_action": config.action_neurons,
        "synapse_depth": config.synapse_depth,
        "memory_length": config.memory,
        "deep_nlms": config.neuron_models == "deep",
        "memory_hidden_dims": config.neuron_hidden or 1,
        "do_layernorm_nlm": config.neuron_norm,
        "backbone_type": backbones[config.backbone],
        "positional_embedding_type": {ours: theirs for theirs, ours in _POSITIONS.items()}[config.positions],
        "out_dims": config.classes * (places or 1),
        "prediction_reshaper": [-1] if places is None else [places, config.classes],
        "dropout": config.dropout,
        "dropout_nlm": config.neuron_dropout,
        "neuron_select_type": config.pairing,
        "n_random_pairing_self": config.self_pairs,
    }


def to_authors(state: Mapping[str, Tensor], config: CTMConfig) -> dict[str, Tensor]:
    """Our tensors under the authors' names and in their shapes."""
    found: dict[str, Tensor] = {}
    for place in _places(state, config):
        found[place.theirs] = place.to_theirs(state[place.ours])
    for part in ("weight", "bias"):
        stacked = [state[f"attention.{name}.{part}"] for name in ("query", "key", "value")]
        found[f"attention.in_proj_{part}"] = torch.cat(stacked)
    for name, chosen in (("out", config.out_neurons), ("action", config.action_neurons)):
        sides = sides_of(config.pairing, state[f"{name}_pairs"], chosen)
        found[f"{name}_neuron_indices_left"], found[f"{name}_neuron_indices_right"] = sides[0].clone(), sides[1].clone()
    return found


def from_authors(tensors: Mapping[str, Tensor], config: CTMConfig) -> dict[str, Tensor]:
    """The inverse of `to_authors`.

    Raises:
        CheckpointError: when the chosen neurons are none of this machine's.
    """
    ours = CTM(config).state_dict()
    found = {place.ours: place.to_ours(tensors[place.theirs]) for place in _places(ours, config)}
    for part in ("weight", "bias"):
        for name, piece in zip(("query", "key", "value"), tensors[f"attention.in_proj_{part}"].chunk(3), strict=True):
            found[f"attention.{name}.{part}"] = piece
    for name in ("out", "action"):
        sides = torch.stack([tensors[f"{name}_neuron_indices_{side}"] for side in ("left", "right")])
        pairs = found[f"{name}_pairs"] = pair_up(config.pairing, sides)
        if sides.min() < 0 or sides.max() >= config.neurons:
            raise CheckpointError(f"{name}_neuron_indices name neurons beyond the {config.neurons} that there are")
        if config.pairing == "first-last" and not torch.equal(pairs, ours[f"{name}_pairs"]):
            raise CheckpointError(f"{name}_neuron_indices are not the neurons that first-last takes")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """One tensor of ours that is one of theirs."""

    ours: str
    theirs: str
    to_theirs: Callable[[Tensor], Tensor] = lambda tensor: tensor
    to_ours: Callable[[Tensor], Tensor] = lambda tensor: tensor


_PREFIXES = (
    ("backbone.rgb.", "initial_rgb."),
    ("backbone.stages.0.", "backbone.layer1."),
    ("backbone.stages.1.", "backbone.layer2."),
    ("positions.", "positional_embedding."),
    ("features.", "kv_proj."),
    ("query.", "q_proj."),
    ("attention.out.", "attention.out_proj."),
    ("synapses.linear.", "synapses.1."),
    ("synapses.norm.", "synapses.3."),
    ("synapses.skip_norms.", "synapses.skip_lns."),
    ("start_activity", "start_activated_state"),
    ("start_history", "start_trace"),
    ("out_decay", "decay_params_out"),
    ("action_decay", "decay_params_action"),
    ("head.", "output_projector.0."),
)


def _places(state: Mapping[str, Tensor], config: CTMConfig) -> list[_Place]:
    """Where each tensor of ours stands in theirs, but for those that are stacked or computed."""
    special = ("attention.query.", "attention.key.", "attention.value.", "out_pairs", "action_pairs")
    return [_place(name) for name in state if not name.startswith(special)]


def _place(name: str) -> _Place:
    head, *rest = name.split(".")
    if head == "neuron_models":
        layer, part = f"trace_processor.0.{2 * int(rest[1])}", ".".join(rest[2:])
        if part == "weight":
            return _Place(
                ours=name,
                theirs=f"{layer}.w1",
                to_theirs=lambda tensor: tensor.permute(2, 1, 0).contiguous(),
                to_ours=lambda tensor: tensor.permute(2, 1, 0),
            )
        if part == "bias":
            return _Place(
                ours=name,
                theirs=f"{layer}.b1",
                to_theirs=lambda tensor: tensor[None],
                to_ours=lambda tensor: tensor[0],
            )
        return _Place(
            ours=name, theirs=f"{layer}.{'T' if part == 'temperature' else part.replace('norm', 'layernorm')}"
        )
    if head == "synapses" and rest[0] in ("first", "down", "up"):
        # Theirs are sequences: the first one has no dropout in front.
        first = rest[0] == "first"
        block, layer = ("first_projection", rest[1]) if first else (f"{rest[0]}_projections.{rest[1]}", rest[2])
        number = {"linear": 0, "norm": 1}[layer] + (0 if first else 1)
        return _Place(ours=name, theirs=f"synapses.{block}.{number}.{rest[-1]}")
    for ours, theirs in _PREFIXES:
        if name.startswith(ours):
            return _Place(ours=name, theirs=theirs + name.removeprefix(ours))
    return _Place(ours=name, theirs=name)


def _our_config(raw: Mapping[str, Any]) -> CTMConfig:
    try:
        return from_dict(CTMConfig, {key: value for key, value in raw.items() if key != "model_type"})
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from None
