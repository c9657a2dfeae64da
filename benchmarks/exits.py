"""What exits save: accuracy and wall time of one rule beside full depth, on tokens that did not choose its threshold.

    python benchmarks/exits.py [shipped] [RUN...]    about a minute each; leave the machine alone meanwhile

Half of the held-out data picks, for each kind of rule that reads no predictions, the threshold of least mean loops
whose accuracy is within one point of full depth when run (`last_exited`: tokens that stop are removed). The other half,
at least 2,000 tokens, is then run with it and at full depth by the same driver, taking turns; a pass that leaves the
whole sequence in place (`unroll`, every loop) is timed beside them. Medians and ratios of the rounds.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopwise.loops.drivers import run_until, unroll
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.examples import Examples
from loopwise.study.record import record
from loopwise.study.rules import Family, families
from loopwise.study.statistics import clustered_error
from loopwise.study.subject import StudyConfig, open_data, open_subject
from loopwise.tasks.problems import IGNORED
from loopwise.train.machine import environment

RESULTS = Path(__file__).parent / "results" / "exits.json"
UNITS = 8192
ROUNDS = 7
TOLERANCE = 0.01


def run(model: LoopedLM, data: Sequence[Examples], rule: str, loops: int) -> dict[str, Any]:
    """Right or wrong and loops of every unit, and the time of the pass."""
    right, used, seconds = [], [], 0.0
    for examples in data:
        began = time.perf_counter()
        with torch.no_grad():
            outcome = run_until(model, model.encode(examples.inputs), rule, max_loops=loops)
        seconds += time.perf_counter() - began
        asked = examples.targets != IGNORED
        right.append((outcome.prediction.argmax(-1) == examples.targets)[asked].numpy())
        used.append(outcome.loops.float().numpy().ravel())
    return {"right": np.concatenate(right), "loops": np.concatenate(used), "seconds": seconds}


def whole(model: LoopedLM, data: Sequence[Examples], loops: int) -> float:
    """The time of a pass in which nobody can leave."""
    began = time.perf_counter()
    for examples in data:
        with torch.no_grad():
            context = model.encode(examples.inputs)
            model.readout(unroll(model, context, loops=loops).state, context)
    return time.perf_counter() - began


def choose(model: LoopedLM, data: Sequence[Examples], family: Family, loops: int) -> str | None:
    """The threshold of least mean loops that keeps its accuracy, when run."""
    full = run(model, data, f"fixed:{loops}", loops)["right"].mean()
    best: tuple[float, str] | None = None
    for threshold in family.thresholds(12):
        rule = family.rule(float(f"{threshold:.4g}"))
        found = run(model, data, rule, loops)
        mean = float(found["loops"].mean())
        if full - found["right"].mean() <= TOLERANCE and (best is None or mean < best[0]):
            best = mean, rule
    return None if best is None else best[1]


def measure(name: str) -> dict[str, Any]:
    """All kinds of rules of one checkpoint."""
    subject = open_subject(name)
    model = subject.model
    assert isinstance(model, LoopedLM)
    loops = model.facts.trained_loops[1]
    data = open_data(subject, StudyConfig(units=UNITS, length=256))
    first, second = data[: len(data) // 2], data[len(data) // 2 :]
    problems = np.concatenate(
        [np.nonzero((each.targets != IGNORED).numpy())[0] + 10**6 * index for index, each in enumerate(second)]
    )
    taken = record(model, first, max_loops=loops)
    found: dict[str, Any] = {"units": len(problems), "loops": loops, "rules": {}}
    for family in families(taken):
        if family.reads:
            continue
        rule = choose(model, first, family, loops)
        if rule is None:
            found["rules"][family.name] = None
            continue
        times: dict[str, list[float]] = {"exit": [], "full": [], "whole": []}
        for turn in range(ROUNDS + 1):
            early, full = run(model, second, rule, loops), run(model, second, f"fixed:{loops}", loops)
            spent = {"exit": early["seconds"], "full": full["seconds"], "whole": whole(model, second, loops)}
            if turn:
                for side, seconds in spent.items():
                    times[side].append(seconds)
        lost = full["right"].astype(float) - early["right"]
        error = 1.96 * float(clustered_error(lost, problems))
        saved = [1 - one / two for one, two in zip(times["exit"], times["full"], strict=True)]
        found["rules"][family.name] = {
            "rule": rule,
            "mean_loops": float(early["loops"].mean()),
            "accuracy": float(early["right"].mean()),
            "full_accuracy": float(full["right"].mean()),
            "drop": [float(lost.mean()), float(lost.mean()) - error, float(lost.mean()) + error],
            "time_saved": statistics.median(saved),
            "time_saved_rounds": saved,
            "flops_saved": 1 - float(taken.costs.flops(early["loops"].mean()) / taken.costs.flops(loops)),
            "seconds": {side: statistics.median(each) for side, each in times.items()},
        }
        print(name, json.dumps(found["rules"][family.name]), flush=True)
    return found


def main(names: Sequence[str]) -> None:
    results: dict[str, Any] = {"machine": environment("cpu"), "rounds": ROUNDS, "models": {}}
    for name in names or ["shipped"]:
        results["models"][Path(name).name] = measure(name)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
