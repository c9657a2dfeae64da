"""Results as data: every array with the names of its axes, read off its own annotation.

A result is a frozen dataclass whose arrays are annotated as `Float[np.ndarray, "loops units"]`. The names in that
string are the axes, so that they are written once and checked by the tests' jaxtyping option.
"""

import math
import typing
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def axes_of(cls: type) -> dict[str, tuple[str, ...]]:
    """Field to axis names, for each field of a dataclass that holds an array (or may hold None instead)."""
    found = {}
    for name, annotation in typing.get_type_hints(cls).items():
        for part in (annotation, *typing.get_args(annotation)):
            text = getattr(part, "dim_str", None)
            if text is not None:
                found[name] = tuple(text.split())
    return found


def as_data(result: Any) -> Any:
    """A result as JSON can hold it: arrays become {"axes", "values"}, what is not finite becomes null."""
    if is_dataclass(result) and not isinstance(result, type):
        axes = axes_of(type(result))
        return {field.name: _field(getattr(result, field.name), axes.get(field.name)) for field in fields(result)}
    if isinstance(result, dict):
        return {str(key): as_data(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [as_data(value) for value in result]
    if isinstance(result, np.ndarray):
        return as_data(result.tolist())
    if isinstance(result, np.generic):
        return as_data(result.item())
    if isinstance(result, float) and not math.isfinite(result):
        return None
    return result


def _field(value: Any, axes: tuple[str, ...] | None) -> Any:
    if axes is None or not isinstance(value, np.ndarray):
        return as_data(value)
    return {"axes": list(axes), "values": as_data(value.tolist())}
