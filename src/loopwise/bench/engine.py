"""The engine measured: depth batching, one request, many requests, and what speculation is worth.

Every comparison runs its sides in one process, in turn, and reports medians and ratios: to a baseline, and to what
arithmetic or memory bandwidth allow. Probes before and after tell whether the machine held still (`steady`).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from loopwise.engine.costs import CostCurve, measure_ticks
from loopwise.engine.engine import Engine
from loopwise.engine.request import Replay
from loopwise.engine.sampling import Sampling
from loopwise.errors import ConfigError
from loopwise.loops.exits import parse_rule
from loopwise.models.accounting import count_flops
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.kernels.linear import FEW_ROWS
from loopwise.nn.noise import uniform
from loopwise.train.machine import Probe, read_bandwidth


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the engine."""

    requests: int = 256
    """Requests in all."""
    seats: int = 64
    """Requests that run at once."""
    prompt: int = 16
    """Tokens of a prompt."""
    tokens: int = 48
    """Tokens of an answer."""
    temperature: float = 0.7
    """Sampling temperature."""
    rounds: int = 3
    """Times that each side runs, after once for warming up."""

    def __post_init__(self) -> None:
        for name in ("requests", "seats", "prompt", "tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed is 1 or more")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: allowed is 0 or more")

    def prompts(self, model: LoopedLM) -> list[list[int]]:
        """Pieces of a source file that comes with Python, or random ids for a model without a tokenizer."""
        if model.tokenizer is not None:
            ids = model.tokenizer.encode(Path(argparse.__file__).read_text(encoding="utf-8"))
            firsts = [number * 97 % (len(ids) - self.prompt) for number in range(self.requests)]
            return [ids[first : first + self.prompt] for first in firsts]
        places = torch.arange(self.requests * self.prompt).view(self.requests, self.prompt)
        drawn: list[list[int]] = (uniform(0, "bench prompts", places) * model.config.vocab_size).long().tolist()
        return drawn

    def depths(self, most: int) -> list[tuple[int, ...]]:
        """Loops of every answer's tokens: the prompt's own number, then 1 to R - 1, each as often as another."""
        places = torch.arange(self.requests * self.tokens).view(self.requests, self.tokens)
        drawn = 1 + (uniform(0, "bench depths", places) * max(1, most - 1)).long()
        return [(most, *loops[1:]) for loops in drawn.tolist()]


@dataclass(frozen=True)
class Served:
    """One run of a load."""

    seconds: float
    tokens: int
    loops: int
    """Loops that emitted them."""
    steady_seconds: float
    """Until the last request had been let in: every seat was taken."""
    steady_tokens: int
    ticks: int
    decoding_seconds: float
    """From each answer's first token to its last, added up: prompts and their chunks are left out."""


def serve(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    replays: Sequence[Replay | None] | None = None,
) -> Served:
    """Answer all prompts and note when the seats began to empty."""
    core = engine._core
    tokens, ticks = core.counts.tokens, core.counts.ticks
    tickets = [
        engine.submit(prompt, sampling, replay=None if replays is None else replays[number])
        for number, prompt in enumerate(prompts)
    ]
    began = time.perf_counter()
    steady_seconds, steady_tokens = 0.0, 0
    while engine.tick():
        if core.scheduler.waiting or not steady_seconds:
            steady_seconds, steady_tokens = time.perf_counter() - began, core.counts.tokens - tokens
    seconds = time.perf_counter() - began
    done = [ticket.completion for ticket in tickets]
    return Served(
        seconds=seconds,
        tokens=core.counts.tokens - tokens,
        loops=sum(sum(one.loops) for one in done),
        steady_seconds=steady_seconds,
        steady_tokens=steady_tokens,
        ticks=core.counts.ticks - ticks,
        decoding_seconds=sum(one.seconds - one.prompt_seconds for one in done),
    )


