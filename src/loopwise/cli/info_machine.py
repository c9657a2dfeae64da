"""`loopwise info` of what is no language model: a CTM, a TRM or an HRM."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import typer

from loopwise.cli.info import weights_as_data, weights_in_words

if TYPE_CHECKING:
    from rich.table import Table

    from loopwise.hub.machines import Inspection
    from loopwise.models.ctm_config import CTMConfig
    from loopwise.models.trm_config import TRMConfig


def show(title: str, seen: "Inspection", *, as_json: bool) -> None:
    """Print what is known, for a person or as one JSON object."""
    facts = describe(seen)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    from rich.console import Console

    Console(highlight=False).print(_render(title, seen, facts))


def describe(seen: "Inspection") -> dict[str, Any]:
    """Everything that `info` knows, as data for JSON."""
    machine = seen.machine
    counts: dict[str, int] = {}
    for name, parameter in machine.named_parameters():
        part = name.split(".", 1)[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    loops = machine.facts
    return {
        "folder": str(seen.folder),
        "family": seen.family,
        "dtype": _dtype(seen),
        "parameters": {"stored": sum(counts.values()), **counts},
        "loops": {
            "trained": list(loops.trained_loops),
            "unit": loops.unit,
            "signal": loops.signal,
            "anytime": loops.anytime,
        },
        "weights": weights_as_data(seen.weights, seen.problem),
        "config": dataclasses.asdict(machine.config),
    }


def _dtype(seen: "Inspection") -> str | None:
    """Of the weights; None when they are not here, since config.json does not say."""
    return None if seen.weights is None else ", ".join(seen.weights.dtypes)


def _render(title: str, seen: "Inspection", facts: dict[str, Any]) -> "Table":
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from loopwise.models.ctm import CTM

    page = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title_justify="left")
    page.title = f"[bold]{escape(title)}[/]  [dim]{facts['family']}[/]"
    page.add_column(style="dim", no_wrap=True)
    page.add_column(overflow="fold")
    machine = seen.machine
    parts = _ctm(machine.config) if isinstance(machine, CTM) else _trm(machine.config)
    fewest, most = facts["loops"]["trained"]
    trained = f"trained at {fewest} to {most}" if fewest < most else f"trained at {most}"
    signal = "certainty: certainty:0.9" if isinstance(machine, CTM) else "halting head: halt:0.0"
    for name, value in (
        ("parameters", _parameters(facts["parameters"])),
        *parts.items(),
        ("loops", f"{trained}; every loop can be read out"),
        ("exits", f"each sample for itself, by its {signal}, or a rule on states or predictions"),
        ("weights", weights_in_words(facts)),
    ):
        page.add_row(name, Text.from_markup(value))
    return page


def _parameters(counts: dict[str, int]) -> str:
    whole = counts["stored"]
    shares = {name: number / whole for name, number in counts.items() if name != "stored"}
    # What would round to nothing is left to --json.
    shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
    return f"[bold]{whole:,}[/] [dim]({shown})[/]"


def _ctm(config: "CTMConfig") -> dict[str, str]:
    models = {
        "deep": f"each with a network of its own ({config.neuron_hidden} hidden) over its last {config.memory}",
        "shallow": f"each with a linear model of its own over its last {config.memory}",
        "none": "without models of their own",
    }[config.neuron_models]
    pairs = {
        "none": "the answer and attention read the activities themselves",
    }.get(
        config.pairing,
        f"{config.pairing}: {config.out_size:,} pairs for the answer, {config.action_size:,} for attention",
    )
    synapses = "one gated layer" if config.synapse_depth == 1 else f"a U-Net of depth {config.synapse_depth}"
    channels = "" if config.channels is None else f", {config.channels} channels"
    answer = f"one of {config.classes} classes" if config.places is None else _places(config.places, config.classes)
    return {
        "neurons": f"{config.neurons:,}, {models}; synapses: {synapses}",
        "synchrony": pairs,
        "input": f"{config.backbone}{channels}; attention of {config.heads} heads, width {config.width:,}",
        "answer": answer,
    }


def _trm(config: "TRMConfig") -> dict[str, str]:
    mixing = "attention" if config.mixing == "attention" else "an MLP across places"
    nets = f"{config.layers} layers for latent and answer alike"
    if config.answer_layers:
        nets = f"{config.layers} layers for the latent, {config.answer_layers} for the answer"
    return {
        "networks": f"{nets}, width {config.width:,}, MLP {config.mlp_width:,}, {mixing}, positions {config.positions}",
        "a loop": f"{config.cycles} times: {config.inner_cycles} updates of the latent, one of the answer; gradient "
        f"through {_WINDOWS[config.window]}",
        "input": f"{config.places:,} places of {config.vocab_size:,} symbols, {config.prefix} places before them"
        + (f", {config.puzzles:,} kinds of puzzle" if config.puzzle_width else ""),
        "answer": _places(config.places, config.vocab_size),
    }


_WINDOWS = {"all": "all of it", "recursion": "the last time", "step": "the last update of each alone"}


def _places(places: int, classes: int) -> str:
    return f"one of {classes:,} classes at each of {places:,} places"
