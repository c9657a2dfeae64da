"""`loopwise convert`: other formats, other number types, deeper cores, and looped models out of plain ones."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loopwise.errors import ConfigError

if TYPE_CHECKING:
    from loopwise.hub.retrofit import Split
    from loopwise.models.looped_lm import LoopedLM

CONFIG = "loopwise.cli.convert:ConvertConfig"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_AUTHORS = {22: (4, 8, 4), 16: (4, 6, 4)}
"""Layers of the source -> sizes that McLeish et al. 2025 chose (TinyLlama; Llama-3.2-1B and OLMo-2-1B)."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to change on the way; everything else stays as it is."""

    family: Literal["ouro", "huginn_raven", "loopwise"] | None = None
    """Format to write: config.json and tensor names of that family. The model's shape must fit it."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """Number type of the weights."""
    shard_size: str = "5GB"
    """Largest file; larger checkpoints are split. For example 5GB, 500MB or 2GiB."""
    layers: int | None = None
    """Upcycling: layers of the new core, a multiple of the old number (Ouro went from 24 to 48)."""
    order: Literal["stack", "repeat"] | None = None
    """Order of the copies: stack (0 1 2 0 1 2, the default: as if the old core ran twice) or repeat (0 0 1 1 2 2)."""
    retrofit: str | None = None
    """A plain Llama or OLMo-2 becomes a looped model: sizes of prelude,core,coda such as 4,8,4, or auto."""
    prelude: str | None = None
    """Retrofit with chosen layers: those of the prelude, such as 0-3; none when left out."""
    core: str | None = None
    """Retrofit with chosen layers: those of the core, such as 10-17 or 2,4,6."""
    coda: str | None = None
    """Retrofit with chosen layers: those of the coda, such as 18-21; none when left out."""
    loops: int | None = None
    """Retrofit: loops that run when nobody says otherwise (1; before training every number gives the same answer)."""
    overwrite: bool = False
    """Whether TARGET may hold a checkpoint already."""

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ConfigError(f"shard_size={self.shard_size}: give a size such as 5GB, 500MB or 2GiB")
        if self.order is not None and self.layers is None:
            raise ConfigError(f"order={self.order} belongs to upcycling; give layers=... too, for example layers=48")
        chosen = [part for part in (self.prelude, self.core, self.coda) if part is not None]
        if chosen and self.retrofit is not None:
            raise ConfigError("retrofit=... chooses the layers itself; give it, or core= with prelude= and coda=")
        if chosen and self.core is None:
            raise ConfigError(
                "prelude= and coda= need core= beside them, for example prelude=0-3 core=10-17 coda=18-21"
            )
        if self.loops is not None and not self.retrofits:
            raise ConfigError(f"loops={self.loops} belongs to a retrofit; give retrofit=... too, for example 4,8,4")

    @property
    def retrofits(self) -> bool:
        """Whether the source is a plain model."""
        return self.retrofit is not None or self.core is not None

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes; 0 when it is no size, which is refused."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", self.shard_size)
        if not found or found[2].upper() not in _UNITS:
            return 0
        return int(float(found[1]) * _UNITS[found[2].upper()])


def command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Checkpoint to read: a folder or a hub id.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="What to change.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Change a checkpoint's format, number type or depth, or make a looped model out of a plain one.

    - `family=loopwise` (or ouro, huginn_raven), `dtype=bfloat16`, `shard_size=2GB`: the same model, written otherwise

    - `layers=48`, `order=stack`: a deeper core of copied layers

    - `retrofit=4,8,4`, or `prelude=0-3 core=10-17 coda=18-21`, and `loops=4`: a looped model out of a Llama or OLMo-2

    - `overwrite=true`: TARGET may hold a checkpoint already
    """
    from loopwise.configuration import build

    config = build(ConvertConfig, None, overrides or [])
    if not config.overwrite and any(target.glob("config.json")) | any(target.glob("*.safetensors")):
        raise ConfigError(f"{target} holds a checkpoint already; choose another folder, or type: overwrite=true")
    report = convert(source, target, config)
    if as_json:
        typer.echo(json.dumps(report))
        return
    for line in sentences(report):
        typer.echo(line)


