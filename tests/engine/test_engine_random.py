"""Random workloads: requests come, vanish and are driven out at random ticks; the readable generator is the model."""

import runpy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.engine.answer import Completion
from loopwise.engine.engine import Engine
from loopwise.engine.layout import layout_of
from loopwise.engine.reference import generate
from loopwise.engine.request import Stage
from loopwise.engine.sampling import Sampling
from loopwise.engine.speculation import Speculation
from loopwise.engine.ticket import Ticket
from loopwise.models.looped_lm import LoopedLM

TESTS = Path(__file__).parents[1]
tiny: Callable[..., LoopedLM] = runpy.run_path(str(TESTS / "models" / "naive_lm.py"))["tiny"]
RULES = {"ouro": [None, "hazard:0.7", "delta:0.7", "stable:1"], "huginn": [None, "delta:0.8", "kl:0.3"]}


@lru_cache
def model_of(name: str) -> LoopedLM:
    return tiny(name)


@lru_cache(maxsize=4096)
def reference(name: str, prompt: tuple[int, ...], sampling: Sampling, policy: str, depth: str) -> Completion:
    return generate(model_of(name), [prompt], sampling, policy=policy, prompt_depth=depth)[0]


@st.composite
def workloads(draw: st.DrawFn) -> dict[str, object]:
    name = draw(st.sampled_from(sorted(RULES)))
    depth = draw(st.sampled_from(["full", "exit"]))
    # Within prompts a rule may not read what a coda makes of positions that have not stopped.
    rules = [rule for rule in RULES[name] if (name, depth, rule) != ("huginn", "exit", "kl:0.3")]
    shared = [5, 9, 2, 2, 7, 1, 0, 3, 8, 4, 6, 11, 13, 12, 10, 14, 15, 16, 1, 2]
    request = st.fixed_dictionaries(
        {
            "prompt": st.one_of(
                st.integers(1, 20).map(lambda length: tuple(shared[:length])),
                st.lists(st.integers(0, 22), min_size=1, max_size=8).map(tuple),
            ),
            "max_tokens": st.integers(1, 12),
            "exit": st.sampled_from(rules),
            "max_loops": st.integers(1, 4),
            "temperature": st.sampled_from([0.0, 0.8]),
            "seed": st.integers(0, 3),
        }
    )
    action = st.one_of(
        request,
        st.integers(1, 6),
        st.tuples(st.sampled_from(["abort", "aside"]), st.integers(0, 5)),
    )
    return {
        "name": name,
        "depth": depth,
        "policy": draw(st.sampled_from(["per_loop", "last_exited"])),
        "pages": draw(st.integers(3, 8)),
        "rows": draw(st.integers(1, 8)),
        "chunk": draw(st.integers(1, 24)),
        "seats": draw(st.integers(1, 5)),
        "window": draw(st.integers(0, 4)),
        "redraft": draw(st.booleans()),
        "actions": draw(st.lists(action, min_size=3, max_size=16)),
    }


@settings(max_examples=settings().max_examples // 4)
@given(workloads())
def test_a_random_workload_is_answered_as_if_each_request_were_alone(load: dict[str, object]) -> None:
    run_workload(load)


def run_workload(load: dict) -> None:  # type: ignore[type-arg]
    model, policy = model_of(load["name"]), load["policy"]
    engine = Engine(
        model,
        policy,
        speculate=Speculation(window=load["window"], redraft=load["redraft"]),
        memory=load["pages"] * layout_of(model).group_bytes(4),
        chunk=load["chunk"],
        seats=load["seats"],
        rows=load["rows"],
        max_loops=4,
        prompt_depth=load["depth"],
    )
    scheduler = engine._core.scheduler
    tickets: list[tuple[Ticket, Sampling]] = []
    for action in load["actions"]:
        if isinstance(action, dict):
            rest = {name: value for name, value in action.items() if name != "prompt"}
            sampling = Sampling(**rest)
            tickets.append((engine.submit(action["prompt"], sampling), sampling))
        elif isinstance(action, int):
            for _ in range(action):
                engine.tick()
        elif action[0] == "abort" and tickets:
            engine.abort(tickets[action[1] % len(tickets)][0])
        elif action[0] == "aside" and scheduler.running:
            # What a lack of pages does to the youngest, done to anyone.
            scheduler.step_aside(scheduler.running[action[1] % len(scheduler.running)])
    while engine.tick():
        pass
    engine.check_idle()
    for ticket, sampling in tickets:
        assert ticket.over
        got, wanted = ticket.completion, reference(load["name"], ticket.prompt, sampling, policy, load["depth"])
        count = len(got.tokens)
        if got.finish_reason != "abort":
            assert count == len(wanted.tokens)
        assert got.tokens == wanted.tokens[:count]
        assert got.loops == wanted.loops[:count]
        assert got.prompt_loops == (wanted.prompt_loops if count else ())
        assert got.logprobs == pytest.approx(wanted.logprobs[:count], abs=1e-9)
    assert all(ticket._request.stage is Stage.DONE for ticket, _ in tickets)
