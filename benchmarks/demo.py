"""The demo's claims in several seeds, with the controls that the demo has no time for.

    python benchmarks/demo.py [hops|text|shipped|speed|write] [seed=N]    about 10 minutes a seed on two quiet cores

hops     accuracy by loops and hops, what the gate spends, the rank correlation of loops with hops.
text     loss by loops; beside it, on equal tokens, the same parameters trained with one loop, and the unrolled stack
         of equal FLOPs; the learned exit near a mean of 2.5 loops against random mixing of fixed depths.
shipped  the same exits for the checkpoint that ships with the package, on text that it has not seen.
speed    wall time of writing at a mean of 2.5 loops beside full depth, in one process, taking turns, by the engine,
         one answer after the other: the shipped checkpoint and the models of `text`. Leave the machine alone meanwhile.
write    processor time of one answer of the shipped checkpoint by `loopwise.generate`, start-up included, beside the
         readable generator; one thread.

Models are kept under runs/benchmarks, so what was trained once is not trained again.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _trained import SEEDS, control, demo_hops, source, trained, with_gate

from loopwise.demo.hops import measure_staircase
from loopwise.demo.language import LanguageReport, measure_language, measure_writing
from loopwise.demo.story import HOP_RULE
from loopwise.engine import reference, write
from loopwise.engine.sampling import Sampling
from loopwise.hub.checkpoints import load
from loopwise.hub.locate import SHIPPED
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.exits import measure_depths
from loopwise.tasks.corpus import Corpus
from loopwise.train.batches import Batch
from loopwise.train.machine import Probe, environment
from loopwise.train.sources import PackedSource
from loopwise.train.token_store import token_store

RESULTS = Path(__file__).parent / "results" / "demo.json"
PARTS = ("hops", "text", "shipped", "speed", "write")
HELD_OUT_ROWS = 128
ROUNDS = 31
WRITING_ROUNDS = 5
CONTROLS = {"one_loop": ("one-loop", 1), "unrolled": ("unrolled", 4)}
"""Name of the run, and how many times the layers."""


def hops(seed: int) -> dict[str, Any]:
    config = demo_hops(seed)
    model = trained(config)
    found = measure_staircase(model, source(config, len(config.stages) - 1).validation(256), rule=HOP_RULE)
    return {
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": found.accuracy.tolist(),
        "loops_used": found.loops_used.tolist(),
        "exit_accuracy": found.exit_accuracy,
        "correlation": found.correlation,
    }


def text(seed: int) -> dict[str, Any]:
    config = with_gate(seed)
    batches = source(config).validation(HELD_OUT_ROWS)
    found = described(measure_language(trained(config), batches))
    for key, (name, layers) in CONTROLS.items():
        found[key] = float(measure_depths(trained(control(seed, name, layers=layers)), batches).mean_losses[-1])
    return {"seed": seed, "objective": config.stages[0].objective, **found}


def shipped_model(folder: Path) -> tuple[LoopedLM, list[Batch]]:
    """The checkpoint of the package, and text that it has not seen."""
    model = load(SHIPPED, dtype="float32")
    assert model.tokenizer is not None
    store = token_store(Corpus("python"), model.tokenizer, folder, part="validation")
    data = PackedSource(train=store, validation=store, vocab_size=model.tokenizer.vocab_size, length=256)
    return model, data.validation(32)


def described(report: LanguageReport) -> dict[str, Any]:
    middle = report.middle
    return {
        "loss_by_loop": report.depths.mean_losses.tolist(),
        "rule": middle.skip.rule,
        "skip": {"mean_loops": middle.skip.mean_loops, "loss": middle.skip.loss, "gain_over_mixing": middle.skip.gain},
        "fill": {"mean_loops": middle.fill.mean_loops, "loss": middle.fill.loss, "gain_over_mixing": middle.fill.gain},
    }


def speed(model: LoopedLM, batches: list[Batch]) -> dict[str, Any]:
    probe = Probe()
    probe.read()
    found = measure_writing(model, batches, rounds=ROUNDS)
    probe.read()
    return {
        "rule": found.rule,
        "mean_loops": found.exit.mean_loops,
        "ratio": found.ratio,
        "ratios": found.ratios,
        "tokens_per_second": {"full": found.full.tokens_per_second, "exit": found.exit.tokens_per_second},
        "drift": probe.drift,
        "held_still": not probe.drifted,
    }


def writing(model: LoopedLM, prompt: list[int], rule: str | None, tokens: int) -> dict[str, Any]:
    """Seconds of one answer either way, medians of rounds that took turns after one that does not count."""
    sampling = Sampling(max_tokens=tokens, temperature=0.8, ignore_eos=True, exit=rule)
    sides = {"readable": reference.generate, "engine": write.generate}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(WRITING_ROUNDS + 1):
        for name, generate in sides.items():
            began = time.thread_time()
            generate(model, [prompt], sampling)
            times[name] += [time.thread_time() - began] if turn else []
    found = {name: statistics.median(each) for name, each in times.items()}
    return {"tokens": tokens, "rule": rule, **found, "ratio": found["readable"] / found["engine"]}


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean, least and most."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tell_text(rows: list[dict[str, Any]]) -> None:
    for loop in range(len(rows[0]["loss_by_loop"])):
        print(f"loss after loop {loop + 1}: {spread([row['loss_by_loop'][loop] for row in rows])}")
    for key in CONTROLS:
        print(f"{key}: {spread([row[key] for row in rows])}")
    for semantics in ("skip", "fill"):
        found = [row[semantics] for row in rows]
        print(f"{semantics}: mean loops {spread([point['mean_loops'] for point in found], 2)}, below random mixing by")
        print(f"  {spread([point['gain_over_mixing'] for point in found])} nats")


def main() -> None:
    words = sys.argv[1:]
    wanted = [word for word in words if not word.startswith("seed=")] or list(PARTS)
    if not set(wanted) <= set(PARTS):
        sys.exit(f"{' '.join(words)}: allowed are {', '.join(PARTS)} and seed=N")
    seeds = [int(word.removeprefix("seed=")) for word in words if word.startswith("seed=")] or list(SEEDS)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, part in (("hops", hops), ("text", text)):
        if name in wanted:
            known = {row["seed"]: row for row in results.get(name, {}).get("seeds", [])}
            known |= {seed: part(seed) for seed in seeds}
            results[name] = {"seeds": [known[seed] for seed in sorted(known)]}
    with tempfile.TemporaryDirectory() as folder:
        if "shipped" in wanted:
            results["shipped"] = described(measure_language(*shipped_model(Path(folder))))
            print(json.dumps(results["shipped"], indent=1))
        if "speed" in wanted:
            found = {"shipped": speed(*shipped_model(Path(folder)))}
            for seed in seeds:
                config = with_gate(seed)
                found[f"text, seed {seed}"] = speed(trained(config), source(config).validation(HELD_OUT_ROWS))
            results["speed"] = found
            for name, row in found.items():
                least, most = row["ratios"][0], row["ratios"][-1]
                print(f"{name}: {row['mean_loops']:.2f} loops, {row['ratio']:.2f} times full depth", end=" ")
                print(f"({least:.2f} to {most:.2f} in {ROUNDS} rounds)")
        if "write" in wanted:
            model, batches = shipped_model(Path(folder))
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            results["write"] = [
                writing(model, batches[0].tokens[0][:16].tolist(), rule, tokens)
                for rule in (None, "hazard:0.45")
                for tokens in (8, 32, 128)
            ]
            torch.set_num_threads(threads)
            for row in results["write"]:
                print(f"{row['tokens']} tokens, {row['rule']}: readable {row['readable'] * 1e3:.0f} ms, ", end="")
                print(f"engine {row['engine'] * 1e3:.0f} ms, {row['ratio']:.1f} times as fast")
    if "text" in wanted:
        tell_text(results["text"]["seeds"])
    results["machine"] = environment()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
