"""One request alone, many ticks in one call: against ticks one by one, and the readable generator; float64."""

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwise.engine import solo
from loopwise.engine.answer import Completion
from loopwise.engine.engine import Engine
from loopwise.engine.layout import layout_of
from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.engine.solo import Solo, Stretch
from loopwise.engine.speculation import Speculation
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.kernels import why_no_cpu_kernels
from loopwise.nn.kernels.launch import load_launch_kernels

HERE = Path(__file__).parent
tiny: Callable[..., LoopedLM] = runpy.run_path(str(HERE.parent / "models" / "naive_lm.py"))["tiny"]
letters = runpy.run_path(str(HERE / "test_reference.py"))["letters"]
pytestmark = pytest.mark.skipif(not load_launch_kernels(), reason=f"no kernels: {why_no_cpu_kernels()}")
PROMPTS = [[1, 2, 3, 4, 5], [7, 6], [3] * 14]
DRAFTS = {
    "off": "off",
    "again": Speculation(window=3),
    "once": Speculation(redraft=False, window=2),
    "late": Speculation(draft_loop=2, window=1),
    "deep": Speculation(window=7),
}


def settled(model: LoopedLM) -> LoopedLM:
    """Its loops say nearly the same: drafts are mostly right."""
    with torch.no_grad():
        for name, weight in model.core.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                weight *= 0.1
    return model


@pytest.fixture
def stretches(monkeypatch: pytest.MonkeyPatch) -> list[Stretch | None]:
    """What every call did."""
    found: list[Stretch | None] = []
    run = Solo.run

    def watched(*arguments: Any) -> Stretch | None:
        found.append(run(*arguments))
        return found[-1]

    monkeypatch.setattr(Solo, "run", watched)
    return found


def facts(engine: Engine) -> dict[str, Any]:
    """All that is counted."""
    core = engine._core
    told: dict[str, Any] = {"counts": core.counts}
    if core.speculator is not None:
        told |= {
            name: getattr(core.speculator, name) for name in ("started", "confirmed", "tokens", "settled", "settles")
        }
    return told


def serve(
    model: LoopedLM, sampling: Sampling, *, alone: bool, prompts: Any = PROMPTS, **options: Any
) -> tuple[list[Completion], dict[str, Any]]:
    """The answers to one prompt after the other, and what was counted."""
    engine = Engine(model, **({"memory": "1MiB", "seats": 1} | options))
    if not alone:
        engine._core.solo = None
    done = engine.generate(prompts, sampling)
    engine.check_idle()
    return done, facts(engine)


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize(
    ("shape", "temperature", "policy"),
    [("ouro", 0.0, "last_exited"), ("universal", 0.8, "per_loop"), ("llama", 0.3, "last_exited")],
)
def test_everything_is_as_tick_by_tick(
    shape: str, temperature: float, drafts: str, policy: str, stretches: list[Stretch | None]
) -> None:
    sampling = Sampling(max_tokens=25, temperature=temperature, seed=5, ignore_eos=True)
    for model in (tiny(shape), settled(tiny(shape))):
        options: dict[str, Any] = {"policy": policy, "speculate": DRAFTS[drafts]}
        assert serve(model, sampling, alone=True, **options) == serve(model, sampling, alone=False, **options)
    assert sum(len(stretch.said) for stretch in stretches if stretch is not None) == 2 * 3 * 24


EXITS = ("hazard:0.5", "hazard:0.8", "hazard:0", "hazard:1.0", "fixed:2", "fixed:1")


def gated(model: LoopedLM) -> LoopedLM:
    """Its gate has an opinion of its own about each state."""
    assert model.gate is not None
    with torch.no_grad():
        model.gate.weight *= 20
    return model


def exits_equal(shape: str, rule: str, temperature: float, drafts: str, tokens: int) -> None:
    sampling = Sampling(max_tokens=tokens, temperature=temperature, seed=5, ignore_eos=True, exit=rule)
    options: dict[str, Any] = {"policy": "last_exited", "speculate": DRAFTS[drafts]}
    for model in (gated(tiny(shape, gate=True)), settled(gated(tiny(shape, gate=True)))):
        (mine, told), (theirs, found) = (serve(model, sampling, alone=alone, **options) for alone in (True, False))
        assert told == found
        for one, other in zip(mine, theirs, strict=True):
            assert (one.tokens, one.loops, one.kv_bytes) == (other.tokens, other.loops, other.kv_bytes)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-12)


