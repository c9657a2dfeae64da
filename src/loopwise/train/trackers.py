"""Trackers: where metrics go beside the run's own JSON lines. Each is loaded only when it is asked for."""

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from loopwise.errors import ConfigError, MissingExtraError

NAMES = ("wandb", "trackio", "tensorboard")


@runtime_checkable
class Tracker(Protocol):
    """Anything that takes metrics."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Takes the metrics of `step` (optimiser steps completed); nested ones become `loss_by_loop/1` and so on."""

    def close(self) -> None:
        """Hands over what is still buffered; nothing is logged afterwards."""


def build_trackers(
    names: Sequence[str], *, folder: str | Path, project: str, run: str, config: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers of a run, by name: `wandb`, `trackio`, `tensorboard`.

    `folder` is the run folder (event files go there), `config` the resolved configuration shown beside the curves.
    `run` must be unique within `project`: a resumed run continues the curves of that name, and replayed steps, which
    are equal, are not drawn twice.
    Raises `ConfigError` for an unknown name and `MissingExtraError` (with the command) if the package is missing.
    """
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"tracker {name!r} is unknown; use any of: {', '.join(NAMES)}")
    modules = {name: _import(name) for name in names}
    return [
        _TensorBoard(modules[name], Path(folder) / "tensorboard")
        if name == "tensorboard"
        else _Board(
            modules[name].init(
                project=project,
                name=run,
                config=dict(config),
                resume="allow",
                **({"id": run, "dir": str(folder)} if name == "wandb" else {}),
            )
        )
        for name in names
    ]


def scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in a nest of metrics, with their path as name; positions in lists count from 1, as loops do.

    Text and None are left out: trackers draw curves.
    """
    found: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= scalars(value, f"{name}/")
        elif isinstance(value, list | tuple):
            found |= scalars({str(index): inner for index, inner in enumerate(value, start=1)}, f"{name}/")
        elif isinstance(value, bool | int | float):
            found[name] = float(value)
    return found


class _Board:
    """A wandb run, or a trackio run, which speaks the same language."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, Any], step: int) -> None:
        # Boards choke on NaN in different ways; metrics.jsonl keeps it.
        self._run.log({name: value for name, value in scalars(values).items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    """Event files for `tensorboard --logdir`."""

    def __init__(self, module: Any, folder: Path) -> None:
        self._writer = module.SummaryWriter(log_dir=str(folder))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        for name, value in scalars(values).items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        self._writer.close()


def _import(name: str) -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise MissingExtraError(name, name) from error
