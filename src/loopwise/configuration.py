"""Configuration from a file and `key=value` words: dataclasses in, one complete dataclass out.

    build(TrainConfig, Path("run.toml"), ["loops=4", "optimiser.rate=3e-4", "layers=[2, 4]"])

The types come from the annotations of the dataclass, so there is no flag per field and nothing to keep in step.
(tyro and jsonargparse make every field a flag; OmegaConf has dotted words but neither Literal nor tuples, and
guesses at nothing when a key is misspelt; pydantic checks well but has no words.) Allowed annotations: int, float,
bool, str, Path, None, Literal, unions, tuple, list, dict with str keys, and dataclasses of these.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from loopwise.errors import ConfigError, NotFoundError

Config = TypeVar("Config")


def build(cls: type[Config], file: Path | None, overrides: Sequence[str], base: Config | None = None) -> Config:
    """The configuration that `file` (JSON or TOML) and then `overrides` (`key=value`, dots for nested keys) describe.

    What neither names keeps its value of `base`, or its default. Raises ConfigError for an unknown key, a wrong
    type, a key given twice and a missing value; NotFoundError for a missing file.
    """
    data = read(file) if file is not None else {}
    given: list[str] = []
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            allowed = ", ".join(field.name for field in _fields(cls))
            raise ConfigError(f"{word!r} gives no value; type: key=value; allowed keys: {allowed}")
        clash = next((old for old in given if old == key or old.startswith(f"{key}.")), None)
        if clash is not None:
            raise ConfigError(f"{key} would overwrite {clash}, given before it; give it once")
        given.append(key)
        _place(cls, data, key, text)
    return _dataclass(cls, data, "", base)


def read(file: Path) -> dict[str, Any]:
    """The contents of a JSON or TOML file, as plain data."""
    loaders: dict[str, Callable[[str], Any]] = {".json": _json, ".toml": tomllib.loads}
    if file.suffix not in loaders:
        raise ConfigError(f"{file} is neither JSON nor TOML; allowed endings: {', '.join(loaders)}")
    try:
        data = loaders[file.suffix](file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {file}; type the path of a JSON or TOML file") from None
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read as {file.suffix[1:].upper()}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f'{file} holds a {type(data).__name__}; it should hold an object: {{"key": value}}')
    return data


def to_dict(config: Any) -> dict[str, Any]:
    """The complete configuration as data that JSON can hold; `from_dict` is its inverse."""
    return {field.name: to_plain(getattr(config, field.name)) for field in _fields(config)}


def from_dict(cls: type[Config], data: dict[str, Any]) -> Config:
    """The dataclass that `to_dict` made `data` from. Strict: unknown keys and wrong types raise ConfigError."""
    return _dataclass(cls, data, "", None)


def describe(annotation: Any) -> str:
    """What a value of this annotation may be, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(map(json.dumps, arguments))
    if _is_union(annotation):
        return " or ".join(describe(member) for member in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"[{', '.join(map(describe, arguments))}]"
    if origin in (tuple, list):
        return f"a list of {describe(arguments[0])}"
    if origin is dict:
        return f"an object of {describe(arguments[1])}"
    names = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "none"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _place(cls: Any, data: dict[str, Any], key: str, text: str) -> None:
    """Put the value that `text` stands for at the dotted `key` of `data`."""
    *path, last = key.split(".")
    where = ""
    for name in path:
        annotation, _ = _field(cls, name, where)
        where = f"{where}{name}."
        cls = _nested(annotation)
        if cls is None:
            raise ConfigError(f"{where[:-1]} has no keys of its own; type: {where[:-1]}=VALUE")
        if data.get(name) is None:
            data[name] = {}
        data = data[name]
        if not isinstance(data, dict):
            raise ConfigError(f"{where[:-1]}: expected {describe(annotation)}, got {json.dumps(data)}")
    annotation, default = _field(cls, last, where)
    data[last] = _from_text(annotation, text, key, default)


def _field(cls: Any, name: str, where: str) -> tuple[Any, Any]:
    """The annotation and the default (None if it has none) of one field."""
    fields = {field.name: field for field in _fields(cls)}
    _refuse_unknown([name], fields, where)
    default = _default(fields[name])
    return typing.get_type_hints(cls)[name], None if default is dataclasses.MISSING else default


def _refuse_unknown(names: Iterable[str], allowed: Collection[str], where: str) -> None:
    for name in (name for name in names if name not in allowed):
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f"; did you mean {where}{near[0]}" if near else ""
        raise ConfigError(f"unknown key {where}{name}{hint}; allowed: {', '.join(allowed)}")


def _from_text(annotation: Any, text: str, key: str, default: Any) -> Any:
    """The plain value that `text` stands for: a number, true, none or JSON where one is allowed, else the text."""
    readings: list[Any] = []
    for reader in (_json, int, float, lambda word: {"true": True, "false": False, "none": None}[word.lower()]):
        try:
            readings.append(reader(text))
        except (ValueError, KeyError):
            continue
    failures: list[ConfigError] = []
    for reading in (*(r for r in readings if not isinstance(r, str)), text):
        if isinstance(reading, dict) and _nested(annotation) is not None:
            return reading
        try:
            _value(annotation, reading, key, default)
        except ConfigError as failure:
            failures.append(failure)
        else:
            return reading
    raise failures[0]


def _value(annotation: Any, value: Any, key: str, default: Any) -> Any:
    """`value`, which is plain data, as the annotation wants it; ConfigError where it does not fit."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _dataclass(annotation, value, f"{key}.", default if isinstance(default, annotation) else None)
    if _is_union(annotation):
        members = [member for member in arguments if _container(member) is _container(type(value))]
        if len(members) == 1 and _container(members[0]) is not None:
            return _value(members[0], value, key, default)
        for member in sorted(members, key=lambda member: member is float):
            with contextlib.suppress(ConfigError):
                return _value(member, value, key, None)
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
    elif origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{key}[{i}]", None) for i, item in enumerate(value)]
    elif origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_value(kinds[i], item, f"{key}[{i}]", None) for i, item in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        return {name: _value(arguments[1], item, f"{key}.{name}", None) for name, item in value.items()}
    elif annotation is float and type(value) in (int, float):
        if math.isfinite(value):
            return float(value)
    elif annotation is Path and isinstance(value, str):
        return Path(value)
    elif annotation in (int, bool, str, type(None)) and type(value) is annotation:
        return value
    example = f"; for example {key}={json.dumps(to_plain(default))}" if default is not None else ""
    raise ConfigError(f"{key}: expected {describe(annotation)}, got {json.dumps(value, default=str)}{example}")


def _dataclass(cls: type[Config], data: Any, where: str, base: Config | None) -> Config:
    """The dataclass that `data` describes; what it does not name comes from `base`, or is the default."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where[:-1]}: expected an object of keys and values, got {json.dumps(data, default=str)}")
    fields = {field.name: field for field in _fields(cls)}
    _refuse_unknown(data, fields, where)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        default = _default(field) if base is None else getattr(base, name)
        if name in data:
            known = None if default is dataclasses.MISSING else default
            values[name] = _value(hints[name], data[name], f"{where}{name}", known)
        elif default is dataclasses.MISSING:
            raise ConfigError(f"missing {where}{name}; type: {where}{name}=VALUE ({describe(hints[name])})")
        else:
            values[name] = default
    return cls(**values)


def _fields(cls: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, or MISSING."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _nested(annotation: Any) -> Any:
    """The dataclass that an annotation is, or has as the only one in its union; None where there is none."""
    members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    found = [member for member in members if dataclasses.is_dataclass(member)]
    return found[0] if len(found) == 1 else None


def _container(kind: Any) -> type | None:
    """dict for what is written as an object, list for what is written as a list, None for the rest."""
    origin = typing.get_origin(kind) or kind
    return dict if origin is dict or dataclasses.is_dataclass(origin) else list if origin in (list, tuple) else None


def to_plain(value: Any) -> Any:
    """`value` as data that JSON can hold."""
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _json(text: str) -> Any:
    """json.loads, but with a key given twice and numbers that JSON does not have as errors."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            raise ValueError(f"a key is given twice among {', '.join(name for name, _ in pairs)}")
        return data

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number that JSON has")

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
