"""A checkpoint of any kind that is read here: a language model's, a Continuous Thought Machine's, a TRM's or HRM's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from loopwise.errors import CheckpointError
from loopwise.hub import checkpoints, ctm, trm
from loopwise.hub.checkpoints import FAMILIES, Weights
from loopwise.hub.locate import locate, read_json
from loopwise.hub.shards import StoredTensor
from loopwise.models.ctm import CTM
from loopwise.models.looped_lm import LoopedLM
from loopwise.models.trm import TRM

Kind = Literal["language model", "ctm", "trm"]


def kind_of(raw: Mapping[str, Any]) -> Kind:
    """What a config.json describes; an HRM is a `trm`.

    Raises:
        CheckpointError: when it is none of ours.
    """
    if any(family.reads(raw) for family in FAMILIES.values()):
        return "language model"
    if ctm.reads(raw):
        return "ctm"
    if trm.reads(raw):
        return "trm"
    raise CheckpointError(
        f"config.json: model_type={raw.get('model_type')!r}; supported are {', '.join(FAMILIES)}, a CTM, a TRM and an "
        "HRM (a plain llama or olmo2 becomes a looped model with: loopwise convert SOURCE TARGET retrofit=4,8,4)"
    )


def load(
    path_or_id: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> LoopedLM | CTM | TRM:
    """Load a model of any supported kind, in eval mode.

    Typed code that wants one kind alone narrows the answer with `isinstance`, or takes that kind's own reader:
    `hub.checkpoints.load`, `hub.ctm.load_ctm`, `hub.trm.load_trm`.

    Args:
        path_or_id: a folder with config.json and safetensors, a run's folder, or a hub id (cached; `HF_HUB_OFFLINE=1`
            is respected).
        dtype: "float32", "bfloat16", ...; None keeps the checkpoint's.
        device: where the weights go.

    Raises:
        NotFoundError: when there is no such checkpoint, or only a pickle.
        CheckpointError: when it is of no kind we know, a tensor is missing, unexpected or misshapen, or a file is
            corrupt.
    """
    match kind_of(read_json(locate(path_or_id) / "config.json")):
        case "ctm":
            return ctm.load_ctm(path_or_id, dtype=dtype, device=device)
        case "trm":
            return trm.load_trm(path_or_id, dtype=dtype, device=device)
        case "language model":
            return checkpoints.load(path_or_id, dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is known of a checkpoint of a CTM, TRM or HRM without reading its weights."""

    folder: Path
    family: Literal["ctm", "trm", "hrm"]
    machine: CTM | TRM
    """A new one of the same shape; its numbers mean nothing."""
    weights: Weights | None
    """None when they are absent or broken."""
    problem: str | None
    """What is wrong with the weights; None when they are whole, or not there at all."""


def inspect(path_or_id: str | Path) -> checkpoints.Inspection | Inspection:
    """Look at a checkpoint of any kind: its config.json, and its weights' headers if they are there.

    Raises:
        NotFoundError: when there is no such folder, hub id or config.json.
        CheckpointError: when config.json is of no kind we know, cannot be read, or does not say enough without weights.
    """
    folder = locate(path_or_id, weights=False)
    raw = read_json(folder / "config.json")
    kind = kind_of(raw)
    if kind == "language model":
        return checkpoints.inspect(path_or_id)
    stored, problem = checkpoints.headers(folder)
    try:
        machine = _fitting(kind, raw, stored)
    except CheckpointError as error:
        stored, problem = None, problem or str(error)
        try:
            machine = _fitting(kind, raw, None)
        except CheckpointError:
            raise CheckpointError(problem) from None
    return Inspection(
        folder=folder,
        family="ctm" if isinstance(machine, CTM) else "hrm" if machine.config.answer_layers else "trm",
        machine=machine,
        weights=None if stored is None else _weights(folder, stored),
        problem=problem,
    )


def _weights(folder: Path, stored: Mapping[str, StoredTensor]) -> Weights:
    weights = checkpoints.weigh(folder, stored)
    # A CTM stores whole numbers too, which are no weights.
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in ctm.weights_among(stored).values()}
    return replace(weights, dtypes=tuple(sorted(kinds)))


def _fitting(kind: Kind, raw: Mapping[str, Any], stored: Mapping[str, StoredTensor] | None) -> CTM | TRM:
    return ctm.fitting(raw, stored) if kind == "ctm" else trm.fitting(raw, stored)[0]