def take_turns(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Run every side once for warming up, then `rounds` times in turn."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            result = run()
            if turn:
                found[name].append(result)
    return found


def median(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Turn by turn."""
    return median([a / b for a, b in zip(over, under, strict=True)])


def load_flops(model: LoopedLM, load: Load, mean_loops: int | float, *, attention: bool = True) -> float:
    """Work of a whole load: prompts run every loop, answers `mean_loops`; the last token of an answer never runs."""
    loops = model.config.loops
    flops = count_flops(model.config, context=load.prompt + load.tokens // 2 if attention else 0)
    head = 2 * model.config.vocab_size * model.config.width
    prompt = load.prompt * (flops.total(loops) - head) + head
    return load.requests * (prompt + (load.tokens - 1) * flops.total(mean_loops))


def depth_batching(model: LoopedLM, load: Load, *, rule: str | None = None) -> dict[str, Any]:
    """Replayed depths, and real exits where a rule is given, beside the same engine told to run every loop.

    The bound is the work that full depth needs over the work that the depths need.
    """
    engine = Engine(model, "last_exited", speculate="off", prefix_cache=False, seats=load.seats)
    prompts, loops = load.prompts(model), model.config.loops
    sampling = Sampling(max_tokens=load.tokens, temperature=load.temperature, ignore_eos=True)
    whole: Sequence[Replay] = [Replay(loops=(loops,) * load.tokens)] * load.requests
    replayed = [Replay(loops=depths) for depths in load.depths(loops)]
    sides: dict[str, Callable[[], Served]] = {
        "fixed": lambda: serve(engine, prompts, sampling, whole),
        "depths": lambda: serve(engine, prompts, sampling, replayed),
    }
    if rule is not None:
        sides["real exits"] = lambda: serve(engine, prompts, _with_exit(sampling, rule))
    runs = take_turns(sides, load.rounds)
    fixed = runs["fixed"]
    rate = plain_rate(model, load.seats)
    work = load_flops(model, load, loops, attention=False)
    out: dict[str, Any] = {
        "requests": load.requests,
        "seats": load.seats,
        "fixed_tokens_per_second": median([run.tokens / run.seconds for run in fixed]),
        "plain_product_gflops": rate / 1e9,
        # Fewer rows go through a kernel of our own, which this does not see.
        "share_of_plain_products": product_share(sides["fixed"], work, rate) if load.seats > FEW_ROWS else None,
        "whole_time_share_of_plain_products": median([work / run.seconds / rate for run in fixed]),
    }
    for name in ("depths", "real exits"):
        if name not in runs:
            continue
        mean = _mean_loops(runs[name][0], load, loops)
        bound = load_flops(model, load, loops) / load_flops(model, load, mean)
        speedup = ratios([run.seconds for run in fixed], [run.seconds for run in runs[name]])
        out[name] = {
            "mean_loops": mean,
            "bound": bound,
            "speedup": speedup,
            "share_of_bound": speedup["median"] / bound,
        }
        # With a seat for every request there is no stretch in which all seats are taken.
        if load.requests > load.seats:
            steady = ratios(
                [run.steady_seconds / run.steady_tokens for run in fixed],
                [run.steady_seconds / run.steady_tokens for run in runs[name]],
            )
            out[name] |= {"steady_speedup": steady, "share_of_bound_steady": steady["median"] / bound}
    return out


def asking(model: LoopedLM, load: Load) -> dict[str, Any]:
    """What it costs to ask an exit rule after every loop when nobody ever leaves; one seat for every request."""
    engine = Engine(model, "last_exited", speculate="off", prefix_cache=False, seats=load.requests)
    prompts, loops = load.prompts(model), model.config.loops
    sampling = Sampling(max_tokens=load.tokens, temperature=load.temperature, ignore_eos=True)
    never = "hazard:1.0" if model.facts.signal == "hazard" else "delta:1e-9"
    whole = [Replay(loops=(loops,) * load.tokens)] * load.requests
    runs = take_turns(
        {
            "told": lambda: serve(engine, prompts, sampling, whole),
            "asked": lambda: serve(engine, prompts, _with_exit(sampling, never)),
        },
        load.rounds,
    )
    pairs = zip(runs["asked"], runs["told"], strict=True)
    return {"rule": never, "overhead": median([asked.seconds / told.seconds - 1 for asked, told in pairs])}


def _with_exit(sampling: Sampling, rule: str) -> Sampling:
    return Sampling(
        max_tokens=sampling.max_tokens, temperature=sampling.temperature, ignore_eos=sampling.ignore_eos, exit=rule
    )


def _mean_loops(run: Served, load: Load, loops: int) -> float:
    """Over the answers' rows; the first token of each answer came from the prompt."""
    first = load.requests * loops
    return (run.loops - first) / (run.tokens - load.requests)


@torch.inference_mode()
def plain_rate(model: LoopedLM, rows: int, *, seconds: float = 0.3) -> float:
    """FLOP/s that the core's matrices reach in plain products with this many rows, one after the other."""
    matrices = [weight for weight in model.core.parameters() if weight.dim() == 2 and weight.shape[0] > 1]
    inputs = {width: torch.randn(rows, width).to(matrices[0]) for width in {weight.shape[1] for weight in matrices}}
    work = sum(2 * rows * weight.numel() for weight in matrices)
    times: list[float] = []
    while not times or sum(times) < seconds:
        began = time.perf_counter()
        for weight in matrices:
            F.linear(inputs[weight.shape[1]], weight)
        times.append(time.perf_counter() - began)
    return work / statistics.median(times)


class _Products(TorchFunctionMode):
    """Adds up the seconds that matrix products take."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        began = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.seconds += time.perf_counter() - began
        return out


def product_share(serving: Callable[[], Served], work: float, rate: float) -> float:
    """At what part of the plain rate matrix products run while the engine serves: their own time alone is counted."""
    products = _Products()
    with products:
        serving()
    return work / products.seconds / rate


def one_request(model: LoopedLM, load: Load, *, draft_loop: int = 1) -> dict[str, Any]:
    """One request at a time, greedy: against memory bandwidth, and with drafts against what their acceptance allows.

    Plain decoding reads the core R times and the head once per token; nothing can be faster than the machine reads
    that. A draft that settles after s loops of R lets a token be made every s ticks instead of R: where drafts are
    made once, after loop d, and a share a of them is right, s = a d + (1 - a) R. c is what launching and reading takes
    for a tick of the R / s rows that are then in flight, each of them read out, over a tick of plain decoding: one row,
    read out in every R-th. It is measured beside the engine on contexts of the same length; what scheduling, judging
    and telling take besides is not in it. Prompts are in neither side.

    The share of that prediction which is reached has two factors. `ticks`: a pipeline of rows must fill when an answer
    begins, and its windows may be too short. `host`: c over what the engine's own ticks cost beside each other.
    """
    prompts, loops = load.prompts(model)[: load.rounds], model.config.loops
    sampling = Sampling(max_tokens=load.tokens, temperature=load.temperature, ignore_eos=True)
    engines = {
        name: Engine(model, "last_exited", speculate=how, prefix_cache=False, seats=1, chunk=load.prompt)
        for name, how in (("plain", "off"), ("drafts", str(draft_loop)), ("auto", "auto"))
    }
    sides: dict[str, Callable[[], Any]] = {
        name: partial(serve, engine, prompts, sampling) for name, engine in engines.items()
    }
    # In turn with the others: what memory gives changes within minutes.
    runs = take_turns({"bandwidth": read_bandwidth, **sides}, load.rounds)
    bandwidth = runs.pop("bandwidth")
    # A prompt is one chunk, so it takes a tick for each loop.
    ticks = {name: [run.ticks - len(prompts) * loops for run in found] for name, found in runs.items()}
    per_token = {
        name: [run.decoding_seconds / (run.tokens - len(prompts)) for run in found] for name, found in runs.items()
    }
    core = sum(weight.nbytes for weight in model.core.parameters())
    adapter = 0 if model.adapter is None else sum(weight.nbytes for weight in model.adapter.parameters())
    outside = sum(weight.nbytes for part in (model.prelude, model.coda) for weight in part.parameters())
    read = loops * (core + adapter) + outside + model.head_weight.nbytes
    out: dict[str, Any] = {
        "agreement_by_loop": agreement(model, engines["plain"], prompts, sampling),
        "core_bytes": core,
        "read_gigabytes_per_second": median([rate / 1e9 for rate in bandwidth]),
        "plain_tokens_per_second": median([1 / seconds for seconds in per_token["plain"]]),
        "share_of_bandwidth": ratios([read / seconds for seconds in per_token["plain"]], bandwidth),
    }
    if loops == 1:
        return out  # there is no loop to draft after
    cost = draft_cost(engines["plain"]._core.runner.model, loops, load.prompt + load.tokens // 2)
    for name in ("drafts", "auto"):
        speculator = engines[name]._core.speculator
        if speculator is None or not speculator.settled:
            continue
        speedup = ratios(per_token["plain"], per_token[name])
        settling = speculator.mean_settling
        predicted = loops / settling / cost(loops / settling)
        saved = statistics.median(ticks["plain"]) / statistics.median(ticks[name])
        seen = saved / speedup["median"]
        out[name] = {
            "speedup": speedup,
            "acceptance": speculator.acceptance,
            "mean_settling_loop": settling,
            "rows_in_flight": loops / settling,
            "tick_cost_of_flight": cost(loops / settling),
            "predicted": predicted,
            "share_of_prediction": speedup["median"] / max(1.0, predicted),
            "ticks_saved": saved,
            "tick_cost_of_engine": seen,
            "share_of_ticks": saved / (loops / settling),
            "share_of_host": cost(loops / settling) / seen,
        }
    if "auto" in out:
        out["tick_cost"] = {str(rows): cost(rows) for rows in range(1, loops + 1)}
    return out


def least_of(curves: Sequence[CostCurve]) -> CostCurve:
    """The least that each number of rows took; what else the machine does only adds time."""
    return CostCurve(
        rows=curves[0].rows,
        seconds=tuple(min(seconds) for seconds in zip(*(curve.seconds for curve in curves), strict=True)),
    )


def draft_cost(model: LoopedLM, loops: int, context: int) -> Callable[[float], float]:
    """What a tick of n rows that are all read out costs the model, over a tick of plain decoding; see `one_request`."""
    # In turn: a machine that changes between the two would change their ratio.
    measure = partial(measure_ticks, model, loops, context=context)
    runs = take_turns({"looped": partial(measure, read=False), "read": partial(measure, read=True)}, 5)
    looped, read = least_of(runs["looped"]), least_of(runs["read"])
    plain = looped(1) + (read(1) - looped(1)) / loops
    return lambda rows: read(rows) / plain


@torch.no_grad()
def agreement(model: LoopedLM, engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[float]:
    """Share of answered positions at which each loop's likeliest token is that of the last loop, loop 1 first."""
    agreed = torch.zeros(model.config.loops)
    done = engine.generate(prompts, sampling)
    for answer in done:
        tokens = torch.tensor([[*answer.prompt, *answer.tokens[:-1]]])
        logits = model(tokens, collect=("logits",)).loop_logits
        if logits is not None:
            likeliest = logits[:, 0, len(answer.prompt) - 1 :].argmax(-1)
            agreed += (likeliest == likeliest[-1]).float().mean(-1)
    shares: list[float] = (agreed / len(done)).tolist()
    return shares


def crowd(model: LoopedLM, load: Load) -> dict[str, Any]:
    """Many requests at once with drafts left to the engine, over the same without."""
    prompts = load.prompts(model)
    sampling = Sampling(max_tokens=load.tokens, temperature=load.temperature, ignore_eos=True)
    options: dict[str, Any] = {"prefix_cache": False, "seats": load.seats}
    engines = {how: Engine(model, "last_exited", speculate=how, **options) for how in ("off", "auto")}
    sides = {how: (lambda engine=engine: serve(engine, prompts, sampling)) for how, engine in engines.items()}
    runs = take_turns(sides, load.rounds)
    return {
        "requests_at_once": load.seats,
        "auto_over_off": ratios([run.seconds for run in runs["off"]], [run.seconds for run in runs["auto"]]),
        "draft_rows": engines["auto"]._core.counts.draft_rows,
    }


def steady(part: Callable[[], dict[str, Any]], *, attempts: int = 2) -> dict[str, Any]:
    """A part between two probes, again if the machine did not hold still meanwhile."""
    for _ in range(attempts):
        probe = Probe()
        probe.read()
        found = part()
        probe.read()
        if not probe.drifted:
            break
    return {**found, "threads": torch.get_num_threads(), "drift": probe.drift, "held_still": not probe.drifted}


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Load):
    """What to ask of the engine, and of what model."""

    exit: str | None = None
    """Exit rule for real exits beside replayed depths; None leaves them out."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """Number type of the weights; none keeps the checkpoint's."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exit is not None:
            parse_rule(self.exit)


def run(model: LoopedLM, config: BenchConfig) -> dict[str, Any]:
    """All scenarios on one model."""
    alone = replace(config, requests=config.rounds, seats=1)
    return {
        "threads": torch.get_num_threads(),
        "depth": steady(lambda: depth_batching(model, config, rule=config.exit)),
        "asking": steady(lambda: asking(model, replace(config, requests=config.seats))),
        "one": steady(lambda: one_request(model, alone)),
        "crowd": steady(lambda: crowd(model, config)),
    }
