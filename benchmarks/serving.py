"""The server under load, beside the engine that answers without one.

    python benchmarks/serving.py load [shipped|exact|wide]    about 2 minutes on two cores; leave the machine alone
    python benchmarks/serving.py efforts                      about 1 minute

load      The server on a loopback port, its clients in another process. First its capacity: 32 clients that always ask
          again. Then open Poisson arrivals at 0.7 of it for 60 s: prompts of 64 tokens of held-out text, answers of 32
          to 192 tokens, all efforts in turn, every second answer streamed. Every answer is compared with the engine's
          own without a server, text and loops. One that differs is followed in float64, token by token and loop by
          loop: it is wrong if a token's score lies more than 1e-4 below the best, or a loop's probability of having
          stopped more than 1e-4 on the wrong side of the rule's threshold; else rounding chose between two. Bars: no
          wrong answer; the server's CPU seconds per token under 10% of the engine's (the client is a process of its own
          and not counted). `shipped` is the checkpoint of 0.7 million parameters that comes with Loopwise, with a
          measured ladder, in float32; `exact` is the same in float64; `wide` has 17 million at random, since a server
          costs the same for every model.
efforts   The shipped checkpoint with a measured ladder: loss on held-out text at every rung, the continuation's own
          tokens followed by the engine, and seconds per token of answers over HTTP. Bars: loss does not rise with
          effort within the 95% interval of the paired difference over texts; time rises.

Results go to benchmarks/results/serving.json.
"""

import asyncio
import copy
import json
import math
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "serving.json"
FOLDER = Path("runs/benchmarks/served")
CLOSED, CAPACITY_SECONDS, OPEN_SECONDS, SHARE = 32, 12.0, 60.0, 0.7
POLICY, TEMPERATURE, SEED = "last_exited", 0.8, 0
ROUNDING = 1e-4
"""How far float32 may stand from float64 where it chooses."""


@dataclass(frozen=True)
class Ask:
    """One request of the load."""

    number: int
    prompt: str
    effort: str
    tokens: int
    stream: bool


@dataclass
class Got:
    """What the client saw of its answer. Times in seconds."""

    number: int
    text: str
    loops: int
    tokens: int
    late: float
    """How long after its time it was sent."""
    first: float | None
    """To the first text of a streamed answer."""
    between: float | None
    """Between its tokens, on average."""
    whole: float


# The client's side, a process of its own: it knows HTTP and nothing of the engine.


async def ask_one(http: Any, ask: Ask, late: float) -> Got:
    body = {
        "model": "served",
        "prompt": ask.prompt,
        "max_tokens": ask.tokens,
        "temperature": TEMPERATURE,
        "seed": ask.number,
        "ignore_eos": True,
        "reasoning_effort": ask.effort,
        "stream": ask.stream,
    }
    if ask.stream:
        body["stream_options"] = {"include_usage": True}
    began = time.perf_counter()
    first = last = None
    text, usage = "", {}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        if ask.stream:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    if choice["text"]:
                        last = time.perf_counter()
                        first = first or last
                    text += choice["text"]
        else:
            answer = json.loads(await response.aread())
            text, usage = answer["choices"][0]["text"], answer["usage"]
    done = time.perf_counter()
    tokens = usage["completion_tokens"]
    return Got(
        number=ask.number,
        text=text,
        loops=usage["loop"]["total"],
        tokens=tokens,
        late=late,
        first=None if first is None else first - began,
        between=None if first is None or last is None or tokens < 2 else (last - first) / (tokens - 1),
        whole=done - began,
    )


async def ask_all(plan: dict[str, Any]) -> dict[str, Any]:
    import httpx

    asks = [Ask(**one) for one in plan["asks"]]
    got: list[Got] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=plan["url"], timeout=120, limits=limits) as http:
        began = time.perf_counter()
        if plan["rate"] is None:
            waiting = iter(asks)

            async def always() -> None:
                for ask in waiting:
                    if time.perf_counter() - began > plan["seconds"]:
                        return
                    got.append(await ask_one(http, ask, 0.0))

            await asyncio.gather(*(always() for _ in range(CLOSED)))
        else:
            chance, at, tasks = random.Random(SEED), 0.0, []
            for ask in asks:
                at += chance.expovariate(plan["rate"])
                if at > plan["seconds"]:
                    break
                await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                tasks.append(asyncio.create_task(ask_one(http, ask, time.perf_counter() - began - at)))
            got += await asyncio.gather(*tasks)
        return {"seconds": time.perf_counter() - began, "got": [asdict(one) for one in got]}