def convert(source: str, target: Path, config: ConvertConfig) -> dict[str, Any]:
    """Read, change, write; what was done, as data for JSON."""
    from loopwise.hub.checkpoints import inspect, load, save
    from loopwise.hub.upcycle import copy_order, upcycle

    report: dict[str, Any] = {"source": source, "target": str(target), "retrofit": None, "upcycle": None}
    if config.retrofits:
        model, split, layers = _retrofit(source, config)
        dropped = sorted(set(range(layers)) - set(split.kept))
        report["retrofit"] = {**dataclasses.asdict(split), "dropped": dropped, "text": str(split)}
    else:
        model = load(source, dtype=config.dtype)
    if config.layers is not None:
        order = config.order or "stack"
        copied = copy_order(model.config.core_layers, config.layers, order)
        report["upcycle"] = {"from": model.config.core_layers, "to": config.layers, "order": order, "copies": copied}
        model = upcycle(model, config.layers, order)
    save(model, target, family=config.family, shard_bytes=config.shard_bytes)
    written = inspect(target)
    if written.weights is None:
        raise RuntimeError(f"{target} was written and cannot be read: {written.problem}")
    count = sum(parameter.numel() for parameter in model.parameters())
    return report | {
        "family": written.family,
        "dtype": written.dtype,
        "parameters": count,
        "files": written.weights.files,
        "bytes": written.weights.bytes,
    }


def _retrofit(source: str, config: ConvertConfig) -> "tuple[LoopedLM, Split, int]":
    from loopwise.hub.retrofit import Split, choose_split, parse_layers, read_source, retrofit

    layers = read_source(source)[1]["num_hidden_layers"]
    if config.core is not None:
        prelude, core, coda = (
            parse_layers(text) if text else () for text in (config.prelude, config.core, config.coda)
        )
        split = Split(prelude=prelude, core=core, coda=coda)
    else:
        split = choose_split(layers, *_sizes(str(config.retrofit), layers))
    return retrofit(source, split=split, loops=config.loops or 1, dtype=config.dtype), split, layers


def _sizes(text: str, layers: int) -> tuple[int, int, int]:
    if text == "auto":
        if layers not in _AUTHORS:
            known = ", ".join(str(number) for number in _AUTHORS)
            raise ConfigError(
                f"retrofit=auto knows the authors' choice for {known} layers, and the source has {layers}; "
                "give prelude,core,coda, for example retrofit=4,8,4"
            )
        return _AUTHORS[layers]
    found = re.fullmatch(r"\[?(\d+), ?(\d+), ?(\d+)\]?", text)
    if not found:
        raise ConfigError(f"retrofit={text}: give the sizes of prelude,core,coda, for example retrofit=4,8,4, or auto")
    return int(found[1]), int(found[2]), int(found[3])


def sentences(report: dict[str, Any]) -> list[str]:
    """The same report for a person."""
    from loopwise.cli.info import short, size

    lines = []
    if report["retrofit"] is not None:
        dropped = len(report["retrofit"]["dropped"])
        lines.append(f"retrofit   layers {report['retrofit']['text']} (prelude / core / coda), {dropped} dropped")
        lines.append("           the adapter passes the input on: one loop is the source without the dropped layers")
    if report["upcycle"] is not None:
        done = report["upcycle"]
        lines.append(f"upcycled   core of {done['from']} layers to {done['to']}, order {done['order']}")
    files = f"{report['files']} file" + ("s" if report["files"] > 1 else "")
    held = f"{report['dtype']}, {short(report['parameters'])} parameters, {size(report['bytes'])} in {files}"
    lines.append(f"wrote      {report['target']}: {report['family']}, {held}")
    lines.append(f"next       loopwise info {report['target']}")
    return lines
