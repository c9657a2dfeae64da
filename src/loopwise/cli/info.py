"""`loopwise info`: what a checkpoint is, from its config.json and its weights' headers alone."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from loopwise.hub.checkpoints import Inspection, Weights

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_ROWS = 8


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or a hub id.")],
    context: Annotated[
        int | None,
        typer.Option(help="Tokens that attention looks back on, for the work per token.", show_default="2048"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a checkpoint is: parameters, loops, memory and work per loop.

    Reads config.json and, where there are weights, their headers. Of a hub id it fetches the small files only.
    Of a CTM, a TRM or an HRM it says what each part weighs, what a loop is, and how a sample may stop.
    """
    from loopwise.cli import info_machine
    from loopwise.errors import ConfigError
    from loopwise.hub import machines

    if context is not None and context < 0:
        raise ConfigError(f"--context={context}: allowed is 0 or more")
    seen = machines.inspect(model)
    if isinstance(seen, machines.Inspection):
        if context is not None:
            raise ConfigError(f"--context={context} has no effect on a {seen.family.upper()}; leave it out")
        info_machine.show(model, seen, as_json=as_json)
        return
    facts = describe(seen, min(2048, seen.config.max_positions) if context is None else context)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    from rich.console import Console

    Console(highlight=False).print(render(model, seen, facts))


def describe(seen: "Inspection", context: int) -> dict[str, Any]:
    """Everything that `info` knows, as data for JSON."""
    from loopwise.models.accounting import count_flops, count_parameters, kv_bytes

    config = seen.config
    parameters, flops = count_parameters(config), count_flops(config, context=context)
    width = _BYTES[seen.dtype]
    rows = loop_counts(config.loops)

    def keep(policy: str, row: int) -> int:
        return int(kv_bytes(config, policy, loops=config.loops, mean_loops=row, bytes_per_number=width))

    tokenizer = seen.tokenizer
    special = (
        {"bos": seen.special.bos, "eos": list(seen.special.eos), "pad": seen.special.pad}
        if tokenizer is None
        else {"bos": tokenizer.bos_id, "eos": list(tokenizer.stop_ids), "pad": tokenizer.pad_id}
    )
    return {
        "folder": str(seen.folder),
        "family": seen.family,
        "dtype": seen.dtype,
        "parameters": {
            "stored": parameters.stored,
            **dataclasses.asdict(parameters),
            "unrolled": {row: parameters.unrolled(row) for row in rows},
        },
        "loops": {
            "default": config.loops,
            "trained": list(config.trained_loops),
            "unit": "token",
            "signal": "hazard" if config.gate else None,
            "anytime": config.anytime,
            "start": config.start,
            "injection": config.injection,
        },
        "kv_bytes_per_token": {
            "per_loop": keep("per_loop", config.loops),
            "last_exited_by_mean_loops": {row: keep("last_exited", row) for row in rows},
            "single": keep("single", config.loops),
        },
        "flops_per_token": {
            "context": context,
            "fixed": flops.fixed,
            "per_loop": flops.per_loop,
            "by_loops": {row: int(flops.total(row)) for row in rows},
        },
        "tokenizer": {
            "present": tokenizer is not None,
            "tokens": None if tokenizer is None else tokenizer.vocab_size,
            "special": special,
            "chat_template": tokenizer is not None and tokenizer.chat_template is not None,
        },
        "weights": weights_as_data(seen.weights, seen.problem),
        "config": dataclasses.asdict(config),
    }


def weights_as_data(weights: "Weights | None", problem: str | None) -> dict[str, Any]:
    """Whether the weights are there and whole, as data for JSON."""
    state = "broken" if problem else "absent" if weights is None else "whole"
    return {"state": state, "problem": problem, **({} if weights is None else dataclasses.asdict(weights))}


def loop_counts(loops: int) -> list[int]:
    """Loop counts to show: all when they are few, else powers of two and the last."""
    if loops <= _ROWS:
        return list(range(1, loops + 1))
    return sorted({2**power for power in range(loops.bit_length())} | {loops})


