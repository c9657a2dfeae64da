"""Mistakes that were made once: each test failed before."""

import inspect
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loopwise.engine.checks import _whole_numbers
from loopwise.engine.choosing import Draw, choose_batch
from loopwise.engine.engine import Engine
from loopwise.engine.layout import layout_of
from loopwise.engine.reference import generate
from loopwise.engine.request import Replay, Stage
from loopwise.engine.sampling import Sampling, choose
from loopwise.engine.speculation import Speculation, saved_speculation
from loopwise.errors import CheckpointError, ConfigError, InputError
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
    scheduler, boundary = engine._core.scheduler, engine._core.runner.memory.boundary
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


def drained(engine: Engine) -> list[int]:
    """Every free page of the core, taken away."""
    pool = engine._core.runner.memory.core
    return [pool.take() for _ in range(pool.free)]


def test_prompts_that_start_together_keep_within_the_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("ouro")
    engine = Engine(model, speculate="off", seats=8, chunk=4, rows=6, prefix_cache=False)
    seen: list[tuple[int, int]] = []
    run = engine._core.runner.loop

    def watched(rows: Any, chunks: Any) -> Any:
        prompt = sum(chunk.rows for _, chunk in chunks)
        seen.append((prompt, len(rows) + prompt))
        return run(rows, chunks)

    monkeypatch.setattr(engine._core.runner, "loop", watched)
    prompts = [[number, *range(2 + number % 5)] for number in range(12)]
    settings = Sampling(max_tokens=5)
    got = engine.generate(prompts, settings)
    assert max(prompt for prompt, _ in seen) == 4
    assert max(total for _, total in seen) == 6
    assert [one.tokens for one in got] == [one.tokens for one in generate(model, prompts, settings)]


def test_a_prompt_that_may_not_be_cut_runs_though_it_is_longer_than_the_budget() -> None:
    model = tiny("ouro")
    engine = Engine(model, "single", chunk=None, prefix_cache=False, rows=4)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [7, 6, 5], [3, 3, 3, 3, 3, 3]]
    got = engine.generate(prompts, Sampling(max_tokens=3))
    for prompt, answer in zip(prompts, got, strict=True):
        own = Engine(model, "single", chunk=None, prefix_cache=False).generate([prompt], Sampling(max_tokens=3))[0]
        assert answer.tokens == own.tokens


def test_planes_that_nobody_reached_stay_without_pages() -> None:
    engine = Engine(tiny("ouro"), "last_exited", speculate="off", prefix_cache=False)
    loops = (3, *[1] * 38, 3, 1)
    ticket = engine.submit([1, 2], Sampling(max_tokens=41), replay=Replay(loops=loops))
    while len(ticket.completion.tokens) < 40:
        engine.tick()
    pages = engine._core.scheduler.running[0].pages
    assert pages is not None
    # The prompt's page, and that of the one deep position, 40; what lies between stopped after one loop.
    assert [len(pages.held(plane)) for plane in (1, 2, 3)] == [3, 2, 2]


def test_drafts_give_way_to_their_own_frontier() -> None:
    model = tiny("ouro")
    loops = (3, *[1] * 30, 3, 1, 1, 1)
    wanted = Engine(model, "last_exited", speculate="off").generate(
        [[1]], Sampling(max_tokens=35), replays=[Replay(loops=loops)]
    )[0]
    engine = Engine(model, "last_exited", speculate=Speculation(window=2, redraft=False), prefix_cache=False)
    ticket = engine.submit([1], Sampling(max_tokens=35), replay=Replay(loops=loops))
    request = ticket._request
    while not (request.flight and request.flight[0].position == 31 and request.flight[0].loop == 1):
        engine.tick()
    engine.tick()
    draft = request.flight[1]
    assert (request.flight[0].loop, draft.position, draft.loop) == (2, 32, 1)
    taken = drained(engine)
    engine.tick()
    assert request.left[31:] == [3]
    for page in taken:
        engine._core.runner.memory.core.release(page)
    assert ticket.wait().tokens == wanted.tokens
    engine.check_idle()


def test_what_the_cache_will_lend_is_not_given_up_to_make_room() -> None:
    model = tiny("ouro")
    five_pages = 5 * layout_of(model).group_bytes(model.config.loops)
    engine = Engine(model, "per_loop", speculate="off", memory=five_pages)
    prompt = [number % 20 for number in range(49)]
    first = engine.generate([prompt], Sampling(max_tokens=4))[0]
    prefix = engine._core.prefix
    assert prefix is not None
    assert prefix.hits == 0
    assert engine.generate([prompt], Sampling(max_tokens=4))[0].tokens == first.tokens
    assert (prefix.hits, prefix.queries) == (48, 96)


def test_who_comes_back_in_the_middle_of_a_prompt_needs_room_for_the_rest() -> None:
    model = tiny("ouro")
    prompt = [number % 20 for number in range(60)]
    wanted = generate(model, [prompt], Sampling(max_tokens=2))[0]
    engine = Engine(model, "per_loop", speculate="off", chunk=16, prefix_cache=False)
    ticket = engine.submit(prompt, Sampling(max_tokens=2))
    while ticket._request.cursor < 16:
        engine.tick()
    engine._core.scheduler.step_aside(ticket._request)
    snapshot = ticket._request.snapshot
    assert snapshot is not None
    taken = drained(engine)
    for _ in range(snapshot.counts[0] + model.config.loops):
        engine._core.runner.memory.core.release(taken.pop())
    engine.tick()
    assert ticket._request.stage is Stage.WAITING
    for page in taken:
        engine._core.runner.memory.core.release(page)
    assert ticket.wait().tokens == wanted.tokens


@pytest.mark.parametrize("settings", [Sampling(temperature=1.0, top_p=0.5), Sampling(temperature=1.0, top_k=3)])
def test_logits_that_are_no_numbers_still_give_a_token(settings: Sampling) -> None:
    logits = torch.full((2, 7), torch.nan)
    assert 0 <= choose(logits[0], settings, position=1) < 7
    both = choose_batch(logits, [Draw(sampling=settings, position=1)] * 2)
    assert all(0 <= token < 7 for token in both.tokens.tolist())


# Called without the tests' own type checks, which would be first to refuse.
whole_numbers = inspect.unwrap(_whole_numbers)


@pytest.mark.parametrize(
    ("prompt", "said"), [(1, "1 is no prompt"), ([1, 2.5], "2.5 is no token id"), (torch.tensor([1.0]), "no token id")]
)
def test_prompts_that_are_none_are_told_so(prompt: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        whole_numbers(prompt)


@pytest.mark.parametrize("prompt", [[1, 2, 3], torch.tensor([1, 2, 3]), np.array([1, 2, 3])])
def test_whole_numbers_of_every_kind_are_token_ids(prompt: Any) -> None:
    assert whole_numbers(prompt) == (1, 2, 3)


def test_drafts_that_a_checkpoint_keeps_must_be_a_text(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"loopwise": {"speculate": 2}}')
    with pytest.raises(CheckpointError, match="speculate=2"):
        saved_speculation(tmp_path)


def test_a_request_that_nobody_can_see_any_more_ends() -> None:
    engine = Engine(tiny("ouro"), speculate="off")
    for emission in engine.submit([1, 2, 3], Sampling(max_tokens=40)):
        assert emission.index == 0
        break
    engine.tick()
    engine.check_idle()
    with engine:
        next(iter(engine.submit([1, 2, 3], Sampling(max_tokens=40))))
        assert len(engine.submit([4], Sampling(max_tokens=3)).wait().tokens) == 3
    engine.check_idle()
