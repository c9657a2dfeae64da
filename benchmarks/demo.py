"""The demo's claims in several seeds, with the controls that the demo has no time for.

    python benchmarks/demo.py [hops|text|shipped]        about 4 minutes a seed on two quiet cores

hops  accuracy by loops and hops, what the gate spends, the rank correlation of loops with hops.
text  loss by loops; beside it, on equal tokens, the same parameters trained with one loop, and the unrolled stack of
      equal FLOPs; the learned exit near the middle of its range against random mixing of fixed depths; wall time at
      that mean beside full depth, in one process.
shipped   the same table for the checkpoint that ships with the package, on text that it has not seen.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from loopwise.demo.hops import measure_staircase
from loopwise.demo.language import LanguageReport, measure_language
from loopwise.demo.story import HOP_RULE, DemoOptions, hop_config, text_config
from loopwise.hub.checkpoints import load
from loopwise.hub.locate import SHIPPED
from loopwise.study.exits import measure_depths
from loopwise.tasks.corpus import Corpus
from loopwise.train.config import TrainConfig
from loopwise.train.machine import Probe, environment
from loopwise.train.progress import Progress
from loopwise.train.run import TrainResult, train
from loopwise.train.setup import build_data
from loopwise.train.sources import PackedSource
from loopwise.train.token_store import token_store

RESULTS = Path(__file__).parent / "results" / "demo.json"
SEEDS = (0, 1, 2)


def quiet_train(config: TrainConfig) -> TrainResult:
    return train(config, progress=Progress(every=60.0))


def hops(seed: int, folder: Path) -> dict[str, Any]:
    config = hop_config(DemoOptions(seed=seed, folder=folder))
    model = quiet_train(config).model
    batches = build_data(config, cache=folder).source(len(config.stages) - 1).validation(256)
    found = measure_staircase(model, batches, rule=HOP_RULE)
    return {
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": found.accuracy.tolist(),
        "loops_used": found.loops_used.tolist(),
        "exit_accuracy": found.exit_accuracy,
        "correlation": found.correlation,
    }


def text(seed: int, folder: Path) -> dict[str, Any]:
    config = text_config(DemoOptions(seed=seed, folder=folder))
    batches = build_data(config, cache=folder / "text" / "data").source(0).validation(64)
    report = measure_language(quiet_train(config).model, batches)
    return {
        "seed": seed,
        **described(report),
        "one_loop": control(config, folder / "one", batches, loops=1, layers=1),
        "unrolled": control(config, folder / "unrolled", batches, loops=1, layers=4),
    }


def shipped(folder: Path) -> dict[str, Any]:
    model = load(SHIPPED, dtype="float32")
    assert model.tokenizer is not None
    store = token_store(Corpus("python"), model.tokenizer, folder, part="validation")
    source = PackedSource(train=store, validation=store, vocab_size=model.tokenizer.vocab_size, length=256)
    return described(measure_language(model, source.validation(32)))


def described(report: LanguageReport) -> dict[str, Any]:
    middle = report.middle
    return {
        "loss_by_loop": report.depths.mean_losses.tolist(),
        "rule": middle.skip.rule,
        "skip": {"mean_loops": middle.skip.mean_loops, "loss": middle.skip.loss, "gain_over_mixing": middle.skip.gain},
        "fill": {"mean_loops": middle.fill.mean_loops, "loss": middle.fill.loss, "gain_over_mixing": middle.fill.gain},
        "speedup": report.speedup,
        "speed_mean_loops": report.speeds["exit"].mean_loops,
        "tokens_per_second": {name: speed.tokens_per_second for name, speed in report.speeds.items()},
    }


def control(config: TrainConfig, folder: Path, batches: Any, *, loops: int, layers: int) -> float:
    """Loss of a model of `layers` times the layers, run once, trained on as many tokens in as many steps."""
    assert config.model is not None
    model = replace(
        config.model, core_layers=config.model.core_layers * layers, loops=loops, trained_loops=(1, loops), gate=False
    )
    steps = config.stages[0].steps
    stage = replace(config.stages[0], name="control", objective=f"last:loops={loops}", steps=steps)
    alone = replace(config, run=str(folder), model=model, stages=(stage,), family="loopwise", validation_loops=(1,))
    trained = quiet_train(alone).model
    return float(measure_depths(trained, batches).mean_losses[-1])


def main() -> None:
    parts = {"hops": hops, "text": text}
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    wanted = sys.argv[1:] or [*parts, "shipped"]
    if "shipped" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            results["shipped"] = shipped(Path(folder))
        print(json.dumps(results["shipped"], indent=2))
    for name in parts.keys() & set(wanted):
        probe = Probe()
        probe.read()
        rows = []
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(parts[name](seed, Path(folder)))
                print(json.dumps(rows[-1]))
        probe.read()
        results[name] = {"seeds": rows, "drift": probe.drift, "held_still": not probe.drifted}
        if name == "text":
            for key in ("one_loop", "unrolled", "speedup"):
                values = [row[key] for row in rows]
                print(f"{key}: {statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
    results["machine"] = environment()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
