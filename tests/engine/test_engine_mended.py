"""Mistakes that were made once: each test failed before."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loopwise.engine.engine import Engine
from loopwise.engine.reference import generate
from loopwise.engine.request import Replay
from loopwise.engine.sampling import Sampling
from loopwise.errors import ConfigError, InputError
from loopwise.models.looped_lm import LoopedLM

TESTS = Path(__file__).parents[1]
tiny: Callable[..., LoopedLM] = runpy.run_path(str(TESTS / "models" / "naive_lm.py"))["tiny"]


def test_what_filling_rows_have_said_to_the_coda_survives_stepping_aside() -> None:
    model = tiny("huginn")
    prompt, loops = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], (4, *[1] * 11)
    settings = Sampling(max_tokens=12, max_loops=4)
    plain = Engine(model, "per_loop", max_loops=4, speculate="off").generate(
        [prompt], settings, replays=[Replay(loops=loops)]
    )
    engine = Engine(model, "per_loop", max_loops=4, speculate="off", prefix_cache=False)
    ticket = engine.submit(prompt, settings, replay=Replay(loops=loops))
    scheduler, boundary = engine._core.scheduler, engine._memory.boundary
    assert boundary is not None
    aside = 0
    while engine.tick():
        for request in list(scheduler.running):
            if request.flight and request.frontier and request.flight[0].position <= 16 <= len(request.left):
                scheduler.step_aside(request)
                for table in (*boundary.keys.values(), *boundary.values.values()):
                    table.fill_(torch.nan)
                aside += 1
                break
    assert aside
    assert ticket.completion.tokens == plain[0].tokens
    assert ticket.completion.logprobs == pytest.approx(plain[0].logprobs, abs=1e-9)
    engine.check_idle()


def test_a_prompt_read_with_old_weights_is_not_found_with_new_ones() -> None:
    model = tiny("ouro")
    engine = Engine(model, "per_loop", speculate="off")
    prompt = [*range(20)]
    ticket = engine.submit(prompt, Sampling(max_tokens=20))
    for _ in range(8):
        engine.tick()
    with torch.no_grad():
        for weight in model.core.parameters():
            weight.mul_(1.1)
    engine.abort(ticket)
    engine.tick()
    got = engine.generate([prompt], Sampling(max_tokens=4))[0]
    wanted = generate(model, [prompt], Sampling(max_tokens=4), policy="per_loop")[0]
    assert got.tokens == wanted.tokens
    assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-9)


def test_an_engine_that_broke_off_in_the_middle_of_a_tick_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny("ouro"))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._core.judge, "stopping", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2]], Sampling(max_tokens=4))
    with pytest.raises(RuntimeError, match="make a new one"):
        engine.generate([[1, 2]])


@pytest.mark.parametrize(
    ("error", "said", "ask"),
    [
        (ConfigError, "start=5", lambda engine: engine.submit([1], Sampling(start=5))),
        (ConfigError, "n=2", lambda engine: engine.submit([1], Sampling(n=2, temperature=1.0))),
        (InputError, "give a list", lambda engine: engine.generate("text")),
        (
            InputError,
            "outside the vocabulary",
            lambda engine: engine.submit([1], Sampling(max_tokens=2), replay=Replay(tokens=(1, 99))),
        ),
    ],
)
def test_what_would_fail_in_a_tick_is_refused_before(
    error: type[Exception], said: str, ask: Callable[[Engine], object]
) -> None:
    engine = Engine(tiny("ouro"))
    with pytest.raises(error, match=said):
        ask(engine)
    assert engine.generate([[1, 2]], Sampling(max_tokens=2))[0].finish_reason == "length"