@pytest.mark.parametrize("drafts", ["off", "again", "deep"])
@pytest.mark.parametrize(("rule", "temperature"), [("hazard:0.5", 0.8), ("hazard:0.8", 0.0), ("fixed:2", 0.8)])
def test_exits_are_as_tick_by_tick(rule: str, temperature: float, drafts: str, stretches: list[Stretch | None]) -> None:
    exits_equal("ouro", rule, temperature, drafts, 25)
    assert sum(len(stretch.said) for stretch in stretches if stretch is not None) == 2 * 3 * 24


@pytest.mark.slow
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("rule", EXITS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shape", ["ouro", "universal"])
def test_all_exits_are_as_tick_by_tick(
    shape: str, rule: str, temperature: float, drafts: str, stretches: list[Stretch | None]
) -> None:
    exits_equal(shape, rule, temperature, drafts, 48)  # to the end of what the model can read
    assert sum(len(stretch.said) for stretch in stretches if stretch is not None) == 2 * 3 * 47


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("most", [1, 8])
@pytest.mark.parametrize(
    ("rule", "min_loops"), [("hazard:0.4", 1), ("hazard:0.7", 1), ("hazard:0.2", 2), ("fixed:2", 1)]
)
def test_exits_are_those_of_the_readable_generator(
    temperature: float, most: int, rule: str, min_loops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solo, "MOST", most)
    model = settled(gated(tiny("ouro")))
    sampling = Sampling(max_tokens=40, temperature=temperature, seed=1, exit=rule, min_loops=min_loops)
    wanted = generate(model, PROMPTS, sampling)
    done, _ = serve(model, sampling, alone=True, policy="last_exited", speculate=Speculation(window=3))
    for mine, theirs in zip(done, wanted, strict=True):
        assert (mine.tokens, mine.loops, mine.finish_reason) == (theirs.tokens, theirs.loops, theirs.finish_reason)
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-9)
    if rule != "fixed:2":
        assert len({loop for one in done for loop in one.loops}) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("most", [1, 3, 8])
def test_answers_are_those_of_the_readable_generator(
    temperature: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solo, "MOST", most)
    model = settled(tiny("ouro"))
    sampling = Sampling(max_tokens=20, temperature=temperature, seed=1, max_loops=3)
    wanted = generate(model, PROMPTS, sampling)
    done, _ = serve(model, sampling, alone=True, policy="last_exited", speculate=Speculation(window=3))
    for mine, theirs in zip(done, wanted, strict=True):
        assert (mine.tokens, mine.loops, mine.finish_reason) == (theirs.tokens, theirs.loops, theirs.finish_reason)
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-9)


def test_a_call_ends_with_a_certain_token_once_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch, stretches: list[Stretch | None]
) -> None:
    monkeypatch.setattr(solo, "SECONDS", 0.0)
    model = settled(tiny("ouro"))
    sampling = Sampling(max_tokens=9, ignore_eos=True)
    options: dict[str, Any] = {"speculate": Speculation(window=3)}
    assert serve(model, sampling, alone=True, **options) == serve(model, sampling, alone=False, **options)
    assert [len(stretch.said) for stretch in stretches if stretch is not None] == [1] * 24


@pytest.mark.parametrize("loops", [2, 4])
def test_where_every_draft_is_right_each_tick_makes_a_token(loops: int, stretches: list[Stretch | None]) -> None:
    model = tiny("ouro", loops=loops)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
        for name, weight in model.core.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                weight.zero_()
    sampling = Sampling(max_tokens=30, ignore_eos=True)
    for alone in (True, False):
        options: dict[str, Any] = {"speculate": Speculation(window=loops - 1), "prompts": [[1, 2, 3]]}
        _, told = serve(model, sampling, alone=alone, **options)
        # Loops for the prompt, and for the first row; from there on rows end one after the other.
        assert told["counts"].ticks == loops + loops + 28
        assert told["settled"] == {1: 28}  # nothing follows the last
    assert stretches


def test_a_stop_text_in_the_middle_of_a_call_ends_the_answer() -> None:
    model = tiny("ouro")
    model.tokenizer = letters()
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=2)
    text = generate(model, ["abc"], sampling)[0].text
    assert text is not None
    for stop in (text[1:2], text[4:6], text[9:12]):
        ending = replace(sampling, stop=(stop,))
        wanted = generate(model, ["abc"], ending)[0]
        engine = Engine(model, memory="1MiB", speculate=Speculation(window=3))
        for _ in range(2):
            done = engine.generate(["abc"], ending)[0]
            assert (done.tokens, done.text, done.finish_reason) == (wanted.tokens, wanted.text, "stop")
        engine.check_idle()