def client(url: str, asks: Sequence[Ask], *, seconds: float, rate: float | None) -> tuple[float, list[Got]]:
    """Ask from another process: at a rate of open Poisson arrivals, or from as many clients that always ask again."""
    plan = {"url": url, "asks": [asdict(ask) for ask in asks], "seconds": seconds, "rate": rate}
    done = subprocess.run(
        [sys.executable, __file__, "client"], input=json.dumps(plan), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout)
    return found["seconds"], [Got(**one) for one in found["got"]]


# The server's side.


@dataclass
class Served:
    """A server in this process."""

    url: str
    service: Any
    thread: threading.Thread

    def cpu(self) -> tuple[float, float, int]:
        """CPU seconds of the engine's thread and of everything else here so far, and tokens made."""
        engine = self.service.engine
        own = time.clock_gettime(time.pthread_getcpuclockid(engine._thread.ident))
        return own, time.process_time() - own, engine._core.counts.tokens


@contextmanager
def serving(model: Any) -> Iterator[Served]:
    from loopwise.serve.app import build_app
    from loopwise.serve.engine import build_engine
    from loopwise.serve.run import bind, make_server
    from loopwise.serve.service import Service
    from loopwise.serve.settings import ServeConfig

    config = ServeConfig()
    service = Service(build_engine(model, config, memory="1GiB", policy=POLICY, speculate="off"), config, name="served")
    listener = bind("127.0.0.1", 0)
    server = make_server(build_app(service), config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", service, thread)
    finally:
        server.should_exit = True
        thread.join()


def exact() -> Any:
    """The shipped checkpoint in float64, where another batch cannot choose another token by rounding."""
    return shipped("float64")


def shipped(dtype: str = "float32") -> Any:
    """The shipped checkpoint with a ladder that was measured just now."""
    import loopwise
    from loopwise.engine.ladder import write_ladder
    from loopwise.study.examples import of_text
    from loopwise.study.ladder import calibrate_ladder
    from loopwise.tasks.corpus import Corpus

    model = loopwise.load("shipped", dtype="float32")
    data = of_text(Corpus("python"), model.tokenizer, units=12_000, length=256, most_documents=4)
    loopwise.save(model, FOLDER)
    write_ladder(model, calibrate_ladder(model, data), FOLDER)
    return loopwise.load(FOLDER, dtype=dtype)


def wide() -> Any:
    import engine
    import loopwise

    model = engine.make(**engine.OURO)
    model.tokenizer = loopwise.load("shipped").tokenizer
    return model


def make_asks(model: Any, count: int, *, first: int) -> list[Ask]:
    import policies

    from loopwise.engine.ladder import EFFORTS

    texts = [model.tokenizer.decode(text.prompt) for text in policies.passages(model, policies.TEXTS)]
    chance = random.Random(first)
    return [
        Ask(
            number=number,
            prompt=texts[number % len(texts)],
            effort=EFFORTS[number % len(EFFORTS)],
            tokens=chance.randint(32, 192),
            stream=chance.random() < 0.5,
        )
        for number in range(first, first + count)
    ]


def offline(model: Any, served: Served, asks: Sequence[Ask]) -> list[Any]:
    """The same answers from an engine without a server."""
    from loopwise.engine.engine import Engine
    from loopwise.engine.sampling import Sampling

    settings = []
    for ask in asks:
        loops, rule = served.service.efforts.ladder.rung(ask.effort).settings
        settings.append(
            Sampling(
                max_tokens=ask.tokens,
                temperature=TEMPERATURE,
                seed=ask.number,
                ignore_eos=True,
                exit=rule,
                max_loops=loops,
            )
        )
    return Engine(model, POLICY, speculate="off", memory="1GiB").generate([ask.prompt for ask in asks], settings)


@contextmanager
def said_by(engine: Any) -> Iterator[dict[int, Any]]:
    """What the engine itself answered, and the settings that it was asked with, by the request's seed."""
    kept: dict[int, Any] = {}
    close = engine._core._done

    def keep(request: Any) -> None:
        kept[request.sampling.seed] = request.answer.completion(seconds=0.0, prompt_seconds=0.0), request.sampling
        close(request)

    engine._core._done = keep
    try:
        yield kept
    finally:
        engine._core._done = close


def farthest(exact: Any, given: Any, sampling: Any) -> float:
    """How far an answer's choices stand from those of a float64 model that follows it, at most."""
    import torch

    from loopwise.engine.engine import Engine
    from loopwise.engine.request import Replay
    from loopwise.loops.exits import Hazard, parse_rule
    from loopwise.nn.noise import gumbel

    every = replace(sampling, logprobs=exact.config.vocab_size)
    engine = Engine(exact, POLICY, speculate="off", memory="1GiB")
    replayed = Replay(tokens=given.tokens, loops=given.loops)
    found = engine.submit(given.prompt, every, replay=replayed, signals=True).wait()
    distance = 0.0
    rule = parse_rule(sampling.exit) if sampling.exit else None
    assert rule is None or isinstance(rule, Hazard), f"{rule} is not followed here"
    for place, (token, loops) in enumerate(zip(found.tokens, found.loops, strict=True)):
        ids = torch.tensor([one for one, _ in found.tops[place]])
        scores = torch.tensor([chance for _, chance in found.tops[place]], dtype=torch.float64) / sampling.temperature
        position = len(given.prompt) + place
        scores += gumbel(sampling.seed, "sampling", torch.tensor(0), torch.tensor(position), ids)
        distance = max(distance, float(scores.max() - scores[ids == token]))
        if rule is None or place == 0:  # the first token's row is the prompt's, which runs every loop
            continue
        stopped = 1 - torch.cumprod(1 - torch.tensor(found.signals[place], dtype=torch.float64), 0)
        early, last = stopped[: loops - 1], float(stopped[loops - 1])
        distance = max([distance, *(float(chance) - rule.threshold for chance in early)])
        if loops < sampling.max_loops:
            distance = max(distance, rule.threshold - last)
    return distance


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile, in milliseconds."""
    ordered = sorted(values)
    return {
        "median_ms": 1e3 * statistics.median(ordered),
        "p95_ms": 1e3 * ordered[math.ceil(0.95 * len(ordered)) - 1],
    }


def load(name: str) -> dict[str, Any]:
    model = {"shipped": shipped, "exact": exact, "wide": wide}[name]()
    ample = make_asks(model, 20_000, first=1_000_000)
    with serving(model) as served:
        client(served.url, ample[:64], seconds=3.0, rate=None)  # warms up
        seconds, got = client(served.url, ample[64:], seconds=CAPACITY_SECONDS, rate=None)
        capacity, tokens = len(got) / seconds, sum(one.tokens for one in got)
        asks = make_asks(model, math.ceil(2 * SHARE * capacity * OPEN_SECONDS) + 100, first=0)
        before = served.cpu()
        with said_by(served.service.engine) as said:
            open_seconds, answers = client(served.url, asks, seconds=OPEN_SECONDS, rate=SHARE * capacity)
        after = served.cpu()
        answers.sort(key=lambda one: one.number)
        wanted = offline(model, served, asks[: len(answers)])
        different = [
            one.number
            for one, other in zip(answers, wanted, strict=True)
            if (one.text, one.loops, one.tokens) != (other.text, sum(other.loops), len(other.tokens))
        ]
        for one in answers:
            assert one.text == said[one.number][0].text, f"answer {one.number} is not what the engine said"
        double = copy.deepcopy(model).double()
        distances = {number: farthest(double, *said[number]) for number in different}
        control = max(farthest(double, *said[one.number]) for one in answers[:20])
        refused = served.service.meters.refused
        served.service.engine.check_idle()
    made = after[2] - before[2]
    engine_cpu, server_cpu = (after[0] - before[0]) / made, (after[1] - before[1]) / made
    streamed = [one for one in answers if one.first is not None]
    return {
        "capacity": {"requests_per_second": capacity, "tokens_per_second": tokens / seconds},
        "arrivals_per_second": SHARE * capacity,
        "seconds": open_seconds,
        "answers": len(answers),
        "tokens": made,
        "mean_loops": sum(one.loops for one in answers) / made,
        "ladder": served.service.efforts.ladder.facts(),
        "wrong_answers": sum(distance > ROUNDING for distance in distances.values()),
        "different_by_rounding": {n: distance for n, distance in distances.items() if distance <= ROUNDING},
        "wrong_by": {n: distance for n, distance in distances.items() if distance > ROUNDING},
        "farthest_of_20_equal_answers": control,
        "refused": refused,
        "engine_cpu_us_per_token": 1e6 * engine_cpu,
        "server_cpu_us_per_token": 1e6 * server_cpu,
        "server_over_engine": server_cpu / engine_cpu,
        "sent_late": spread([one.late for one in answers]),
        "first_token": spread([one.first for one in streamed if one.first is not None]),
        "between_tokens": spread([one.between for one in streamed if one.between is not None]),
        "whole_answer": spread([one.whole for one in answers]),
    }


def efforts() -> dict[str, Any]:
    import httpx
    import policies

    from loopwise.study.statistics import mean_interval

    model = shipped()
    texts = policies.passages(model, policies.TEXTS)
    with serving(model) as served:
        ladder = served.service.efforts.ladder
        rungs = [rung for rung in ladder.rungs if ladder.same_as(rung.effort) is None]
        losses: dict[str, list[float]] = {}
        times: dict[str, list[float]] = {rung.effort: [] for rung in rungs}
        for rung in rungs:
            done = follow(model, texts, rung)
            losses[rung.effort] = [-statistics.fmean(one.logprobs) for one in done]
        with httpx.Client(base_url=served.url, timeout=120) as http:
            for turn in range(6):
                for rung in rungs:
                    body = {
                        "model": "served",
                        "prompt": [text.prompt for text in texts[:8]],
                        "max_tokens": 48,
                        "seed": turn,
                        "ignore_eos": True,
                        "reasoning_effort": rung.effort,
                    }
                    began = time.perf_counter()
                    answer = http.post("/v1/completions", json=body).json()
                    took = (time.perf_counter() - began) / answer["usage"]["completion_tokens"]
                    if turn:
                        times[rung.effort].append(took)
    found = []
    for place, rung in enumerate(rungs):
        entry: dict[str, Any] = {"effort": rung.effort, "max_loops": rung.max_loops, "exit": rung.exit}
        entry["loss"] = asdict(mean_interval(losses[rung.effort]))
        entry["ms_per_token"] = 1e3 * statistics.median(times[rung.effort])
        if place:
            below = rungs[place - 1].effort
            pairs = zip(losses[rung.effort], losses[below], strict=True)
            entry["loss_minus_rung_below"] = asdict(mean_interval([mine - other for mine, other in pairs]))
            entry["time_over_rung_below"] = entry["ms_per_token"] / (1e3 * statistics.median(times[below]))
        found.append(entry)
    steps = found[1:]
    return {
        "texts": len(texts),
        "rungs": found,
        "ladder": ladder.facts(),
        "quality_never_falls_beyond_its_interval": all(step["loss_minus_rung_below"]["low"] <= 0 for step in steps),
        "time_rises_at_every_rung": all(step["time_over_rung_below"] > 1 for step in steps),
    }


def follow(model: Any, texts: Sequence[Any], rung: Any) -> list[Any]:
    """The texts' own continuations as the engine reads them at this rung."""
    from loopwise.engine.engine import Engine
    from loopwise.engine.request import Replay
    from loopwise.engine.sampling import Sampling

    sampling = Sampling(max_tokens=len(texts[0].answer), ignore_eos=True, exit=rung.exit, max_loops=rung.max_loops)
    recordings = [Replay(tokens=text.answer) for text in texts]
    engine = Engine(model, POLICY, speculate="off", memory="1GiB")
    return engine.generate([text.prompt for text in texts], sampling, replays=recordings)


def main(words: Sequence[str]) -> None:
    if list(words) == ["client"]:
        print(json.dumps(asyncio.run(ask_all(json.load(sys.stdin)))))
        return
    import torch

    from loopwise.train.machine import environment

    torch.set_num_threads(1)
    part, name = words[0], words[1] if len(words) > 1 else "shipped"
    measured = load(name) if part == "load" else efforts()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if part == "load":
        found.setdefault("load", {})[name] = measured
    else:
        found["efforts"] = measured
    found["environment"] = environment()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in measured.items() if key != "ladder"}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:] not in (
        ["client"],
        ["load"],
        ["load", "shipped"],
        ["load", "exact"],
        ["load", "wide"],
        ["efforts"],
    ):
        sys.exit(
            "type: python benchmarks/serving.py load [shipped|exact|wide], or: python benchmarks/serving.py efforts"
        )
    main(sys.argv[1:])
