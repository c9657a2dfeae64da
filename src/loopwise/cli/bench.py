"""`loopwise bench`: how fast the engine runs a checkpoint on this machine, beside what the machine could do."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopwise.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

CONFIG = "loopwise.bench.engine:BenchConfig"


def command(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="What to measure: engine, or drafts.")],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, a run, or a hub id.")
    ] = "shipped",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the load.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="With drafts: write the best into the checkpoint's generation_config.json.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the engine: depth batching, one request alone, many at once; or which drafts pay for a model.

        loopwise bench engine MODEL requests=64 tokens=32 exit=hazard:0.5
        loopwise bench drafts MODEL requests=4 --keep

    Leave the machine alone meanwhile. Sides of a comparison take turns in one process; probes of matrix products and
    copies run before and after, and a part during which they drifted by more than 15% is run again and marked.
    """
    if what not in ("engine", "drafts"):
        raise ConfigError(f"there is no benchmark {what!r}; allowed: engine, drafts")
    if keep and what != "drafts":
        raise ConfigError("--keep writes down which drafts pay; type: loopwise bench drafts MODEL --keep")

    from loopwise.bench.drafts import keep_drafts, tune_drafts
    from loopwise.bench.engine import BenchConfig, run, steady
    from loopwise.cli.models import is_setting, load_model, read_settings

    words = list(overrides or [])
    if is_setting(model):
        model, words = "shipped", [model, *words]
    config = read_settings(BenchConfig, words)
    loaded = load_model(model, dtype=config.dtype, device=config.device)
    found = run(loaded, config) if what == "engine" else steady(lambda: tune_drafts(loaded, config))
    kept = keep_drafts(loaded, found["best"]) if keep else None
    if as_json:
        typer.echo(json.dumps({"model": model} | found))
        return
    from rich.console import Console

    table = render(model, found) if what == "engine" else render_drafts(model, found)
    Console(highlight=False).print(table)
    if kept is not None:
        typer.echo(f"{kept} now says: {found['best']}")


def render_drafts(model: str, found: dict[str, Any]) -> "Table":
    """Each way of drafting beside plain decoding."""
    from rich.table import Table

    table = Table(title=f"drafts on {model}, one request at a time, {found['threads']} threads", title_justify="left")
    for name in ("speculate=", "speed", "least to most", ""):
        table.add_column(name)
    for name, speed in found["speedup"].items():
        spread = f"{speed['least']:.2f} to {speed['most']:.2f}"
        table.add_row(name, f"{speed['median']:.2f}x", spread, "best" if name == found["best"] else "")
    if not found["held_still"]:
        table.caption = "the machine did not hold still"
    return table


def render(model: str, found: dict[str, Any]) -> "Table":
    """The figures as a table: what was measured, beside what it is compared with."""
    from rich.table import Table

    table = Table(title=f"the engine on {model}, {found['threads']} threads", title_justify="left")
    for name in ("measure", "figure", "beside"):
        table.add_column(name)
    depth, asked, one, many = found["depth"], found["asking"]["overhead"], found["one"], found["crowd"]
    for side in ("depths", "real exits"):
        if side in depth:
            part = depth[side]
            table.add_row(
                f"depth batching, {side}, mean {part['mean_loops']:.2f} loops",
                f"{part['speedup']['median']:.2f}x full depth",
                f"arithmetic allows {part['bound']:.2f}x",
            )
    table.add_row(
        "full depth, all seats",
        f"{depth['fixed_tokens_per_second']['median']:.0f} tokens/s",
        f"{depth['whole_time_share_of_plain_products']['median']:.0%} of plain products of {depth['seats']} rows",
    )
    spread = f"{asked['least']:+.1%} to {asked['most']:+.1%}"
    table.add_row("asking an exit rule in vain", f"{asked['median']:+.1%} time", f"every loop unasked; {spread}")
    table.add_row(
        "one request",
        f"{one['plain_tokens_per_second']['median']:.1f} tokens/s",
        f"{one['share_of_bandwidth']['median']:.0%} of reading the weights",
    )
    if "auto" in one:
        part = one["auto"]
        table.add_row(
            f"one request with drafts, {part['acceptance']:.0%} in time",
            f"{part['speedup']['median']:.2f}x",
            f"predicted {part['predicted']:.2f}x",
        )
    table.add_row(
        f"{many['requests_at_once']} requests with drafts", f"{many['auto_over_off']['median']:.2f}x", "without"
    )
    moved = [name for name in ("depth", "asking", "one", "crowd") if not found[name]["held_still"]]
    if moved:
        table.caption = f"the machine did not hold still during: {', '.join(moved)}"
    return table
