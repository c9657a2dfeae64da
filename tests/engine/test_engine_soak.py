"""Ten thousand requests through little memory, many of them called off: nothing leaks, nothing is wrong."""

import random
import resource
import runpy
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from loopwise.engine.answer import Completion
from loopwise.engine.engine import Engine
from loopwise.engine.layout import layout_of
from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.engine.speculation import Speculation
from loopwise.engine.ticket import Ticket
from loopwise.models.looped_lm import LoopedLM

tiny: Callable[..., LoopedLM] = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]
REQUESTS = 10_000
GROWTH = 32 * 2**20
"""Bytes that the process may grow between the 2,000th request and the last."""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["last_exited", "per_loop"])
def test_ten_thousand_requests(policy: str) -> None:
    model = tiny()
    kinds = kinds_of_request(random.Random(0))
    chance = random.Random(1)

    @cache
    def reference(kind: int) -> Completion:
        prompt, sampling = kinds[kind]
        return generate(model, [prompt], sampling, policy=policy)[0]

    engine = Engine(
        model,
        policy,
        speculate=Speculation(window=1),
        memory=6 * layout_of(model).group_bytes(3),
        chunk=16,
        seats=6,
        rows=24,
        max_loops=3,
    )
    open_tickets: dict[Ticket, int] = {}
    reasons: Counter[str] = Counter()
    submitted, after_2000 = 0, 0
    while submitted < REQUESTS or open_tickets:
        while submitted < REQUESTS and len(open_tickets) < 16:
            kind = chance.randrange(len(kinds))
            open_tickets[engine.submit(*kinds[kind])] = kind
            submitted += 1
        if chance.random() < 0.05:
            engine.abort(chance.choice(list(open_tickets)))
        for _ in range(chance.randint(1, 4)):
            engine.tick()
        for ticket in [ticket for ticket in open_tickets if ticket.over]:
            check(ticket.completion, reference(open_tickets.pop(ticket)))
            reasons[ticket.completion.finish_reason] += 1
        if not after_2000 and reasons.total() >= 2_000:
            after_2000 = peak_bytes()
    engine.check_idle()
    assert reasons.total() == REQUESTS
    assert 200 < reasons["abort"] < REQUESTS / 2
    assert engine._core.scheduler.preemptions > 100
    assert engine._core.prefix is not None
    assert engine._core.prefix.hits > 0
    assert peak_bytes() - after_2000 < GROWTH


def kinds_of_request(chance: random.Random) -> list[tuple[list[int], Sampling]]:
    """Some hundred requests; most are short, their prompts begin alike, and a sixth of them grows over three pages."""
    common = [chance.randrange(23) for _ in range(24)]
    kinds = []
    for number in range(120):
        prompt = common[: chance.randint(1, 24)] + [chance.randrange(23) for _ in range(chance.randint(0, 3))]
        sampling = Sampling(
            max_tokens=34 if number % 6 == 0 else chance.randint(1, 8),
            exit=chance.choice([None, "hazard:0.7", "delta:0.8"]),
            max_loops=chance.randint(1, 3),
            temperature=chance.choice([0.0, 0.9]),
            seed=number,
        )
        kinds.append((prompt, sampling))
    return kinds


def check(got: Completion, wanted: Completion) -> None:
    count = len(got.tokens)
    assert got.finish_reason == "abort" or count == len(wanted.tokens)
    assert got.tokens == wanted.tokens[:count]
    assert got.loops == wanted.loops[:count]
    assert got.logprobs == pytest.approx(wanted.logprobs[:count], abs=1e-9)


def peak_bytes() -> int:
    """The most memory that this process has had so far (Linux counts it in units of 1,024 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
