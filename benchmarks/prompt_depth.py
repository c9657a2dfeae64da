"""What prompts that obey the exit rule save and cost, and what deciding exits one loop ahead would.

    python benchmarks/prompt_depth.py cost     about 2 minutes on one core: losses, loops, bytes
    python benchmarks/prompt_depth.py time     about 1 minute: how long prompts take; nothing else should run
    python benchmarks/prompt_depth.py wide     the same on a model whose products take the time

The shipped checkpoint, under `last_exited`. Each text that the model has not seen is cut into a prompt and a
continuation, and the engine follows the continuation's own tokens (teacher forcing) while every row that may stop does
so by the rule. `full` and `exit` are the two prompt depths. `late` takes every decision one loop late with prompts at
full depth: a row whose rule fires after loop e answers after loop e + 1, so that no launch has to wait for a signal.
Spread: the standard error of the mean over texts.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from policies import Text, passages, standard_error
from torch import Tensor

from engine import OURO, make
from loopwise.bench.engine import ratios, take_turns
from loopwise.engine.answer import Completion
from loopwise.engine.engine import Engine
from loopwise.engine.request import Replay
from loopwise.engine.sampling import Sampling
from loopwise.hub.checkpoints import load
from loopwise.hub.locate import SHIPPED
from loopwise.loops.exits import ExitRule, NestedRule, Observation, Tracker, parse_rule, rule
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.noise import uniform
from loopwise.train.machine import environment

RESULTS = Path(__file__).parent / "results" / "prompt_depth.json"
PROMPT, ANSWER, TEXTS, ROUNDS, REPEATS = 128, 64, 48, 7, 4
RULES = ("hazard:0.3", "hazard:0.4", "hazard:0.5", "hazard:0.6", "hazard:0.7")


@rule("late")
@dataclass(frozen=True, kw_only=True)
class Late(NestedRule):
    """The inner rule fired one loop ago, or before."""

    form = "late:RULE"
    formula = "RULE fired after loop i - 1 or before"
    source = "Continuous Depth Batching, arXiv 2608.09444, where exits are decided one loop ahead"
    example = "late:hazard:0.6"
    earliest = "1 after RULE's"
    needs_in_words = "what RULE needs"

    @classmethod
    def parse(cls, argument: str) -> ExitRule:
        return cls(inner=parse_rule(argument))

    @property
    def argument(self) -> str:
        return str(self.inner)

    def track(self, units: int, device: torch.device | str | None = None) -> Tracker:
        return _LateTracker(self.inner, units, device)


class _LateTracker(Tracker):
    def __init__(self, inner: ExitRule, units: int, device: torch.device | str | None) -> None:
        super().__init__(units, device)
        self._inner = inner.track(units, device)
        self._fired = torch.zeros(units, dtype=torch.bool, device=device)

    def judge(self, observation: Observation) -> Bool[Tensor, " units"]:
        before, self._fired = self._fired, self._fired | self._inner.update(observation)
        return before


def follow(model: LoopedLM, texts: Sequence[Text], rule: str | None, depth: str) -> list[Completion]:
    engine = Engine(model, "last_exited", speculate="off", prefix_cache=False, prompt_depth=depth)
    sampling = Sampling(max_tokens=ANSWER, ignore_eos=True, exit=rule)
    recordings = [Replay(tokens=text.answer) for text in texts]
    return engine.generate([text.prompt for text in texts], sampling, replays=recordings)


def cost(model: LoopedLM, texts: Sequence[Text]) -> dict[str, Any]:
    """Loss, loops and bytes of each way under each rule, text by text beside full depth."""
    rows: dict[str, Any] = {}
    plain = follow(model, texts, None, "full")
    whole = [loss(done) for done in plain]
    ways = {"full": ("", "full"), "exit": ("", "exit"), "late": ("late:", "full")}
    for name in RULES:
        done = {way: follow(model, texts, before + name, depth) for way, (before, depth) in ways.items()}
        losses = {way: [loss(one) for one in answers] for way, answers in done.items()}
        rows[name] = {
            way: {
                "prompt_loops": statistics.mean(
                    loops for one in answers for loops in one.prompt_loops or [model.config.loops] * PROMPT
                ),
                "answer_loops": statistics.mean(loops for one in answers for loops in one.loops[1:]),
                "kv_bytes": statistics.mean(one.kv_bytes / (PROMPT + ANSWER - 1) for one in answers),
                "loss_more": difference(losses[way], whole),
                "loss_more_than_full": difference(losses[way], losses["full"]),
            }
            for way, answers in done.items()
        }
    return {"loss": statistics.mean(whole), "rules": rows}


def loss(done: Completion) -> float:
    return -statistics.mean(done.logprobs)


def difference(mine: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    more = [one - other for one, other in zip(mine, others, strict=True)]
    return {"mean": statistics.mean(more), "error": standard_error(more)}


def timing(model: LoopedLM, texts: Sequence[Text]) -> dict[str, Any]:
    """How much faster prompts are read at exit depth, all at once and one after the other; the sides take turns."""
    prompts = [text.prompt + list(text.answer) for text in texts] * REPEATS
    found: dict[str, Any] = {}
    for name in RULES:
        sampling = Sampling(max_tokens=1, ignore_eos=True, exit=name)

        def read(depth: str, seats: int, sampling: Sampling = sampling) -> Callable[[], float]:
            engine = Engine(
                model, "last_exited", speculate="off", prefix_cache=False, prompt_depth=depth, seats=seats, chunk=512
            )
            mine = prompts if seats > 1 else prompts[:8]

            def run() -> float:
                began = time.perf_counter()
                engine.generate(mine, sampling)
                return time.perf_counter() - began

            return run

        found[name] = {}
        for way, seats in (("together", 48), ("alone", 1)):
            times = take_turns({depth: read(depth, seats) for depth in ("full", "exit")}, ROUNDS)
            found[name][way] = ratios(times["full"], times["exit"])
    return found


def wide() -> dict[str, Any]:
    """The same on four layers of width 512 with random weights and recorded exits, 1 to 4 loops equally often."""
    model = make(**OURO)
    prompts = [
        (uniform(number, "bench prompts", torch.arange(PROMPT + ANSWER)) * model.config.vocab_size).long().tolist()
        for number in range(16)
    ]
    drawn = [1 + (uniform(number, "bench depths", torch.arange(PROMPT + ANSWER)) * 4).long() for number in range(16)]
    depths = [tuple(each.tolist()) for each in drawn]
    sides = {
        "full": ("full", [Replay(loops=(model.config.loops,))] * len(prompts)),
        "exit": ("exit", [Replay(loops=each[-1:], prompt_loops=each) for each in depths]),
    }

    def read(depth: str, replays: Sequence[Replay]) -> float:
        engine = Engine(model, "last_exited", speculate="off", prefix_cache=False, prompt_depth=depth, chunk=512)
        began = time.perf_counter()
        engine.generate(prompts, Sampling(max_tokens=1), replays=replays)
        return time.perf_counter() - began

    times = take_turns({side: partial(read, *arguments) for side, arguments in sides.items()}, 3)
    bound = model.config.loops / statistics.mean(loops for each in depths for loops in each)
    return {"bound": bound, "together": ratios(times["full"], times["exit"])}


def tell(results: dict[str, Any]) -> None:
    if "cost" in results:
        print(f"loss at full depth {results['cost']['loss']:.4f}")
        print(f"{'rule':12}{'way':6}{'prompt':>8}{'answer':>8}{'bytes':>8}{'loss, more':>18}{'more than full':>20}")
        for name, ways in results["cost"]["rules"].items():
            for way, row in ways.items():
                more, than = row["loss_more"], row["loss_more_than_full"]
                print(
                    f"{name:12}{way:6}{row['prompt_loops']:8.2f}{row['answer_loops']:8.2f}{row['kv_bytes']:8,.0f}"
                    f"{more['mean']:+10.4f} ±{more['error']:.4f}{than['mean']:+12.4f} ±{than['error']:.4f}"
                )
    if "wide" in results:
        row = results["wide"]["together"]
        print(
            f"width 512: {row['median']:.2f} times as fast ({row['least']:.2f} to {row['most']:.2f}), its loops alone "
            f"allow {results['wide']['bound']:.2f}"
        )
    for name, ways in results.get("time", {}).items():
        told = (f"{way} {row['median']:.2f} ({row['least']:.2f} to {row['most']:.2f})" for way, row in ways.items())
        print(f"{name:12}times as fast: {', '.join(told)}")


def main() -> None:
    parts = {"cost": cost, "time": timing}
    if len(sys.argv) != 2 or sys.argv[1] not in (*parts, "wide"):
        raise SystemExit(f"{sys.argv[1:]}: allowed is one of {', '.join(parts)}, wide")
    part = sys.argv[1]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if part == "wide":
        results[part] = wide()
    else:
        model = load(SHIPPED, dtype="float32")
        texts = passages(model, TEXTS, prompt=PROMPT, answer=ANSWER)
        results |= {"texts": len(texts), part: parts[part](model, texts)}
    results[f"{part}_machine"] = environment()
    tell(results)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
