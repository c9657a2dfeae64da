"""The protocol of a model that thinks in loops: five methods and a few declared facts.

A *unit* is what can stop on its own: a sample, a position of a sample, or a token. A model whose units are samples
needs no more than the five methods; one whose units are finer also says how to lay them out as rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

SignalKind = Literal["hazard", "halt_logit", "certainty", "delta"]
Unit = Literal["token", "position", "sample"]


@dataclass(frozen=True, kw_only=True)
class LoopFacts:
    """What a model declares about itself."""

    unit: Unit
    """What can stop on its own."""
    signal: SignalKind | None
    """Kind of number that `signal` returns; None when the model has none."""
    signal_reads: Literal["state", "prediction"] = "state"
    """Whether the signal needs the readout; a driver skips readouts that nobody needs."""
    anytime: bool
    """Whether readouts before the last loop were trained."""
    trained_loops: tuple[int, int]
    """Fewest and most loops seen in training."""
    random_start: bool
    """Whether the start state is drawn from a seed."""
    loop_dependent: bool
    """Whether parameters depend on the loop index."""
    readout_mixes: bool
    """Whether the readout of one unit looks at other units (a coda with attention)."""


class LoopModel(nn.Module, ABC):
    """Base of every model. `Context` and `State` are tensors or nests of tensors that the model chooses."""

    facts: LoopFacts

    @abstractmethod
    def encode(self, inputs: Any, **options: Any) -> Any:
        """Everything computed once per input; read-only afterwards."""

    @abstractmethod
    def initial_state(self, context: Any, start: Any = None) -> Any:
        """The state before loop 1. `start` is None (the model's own), an int seed, "zero" or a state."""

    @abstractmethod
    def step(self, state: Any, context: Any, loop: int) -> Any:
        """One loop, counted from 1: a pure function of parameters, state, context and loop index."""

    @abstractmethod
    def readout(self, state: Any, context: Any) -> Tensor:
        """The prediction made from a state."""

    @abstractmethod
    def signal(self, state: Any, prediction: Tensor | None) -> Tensor | None:
        """One number per unit that may inform stopping, in float32 or wider; None when the model has none.

        `prediction` may be None unless `facts.signal_reads` is "prediction".
        """

    def open_rows(self, state: Any, context: Any) -> tuple[Any, Any]:
        """Lay units out along the leading axis, so that some can leave. Samples already are."""
        return state, context

    def keep_rows(self, state: Any, context: Any, index: Tensor) -> tuple[Any, Any]:
        """Keep only the rows in `index`; the others leave the computation."""
        return select(state, index), select(context, index)

    def close_rows(self, rows: Any, context: Any) -> Any:
        """Undo `open_rows` on a state that holds every unit again."""
        return rows

    def open_units(self, units: Tensor, context: Any) -> Tensor:
        """Undo the row layout for one number per unit: (N,) -> (units...)."""
        return units


def tree_map(apply: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a nest of dataclasses, tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return apply(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: tree_map(apply, getattr(tree, f.name)) for f in fields(tree) if f.init})
    if isinstance(tree, tuple):
        parts = [tree_map(apply, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [tree_map(apply, part) for part in tree]
    if isinstance(tree, dict):
        return {key: tree_map(apply, part) for key, part in tree.items()}
    return tree


def stack(trees: Sequence[Any]) -> Any:
    """Equal nests as one, stacked along a new leading axis of every tensor."""
    columns: list[list[Tensor]] = [_tensors(tree) for tree in trees]
    stacked = iter([torch.stack(tensors) for tensors in zip(*columns, strict=True)])
    return tree_map(lambda _: next(stacked), trees[0])


def select(tree: Any, index: Tensor) -> Any:
    """Rows `index` of every tensor in a nest."""
    return tree_map(lambda tensor: tensor[index], tree)


def scatter(tree: Any, rows: Any, index: Tensor) -> None:
    """Write `rows` into places `index` of every tensor in a nest, in place; the two nests have one shape."""
    if isinstance(tree, Tensor):
        tree[index] = rows
    elif is_dataclass(tree) and not isinstance(tree, type):
        for field in fields(tree):
            scatter(getattr(tree, field.name), getattr(rows, field.name), index)
    elif isinstance(tree, tuple | list):
        for part, row in zip(tree, rows, strict=True):
            scatter(part, row, index)
    elif isinstance(tree, dict):
        for key, part in tree.items():
            scatter(part, rows[key], index)


def leaves(tree: Any) -> list[Tensor]:
    """Every tensor of a nest, in the order of `tree_map`."""
    found: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    tree_map(remember, tree)
    return found


def _tensors(tree: Any) -> list[Tensor]:
    found = leaves(tree)
    if not found:
        raise TypeError("a state holds at least one tensor")
    return found


def first_tensor(tree: Any) -> Tensor:
    """The first tensor of a nest, to learn batch size and device from."""
    return _tensors(tree)[0]


def flat_state(tree: Any) -> Tensor:
    """A nest as one (N, features) tensor, for rules that measure how far a state moved."""
    parts = [tensor.reshape(tensor.shape[0], -1) for tensor in _tensors(tree)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