def render(title: str, seen: "Inspection", facts: dict[str, Any]) -> "Table":
    """The same facts for a person."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    page = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title_justify="left")
    page.title = f"[bold]{escape(title)}[/]  [dim]{facts['family']}[/]"
    page.add_column(style="dim", no_wrap=True)
    page.add_column(overflow="fold")
    for name, value in (
        ("parameters", _parameters(facts)),
        ("layers", _layers(seen)),
        ("attention", _attention(seen)),
        ("context", f"{seen.config.max_positions:,} tokens"),
        ("loops", _loops(facts)),
        ("state", _state(seen)),
        ("exits", _exits(facts)),
        ("tokenizer", _tokenizer(seen, facts)),
        ("weights", weights_in_words(facts)),
        ("", ""),
        ("keys, values", _memory(facts)),
        ("work", _work(facts)),
        ("", ""),
    ):
        page.add_row(name, Text.from_markup(value))
    page.add_row("loops run", _by_loops(facts))
    return page


def _parameters(facts: dict[str, Any]) -> str:
    count = facts["parameters"]
    stored = count["stored"]
    parts = {"embeddings": count["embedding"] + count["head"], "core": count["core"]}
    parts |= {"prelude": count["prelude"], "coda": count["coda"]}
    shares = ", ".join(f"{name} {number / stored:.0%}" for name, number in parts.items() if number)
    unrolled = count["unrolled"][facts["loops"]["default"]]
    return f"[bold]{stored:,}[/] stored [dim]({shares})[/], {short(unrolled)} unrolled"


def _layers(seen: "Inspection") -> str:
    config = seen.config
    named = (("prelude", config.prelude_layers), ("core", config.core_layers), ("coda", config.coda_layers))
    stacks = " + ".join(f"{number} {name}" for name, number in named if number)
    return f"{stacks}, width {config.width:,}, MLP {config.mlp_width:,}, norms {config.norm}"


def _attention(seen: "Inspection") -> str:
    config = seen.config
    heads = f"{config.heads} heads of {config.head_width}"
    grouped = f" over {config.kv_heads} key-value heads" if config.kv_heads != config.heads else ""
    extras = [
        f"rotary base {config.rotary_base:,.0f} ({config.rotary})",
        *(["stretched positions"] if config.rotary_scaling is not None else []),
        *(["query and key biases"] if config.qk_bias else []),
        *(["query and key norms"] if config.qk_norm else []),
    ]
    return f"{heads}{grouped}, {', '.join(extras)}"


def _loops(facts: dict[str, Any]) -> str:
    loops = facts["loops"]
    fewest, most = loops["trained"]
    trained = f"trained at {fewest}" if fewest == most else f"trained at {fewest} to {most}"
    read = "every loop can be read out" if loops["anytime"] else "only the last loop was trained to be read out"
    return f"[bold]{loops['default']}[/], {trained}; {read}"


def _state(seen: "Inspection") -> str:
    config = seen.config
    start = {
        "embeddings": "starts as the embeddings" if config.prelude_layers == 0 else "starts as the prelude's output",
        "normal": f"starts as noise (std {config.start_std:.3g}, seed {config.start_seed} unless given)",
        "zeros": "starts at zero",
    }[config.start]
    injection = {
        "none": "the input is not shown again",
        "add": "the input is added in every loop",
        "adapter": "an adapter mixes the input in at every loop",
    }[config.injection]
    return f"{start}; {injection}" + ("; normed after every loop" if config.loop_norm else "")


def _exits(facts: dict[str, Any]) -> str:
    if facts["loops"]["signal"]:
        return "each token for itself, by a learned gate: hazard:0.6, or a rule on states or predictions"
    return "each token for itself, by a rule on states or predictions: delta:0.03, kl:5e-4 (no learned gate)"


def _tokenizer(seen: "Inspection", facts: dict[str, Any]) -> str:
    from rich.markup import escape

    known, special = facts["tokenizer"], facts["tokenizer"]["special"]

    def shown(token: int) -> str:
        piece = "" if seen.tokenizer is None else " " + escape(seen.tokenizer.pieces([token])[0])
        return f"{token}[dim]{piece}[/]"

    roles = {"bos": [special["bos"]], "eos": special["eos"], "pad": [special["pad"]]}
    listed = [
        f"{role} {', '.join(shown(token) for token in tokens if token is not None)}"
        for role, tokens in roles.items()
        if tokens and tokens[0] is not None
    ]
    if not known["present"]:
        return "; ".join([f"[yellow]none here[/] ({seen.config.vocab_size:,} ids)", *listed])
    chat = "chat template" if known["chat_template"] else "no chat template"
    return "; ".join([f"{known['tokens']:,} tokens", *listed, chat])


def weights_in_words(facts: dict[str, Any]) -> str:
    """Whether the weights are there and whole."""
    from rich.markup import escape

    weights = facts["weights"]
    if weights["state"] == "broken":
        return f"[red]broken[/]: {escape(weights['problem'])}"
    if weights["state"] == "absent":
        stated = f" ({facts['dtype']} by config.json)" if facts["dtype"] else ""
        return f"[yellow]not here[/]{stated}"
    files = f"{weights['files']} file" + ("s" if weights["files"] > 1 else "")
    held = f"{weights['tensors']} tensors, {', '.join(weights['dtypes'])}"
    return f"[green]whole[/]: {held}, {size(weights['bytes'])} in {files}"


def _memory(facts: dict[str, Any]) -> str:
    keep = facts["kv_bytes_per_token"]
    return (
        f"per token in {facts['dtype']}: per_loop {size(keep['per_loop'])} [dim]({keep['per_loop']:,} bytes)[/], "
        f"last_exited by loops run, one shared plane {size(keep['single'])}"
    )


def _work(facts: dict[str, Any]) -> str:
    flops = facts["flops_per_token"]
    return (
        f"{flop(flops['fixed'])} + {flop(flops['per_loop'])} per loop, in FLOPs per token that looks back on "
        f"{flops['context']:,}"
    )


def _by_loops(facts: dict[str, Any]) -> "Table":
    from rich.table import Table

    flops, keep = facts["flops_per_token"], facts["kv_bytes_per_token"]
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for head in ("", "unrolled", "FLOPs", "of all", "keys, values"):
        table.add_column(head, justify="right", no_wrap=True)
    full = flops["by_loops"][facts["loops"]["default"]]
    for loops, work in flops["by_loops"].items():
        share = f"{work / full:.0%}"
        unrolled = short(facts["parameters"]["unrolled"][loops])
        table.add_row(f"{loops}", unrolled, flop(work), share, size(keep["last_exited_by_mean_loops"][loops]))
    return table


def short(number: int | float, units: str = "TBMk") -> str:
    """A large number to three figures: 1.43 B."""
    for unit, power in zip(units, (12, 9, 6, 3), strict=True):
        if number >= 10**power:
            return f"{_three(number / 10**power)} {unit}"
    return _three(number)


def flop(number: int | float) -> str:
    """Operations to three figures: 3.07 G."""
    return short(number, "TGMk")


def size(count: int | float) -> str:
    """Bytes to three figures: 768 KiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{_three(count / 2**power)} {unit}"
    return f"{count:.0f} bytes"


def _three(number: int | float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"
