"""Training speed of a Continuous Thought Machine beside the authors' implementation, at their parity settings.

    git clone https://github.com/SakanaAI/continuous-thought-machines ../continuous-thought-machines
    python benchmarks/ctm.py --authors ../continuous-thought-machines            both settings; about four minutes
    python benchmarks/ctm.py --authors ../continuous-thought-machines 25,10      one: ticks and memory

Widths, batch and heads are those of their scripts (1024 neurons, features of 512, 8 heads, 64 signs, batch 64), and
both sides begin with the same weights and the same batch, so that their first losses must agree. A step is forward,
loss, backward and AdamW; the authors' quantile clipping and our clipping are left out on both sides. The sides take
turns in one process. Bar: twice the authors' speed.

Probes of matrix products and copies run before and after; a setting whose probes drifted by more than 15% is run
again, at most three times, and is marked if it never held still.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As `loopwise train` does, and for both sides; it counts only before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from loopwise.hub.ctm import to_authors, write_config
from loopwise.loops.drivers import unroll
from loopwise.models.ctm import CTM, certainty
from loopwise.models.ctm_config import CTMConfig
from loopwise.objectives.certainty import certainty_loss
from loopwise.tasks.parity import CumulativeParity
from loopwise.tasks.problems import Problems, numbers
from loopwise.train.machine import Probe, environment, keep_freed_memory
from loopwise.train.optimizers import OptimizerConfig, build_optimizer

RESULTS = Path(__file__).parent / "results" / "ctm.json"
SETTINGS = {"25,10": 5, "75,25": 3}
"""Ticks and memory of two of the authors' scripts, and rounds."""
LENGTH, BATCH, RATE = 64, 64, 1e-4


def config_of(ticks: int, memory: int) -> CTMConfig:
    return CTMConfig(
        ticks=ticks,
        neurons=1024,
        width=512,
        heads=8,
        memory=memory,
        classes=2,
        places=LENGTH,
        neuron_hidden=16,
        pairing="random",
        out_neurons=32,
        action_neurons=32,
        backbone="parity",
        positions="rotation",
    )


def our_side(model: CTM, problems: Problems) -> Callable[[], float]:
    optimizer = build_optimizer(
        model.named_parameters(), OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.0, clip=None)
    )
    ticks = model.config.ticks

    def step() -> float:
        logits = unroll(model, model.encode(problems.inputs), loops=ticks, collect=("logits",)).logits
        sure = certainty(logits.detach().flatten(0, 1)).view(ticks, -1)
        loss = certainty_loss(logits, problems.targets, sure).total
        loss.backward()
        optimizer.step(RATE)
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def authors_side(folder: Path, ours: CTM, problems: Problems) -> Callable[[], float]:
    sys.path.insert(0, str(folder))
    try:
        from models.ctm import ContinuousThoughtMachine
        from utils.losses import parity_loss
    except ImportError as error:
        raise SystemExit(f"--authors {folder}: {error}; give a clone of SakanaAI/continuous-thought-machines") from None
    with contextlib.redirect_stdout(io.StringIO()):
        model = ContinuousThoughtMachine(**write_config(ours.config))
    model(problems.inputs[:1])  # their layers take shape at the first call
    model.load_state_dict(to_authors(ours.state_dict(), ours.config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=1e-8, weight_decay=0.0)

    def step() -> float:
        predictions, certainties, _ = model(problems.inputs)
        predictions = predictions.reshape(predictions.size(0), -1, 2, predictions.size(-1))
        loss, _ = parity_loss(predictions, certainties, problems.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(setting: str, authors: Path, *, compiled: bool) -> dict[str, Any]:
    ticks, memory = (int(number) for number in setting.split(","))
    problems = CumulativeParity(length=LENGTH).draw(0, numbers(0, BATCH))
    model = CTM(config_of(ticks, memory))
    sides = {"authors": authors_side(authors, model, problems)}
    if compiled:
        model.compile_step()
    sides["loopwise"] = our_side(model, problems)
    first = {name: step() for name, step in sides.items()}
    if abs(first["authors"] - first["loopwise"]) > 1e-4:
        raise SystemExit(f"the first losses differ: {first}; the two sides do not compute the same")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(SETTINGS[setting]):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    ratios = [theirs / ours for theirs, ours in zip(times["authors"], times["loopwise"], strict=True)]
    return {
        "ticks": ticks,
        "memory": memory,
        "compiled": compiled,
        "rounds": SETTINGS[setting],
        "first_loss": first,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: [min(values), max(values)] for name, values in times.items()},
        "times_authors": statistics.median(ratios),
        "times_authors_spread": [min(ratios), max(ratios)],
    }


def steady(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part between two probes, again while the machine did not hold still."""
    for attempt in range(1, 4):
        probe = Probe()
        probe.read()
        found = part()
        probe.read()
        if not probe.drifted:
            break
        print(f"  probes drifted by {probe.drift:.0%}, attempt {attempt} of 3", file=sys.stderr)
    return {**found, "drift": probe.drift, "held_still": not probe.drifted}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--authors", type=Path, required=True, help="a clone of the authors' repository")
    parser.add_argument("--compile", action="store_true", help="our ticks compiled")
    parser.add_argument("settings", nargs="*", help=f"ticks,memory: {' or '.join(SETTINGS)}; none for all")
    options = parser.parse_args()
    if not set(options.settings) <= set(SETTINGS):
        parser.error(f"settings are {' and '.join(SETTINGS)}, not {' '.join(options.settings)}")
    keep_freed_memory()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for setting in options.settings or SETTINGS:
        results[setting] = steady(lambda setting=setting: measure(setting, options.authors, compiled=options.compile))
        print(f"{setting}: {json.dumps(results[setting], indent=2)}")
    results["machine"] = environment()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
