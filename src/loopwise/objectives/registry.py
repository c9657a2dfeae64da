"""Objectives by name: `last`, `expected`, `every`, `calibrate`, `random-depth`, with settings if need be.

expected:beta=0.05,uniform_until=0.5
"""

import dataclasses
import math
from difflib import get_close_matches
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_type_hints

from loopwise.errors import ConfigError
from loopwise.objectives.base import Objective
from loopwise.objectives.calibration import Calibration
from loopwise.objectives.every_loop import EveryLoop
from loopwise.objectives.expected import ExpectedLoss
from loopwise.objectives.last_loop import LastLoop
from loopwise.objectives.random_depth import RandomDepth

OBJECTIVES: MappingProxyType[str, type[Objective]] = MappingProxyType(
    {kind.name: kind for kind in (LastLoop, ExpectedLoss, EveryLoop, Calibration, RandomDepth)}
)
"""Name to class."""


def build_objective(objective: str | Objective, **settings: Any) -> Objective:
    """An objective from its short text, an objective, or either with settings changed.

    Args:
        objective: `name` or `name:key=value,key=value`, or an objective.
        settings: fields of the objective, as values or as text; they win over those in the text.

    Raises:
        ConfigError: an unknown name or setting (with the nearest right one), or a value that is not allowed.
    """
    if isinstance(objective, Objective):
        kind = type(objective)
        given: dict[str, Any] = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    else:
        name, _, text = objective.strip().partition(":")
        if name not in OBJECTIVES:
            raise ConfigError(f"no objective {name!r}; there are {_choices(name, list(OBJECTIVES))}")
        kind = OBJECTIVES[name]
        given = {}
        for setting in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = (part.strip() for part in setting.partition("="))
            if not equals:
                raise ConfigError(f"objective setting {setting!r} is not key=value; type for example {name}:loops=4")
            given[key] = value
    known = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    merged = {**given, **settings}
    for key, value in merged.items():
        if key not in names:
            raise ConfigError(f"objective {kind.name} has no setting {key!r}; there are {_choices(key, names)}")
        merged[key] = _convert(kind.name, key, value, known[key])
    return kind(**merged)


def _choices(given: str, right: list[str]) -> str:
    near = get_close_matches(given, right, n=1)
    return ", ".join(right) + (f"; did you mean {near[0]!r}?" if near else "")


def _convert(objective: str, key: str, value: Any, hint: Any) -> Any:
    """A value of the field's type; numbers may be given as text, None as `none`."""
    kinds = get_args(hint) or (hint,)
    if NoneType in kinds and (value is None or value == "none"):
        return None
    if not {int, float} & set(kinds):
        return value
    try:
        number = float(value)
        if isinstance(value, bool) or not math.isfinite(number) or (float not in kinds and number != int(number)):
            raise ValueError
        return number if float in kinds else int(number)
    except (TypeError, ValueError, OverflowError):
        wanted = "a number" if float in kinds else "a whole number"
        also = " or none" if NoneType in kinds else ""
        default = str(getattr(OBJECTIVES[objective], key)).lower()
        raise ConfigError(
            f"objective {objective}: {key}={value!r} is not {wanted}{also}; the default is {key}={default}"
        ) from None
