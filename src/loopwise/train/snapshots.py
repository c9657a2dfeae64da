"""Where a training loop stands, kept and taken over exactly: weights, moments, averages, and whatever its owner adds.

`run.py` keeps more than this; the small loops (`fit.py`, `deep_supervision.py`) share it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopwise.errors import CheckpointError
from loopwise.train import checkpoint
from loopwise.train.ema import Ema
from loopwise.train.optimizers import Optimizer

KEPT = 2
"""Newest checkpoints that stay: one could be torn by a power cut."""


def save_snapshot(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    ema: Ema | None,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint after `step` optimiser steps; `tensors` and `meta` are the owner's own.

    Raises:
        StorageError: the disk refuses.
    """
    moments = checkpoint.flatten(optimizer.state(), "optimizer")
    average = checkpoint.flatten(ema.state() if ema is not None else {}, "ema")
    weights = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    whole = {**weights, **moments.tensors, **average.tensors, **(tensors or {})}
    told = {"optimizer": moments.skeleton, "ema": average.skeleton, **(meta or {})}
    checkpoint.save(folder, step, whole, told, keep=KEPT)


def newest_snapshot(folder: Path) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint; None where nothing was ever kept.

    Raises:
        CheckpointError: all that there are are broken.
    """
    found = checkpoint.newest(folder)
    if found is None and checkpoint.steps(folder):
        raise CheckpointError(f"every checkpoint in {folder} is broken; remove the folder to train from step 0")
    return found


def take_over(found: checkpoint.Checkpoint, model: nn.Module, optimizer: Optimizer, ema: Ema | None) -> None:
    """Weights, moments and averages become those of a checkpoint.

    Raises:
        CheckpointError: it is of another model.
    """
    put_weights(model, {name: found.tensors.get(f"model/{name}") for name in model.state_dict()}, found.path.parent)
    optimizer.load_state(checkpoint.unflatten(found.tensors, found.meta["optimizer"]))
    if ema is not None:
        ema.load_state(checkpoint.unflatten(found.tensors, found.meta["ema"]))


@torch.no_grad()
def put_weights(model: nn.Module, values: Mapping[str, Tensor | None], folder: Path | None = None) -> None:
    """Write values into the model's own tensors, in place."""
    own = model.state_dict()
    for name, value in values.items():
        if value is None or value.shape != own[name].shape:
            raise CheckpointError(f"the checkpoints in {folder} are of another model ({name} differs); remove them")
        own[name].copy_(value)