def test_what_a_stopped_answer_leaves_can_be_a_prompt() -> None:
    model = tiny("ouro")
    model.tokenizer = letters()
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=2)
    text = generate(model, ["abc"], sampling)[0].text
    assert text is not None
    engine = Engine(model, memory="1MiB", speculate=Speculation(window=3))
    engine.generate(["abc"], replace(sampling, stop=(text[34:38],)))
    again = [f"abc{text[:38]}{more}" for more in ("", "b")]
    done = engine.generate(again, sampling)
    assert engine._core.prefix is not None
    assert engine._core.prefix.hits > 0
    for mine, theirs in zip(done, generate(model, again, sampling), strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-9)
    engine.check_idle()


def test_an_end_of_text_ends_the_answer_and_starts_no_draft() -> None:
    model = tiny("ouro")
    model.tokenizer = letters((4, 9))
    ended = 0
    for seed in range(6):
        sampling = Sampling(max_tokens=60, temperature=1.0, seed=seed)
        options: dict[str, Any] = {"speculate": Speculation(window=3), "prompts": [[1, 2, 3]]}
        mine, theirs = (serve(model, sampling, alone=alone, **options) for alone in (True, False))
        assert mine == theirs
        ended += mine[0][0].finish_reason == "stop"
    assert ended > 0


@pytest.mark.parametrize("rule", [None, "hazard:0.5", "fixed:2"])
def test_requests_come_and_go_meanwhile(rule: str | None, stretches: list[Stretch | None]) -> None:
    model = settled(gated(tiny("ouro")))
    sampling = Sampling(max_tokens=30, temperature=0.8, seed=3, ignore_eos=True, exit=rule)
    wanted = generate(model, PROMPTS, sampling)
    engine = Engine(model, "last_exited", memory="1MiB", speculate=Speculation(window=3))
    first = engine.submit(PROMPTS[0], sampling)
    while not stretches:
        engine.tick()
    others = [engine.submit(prompt, sampling) for prompt in PROMPTS[1:]]
    for _ in range(6):
        engine.tick()
    calls = len(stretches)
    assert calls == 1  # none while there was company
    engine.abort(others[0])
    done = [first.wait(), others[1].wait()]
    assert len(stretches) > calls
    for mine, theirs in zip(done, (wanted[0], wanted[2]), strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-9)
    engine.check_idle()


def test_without_room_for_what_it_may_write_ticks_run_one_by_one(stretches: list[Stretch | None]) -> None:
    model = tiny("ouro")
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    memory = 2 * layout_of(model).group_bytes(model.config.loops)
    options: dict[str, Any] = {"memory": memory, "prompts": [[3] * 9], "prefix_cache": False}
    options["speculate"] = Speculation(window=7)
    assert serve(model, sampling, alone=True, **options) == serve(model, sampling, alone=False, **options)
    engine = Engine(model, memory=memory, prefix_cache=False, max_loops=model.config.loops)
    taken = [engine._core.runner.memory.core.take() for _ in range(model.config.loops)]
    ticket = engine.submit([3] * 9, sampling)
    stretches.clear()
    while len(ticket._request.answer.made) < 7:
        engine.tick()
    assert None in stretches
    for page in taken:
        engine._core.runner.memory.core.release(page)
    assert ticket.wait().tokens == generate(model, [[3] * 9], sampling)[0].tokens


@pytest.mark.parametrize(
    "change",
    [
        {"exit": "delta:0.1"},
        {"repetition_penalty": 1.2},
        {"top_k": 3},
        {"logprobs": 2},
    ],
)
def test_whatever_needs_the_host_between_ticks_is_left_to_it(
    change: dict[str, Any], stretches: list[Stretch | None]
) -> None:
    serve(tiny("ouro"), Sampling(max_tokens=5, **change), alone=True)
    assert not stretches


def test_so_is_what_wants_to_be_told_more_and_what_has_a_prelude(stretches: list[Stretch | None]) -> None:
    for shape in ("huginn", "coda"):
        serve(tiny(shape), Sampling(max_tokens=5), alone=True)
    engine = Engine(tiny("ouro"), memory="1MiB")
    engine.generate(PROMPTS, Sampling(max_tokens=5), signals=True)
    engine.submit(PROMPTS[0], Sampling(max_tokens=5), provisional=True).wait()
    assert not stretches
