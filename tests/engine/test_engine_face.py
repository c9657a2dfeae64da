"""The engine as others see it: threads, streams, aborts, ends, recordings, and what it refuses."""

import runpy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loopwise.engine.answer import Completion
from loopwise.engine.engine import Engine
from loopwise.engine.layout import layout_of
from loopwise.engine.reference import generate
from loopwise.engine.request import Replay
from loopwise.engine.sampling import Sampling
from loopwise.engine.speculation import Speculation
from loopwise.errors import ConfigError, InputError, LoopRangeWarning
from loopwise.memory.pages import parse_bytes
from loopwise.models.looped_lm import LoopedLM

HERE = Path(__file__).parent
tiny: Callable[..., LoopedLM] = runpy.run_path(str(HERE.parent / "models" / "naive_lm.py"))["tiny"]
letters = runpy.run_path(str(HERE / "test_reference.py"))["letters"]
DRAFTS = Speculation(window=2)
PROMPTS = [[3, 1, 7], [3, 1, 7, 7, 2], [9], [5, 5, 5, 5]]


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny(), "last_exited", speculate=DRAFTS)


def check_same(got: Completion, wanted: Completion) -> None:
    assert (got.tokens, got.loops, got.text, got.finish_reason) == (
        wanted.tokens,
        wanted.loops,
        wanted.text,
        wanted.finish_reason,
    )
    assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-9)


def alone(engine: Engine, prompt: Any, sampling: Sampling) -> Completion:
    return generate(engine.model, [prompt], sampling, policy=str(engine.policy))[0]


class TestThreads:
    def test_answers_are_asked_for_and_read_in_many_threads(self, engine: Engine) -> None:
        work = [
            (prompt, Sampling(max_tokens=6, temperature=0.8, seed=seed, exit="hazard:0.7"))
            for seed in range(6)
            for prompt in PROMPTS
        ]

        def ask(number: int) -> Completion:
            ticket = engine.submit(*work[number])
            if number % 2:
                seen = list(ticket)
                assert [one.token for one in seen] == list(ticket.completion.tokens)
            return ticket.wait()

        with engine, ThreadPoolExecutor(8) as pool:
            assert engine.driven
            got = list(pool.map(ask, range(len(work))))
        assert not engine.driven
        for answer, (prompt, sampling) in zip(got, work, strict=True):
            check_same(answer, alone(engine, prompt, sampling))
        engine.check_idle()

    def test_several_threads_may_drive_in_turn(self, engine: Engine) -> None:
        sampling = Sampling(max_tokens=12)
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda prompt: engine.submit(prompt, sampling).wait(), PROMPTS * 2))
        for answer, prompt in zip(got, PROMPTS * 2, strict=True):
            check_same(answer, alone(engine, prompt, sampling))
        engine.check_idle()

    def test_generate_while_a_thread_drives(self, engine: Engine) -> None:
        sampling = Sampling(max_tokens=5)
        with engine:
            got = engine.generate(PROMPTS, sampling, progress=True)
        for answer, prompt in zip(got, PROMPTS, strict=True):
            check_same(answer, alone(engine, prompt, sampling))

    def test_only_one_thread_of_its_own(self, engine: Engine) -> None:
        with engine, pytest.raises(RuntimeError, match="already driven"), engine:
            pass

    def test_tokens_come_before_the_answer_is_over(self, engine: Engine) -> None:
        ticket = engine.submit([1, 2], Sampling(max_tokens=40))
        first = next(iter(ticket))
        assert not ticket.over
        assert first.token == ticket.completion.tokens[0]
        assert len(ticket.completion.tokens) < 40
        assert len(list(ticket)) == 39  # the rest
        assert list(ticket) == []
        assert ticket.completion.seconds >= ticket.completion.prompt_seconds > 0

    def test_leaving_ends_what_is_open(self, engine: Engine) -> None:
        with engine:
            tickets = [engine.submit(prompt, Sampling(max_tokens=55)) for prompt in PROMPTS * 30]
            next(iter(tickets[0]))
        answers = [ticket.wait() for ticket in tickets]
        assert answers[-1].finish_reason == "abort"
        whole = alone(engine, PROMPTS[0], Sampling(max_tokens=55)).tokens
        assert all(answer.tokens == whole[: len(answer.tokens)] for answer in answers[:: len(PROMPTS)])
        engine.check_idle()
        assert len(engine.generate([[1, 2]], Sampling(max_tokens=3))[0].tokens) == 3  # and it can be used again


class TestAborts:
    @pytest.mark.parametrize("threaded", [False, True])
    def test_an_aborted_answer_keeps_what_there_is(
        self, engine: Engine, threaded: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampling = Sampling(max_tokens=50, exit="hazard:0.7")
        wanted = alone(engine, [1, 2, 3], sampling)
        aborted, taken, tick = threading.Event(), [], engine._core.tick

        def waiting_tick() -> bool:
            """So that the thread is not at the end before it hears of the abort."""
            assert len(ticket._request.answer.made) < 5 or aborted.wait(10)
            return tick()

        with engine if threaded else nullcontext():
            ticket = engine.submit([1, 2, 3], sampling)
            if threaded:
                monkeypatch.setattr(engine._core, "tick", waiting_tick)
            for emission in ticket:
                taken.append(emission)
                if len(taken) == 5:
                    engine.abort(ticket)
                    aborted.set()
            done = ticket.wait()
            monkeypatch.undo()
        with engine:
            engine.abort(ticket)  # too late, and harmless
            assert engine.submit([1, 2, 3], replace(sampling, max_tokens=4)).wait().tokens == wanted.tokens[:4]
        assert done.finish_reason == "abort"
        assert 5 <= len(done.tokens) < 50
        assert [one.token for one in taken] == list(done.tokens)
        assert (done.tokens, done.loops) == (wanted.tokens[: len(done.tokens)], wanted.loops[: len(done.tokens)])
        assert done.logprobs == pytest.approx(wanted.logprobs[: len(done.tokens)], abs=1e-9)
        assert done.kv_bytes > 0
        engine.check_idle()

    def test_before_it_has_begun(self, engine: Engine) -> None:
        ticket = engine.submit([1, 2, 3])
        engine.abort(ticket)
        done = ticket.wait()
        assert (done.tokens, done.finish_reason, done.kv_bytes) == ((), "abort", 0)
        engine.check_idle()

    def test_in_the_middle_of_a_prompt(self) -> None:
        engine = Engine(tiny(), speculate="off", chunk=4)
        ticket = engine.submit(list(range(20)), Sampling(max_tokens=3))
        for _ in range(7):
            engine.tick()
        engine.abort(ticket)
        assert ticket.wait().tokens == ()
        engine.check_idle()
        check_same(
            engine.generate([list(range(20))], Sampling(max_tokens=3))[0],
            alone(engine, list(range(20)), Sampling(max_tokens=3)),
        )


class TestErrors:
    @pytest.fixture
    def broken(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
        """An engine that fails in its 20th tick, each of which is one loop."""
        engine._core.solo = None
        turns = iter(range(19))
        tick = engine._core.tick

        def failing() -> bool:
            next(turns)
            return tick()

        monkeypatch.setattr(engine._core, "tick", failing)
        return engine

    def test_an_error_in_the_thread_reaches_everybody_who_waits(self, broken: Engine) -> None:
        ready = threading.Barrier(3)

        def wait() -> Completion:
            ticket = broken.submit([1, 2], Sampling(max_tokens=50))
            ready.wait()
            return ticket.wait()

        def read() -> list[Any]:
            ticket = broken.submit([3, 4], Sampling(max_tokens=50))
            ready.wait()
            return list(ticket)

        def together() -> list[Completion]:
            ready.wait()
            return broken.generate([[5], [6]], Sampling(max_tokens=50))

        with broken, ThreadPoolExecutor(3) as pool:
            for waiting in [pool.submit(each) for each in (wait, read, together)]:
                with pytest.raises(RuntimeError, match="make a new one") as caught:
                    waiting.result(timeout=60)
                assert isinstance(caught.value.__cause__, StopIteration)
            for ask in (lambda: broken.submit([1]), lambda: broken.generate([[1]])):
                with pytest.raises(RuntimeError, match="make a new one"):
                    ask()

    def test_an_error_without_a_thread_reaches_who_drives(self, broken: Engine) -> None:
        with pytest.raises(StopIteration):
            broken.generate([[1, 2]], Sampling(max_tokens=50))


class TestEnds:
    @pytest.fixture
    def speaking(self) -> LoopedLM:
        model = tiny("ouro")
        model.tokenizer = letters()
        return model

    @pytest.mark.parametrize("policy", ["per_loop", "last_exited"])
    def test_stop_texts_and_end_of_text(self, speaking: LoopedLM, policy: str) -> None:
        sampling = Sampling(max_tokens=12, exit="hazard:0.7", temperature=1.0)
        free = generate(speaking, ["dbwha"], sampling, policy=policy)[0]
        assert free.text is not None
        assert len(free.text) == 12
        stops = [(free.text[4:6],), (free.text[3:5], free.text[2:4], "?"), ("?",), (free.text[-1:],)]
        engine = Engine(speaking, policy, speculate=DRAFTS)
        settings = [replace(sampling, stop=stop) for stop in stops]
        for got, mine in zip(engine.generate(["dbwha"] * 4, settings), settings, strict=True):
            check_same(got, alone(engine, "dbwha", mine))
        ticket = engine.submit("dbwha", settings[1])
        assert "".join(emission.text or "" for emission in ticket) == ticket.completion.text
        speaking.tokenizer = letters(ends=(free.tokens[5],))
        ended, ignored = engine.generate(["dbwha"] * 2, [sampling, replace(sampling, ignore_eos=True)])
        check_same(ended, alone(engine, "dbwha", sampling))
        assert ended.finish_reason == "stop"
        assert len(ended.tokens) <= 6
        check_same(ignored, free)
        engine.check_idle()

    def test_an_aborted_text_keeps_what_was_held_back(self, speaking: LoopedLM) -> None:
        text = generate(speaking, ["dbwha"], Sampling(max_tokens=20))[0].text
        assert text is not None
        engine = Engine(speaking, speculate="off")
        ticket = engine.submit("dbwha", Sampling(max_tokens=20, stop=(text[:12] + "?",)))
        while len(ticket.completion.tokens) < 5:
            engine.tick()
        engine.abort(ticket)
        done = ticket.wait()
        assert done.text == text[: len(done.tokens)]

    def test_full_contexts(self) -> None:
        engine = Engine(tiny(max_positions=8), speculate=DRAFTS)
        sampling = Sampling(max_tokens=10)
        for prompt in ([1], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]):
            check_same(engine.generate([prompt], sampling)[0], alone(engine, prompt, sampling))

    def test_several_answers_stand_side_by_side(self, engine: Engine) -> None:
        sampling = Sampling(max_tokens=5, temperature=1.2, n=3, logprobs=4, logit_bias=((3, -5.0), (7, 1.0)))
        got = engine.generate(PROMPTS, sampling)
        wanted = generate(engine.model, PROMPTS, sampling, policy="last_exited")
        assert [answer.sample for answer in got] == [0, 1, 2] * len(PROMPTS)
        assert len({answer.tokens for answer in got[:3]}) > 1
        for mine, theirs in zip(got, wanted, strict=True):
            check_same(mine, theirs)
            for some, others in zip(mine.tops, theirs.tops, strict=True):
                assert [token for token, _ in some] == [token for token, _ in others]
                assert [chance for _, chance in some] == pytest.approx([chance for _, chance in others], abs=1e-9)
        single = engine.submit(PROMPTS[0], replace(sampling, n=1), sample=2).wait()
        check_same(single, wanted[2])


class TestReplays:
    @pytest.mark.parametrize("policy", ["per_loop", "last_exited", "single:per_position"])
    def test_tokens_and_loops_are_followed(self, policy: str) -> None:
        model = tiny()
        engine = Engine(model, policy, speculate="off", max_loops=4)
        sampling = Sampling(max_tokens=6, max_loops=4)
        replay = Replay(tokens=(1, 2, 3, 4, 5, 6), loops=(4, 1, 3, 2, 4, 1))
        done = engine.generate([[7, 8]], sampling, replays=[replay])[0]
        assert (done.tokens, done.loops) == (replay.tokens, replay.loops)
        if policy != "single:per_position":
            scored = model.score([7, 8, *done.tokens], done.loops, 2, policy=policy).tolist()
            assert done.logprobs == pytest.approx(scored, abs=1e-9)

    def test_an_answer_replays_itself(self, engine: Engine) -> None:
        sampling = Sampling(max_tokens=9, temperature=0.9, exit="hazard:0.7")
        done = engine.generate([[7, 8]], sampling)[0]
        recording = Replay(tokens=done.tokens, loops=done.loops)
        check_same(engine.generate([[7, 8]], Sampling(max_tokens=9), replays=[recording])[0], done)

    @pytest.mark.parametrize(
        ("replay", "message"),
        [
            (Replay(tokens=(1, 2)), "replay has 2 tokens, the answer may have 3"),
            (Replay(loops=(3,)), "replay has 1 loops"),
            (Replay(loops=(3, 0, 1)), "run from 0 to 3; allowed are 1 to 3"),
            (Replay(loops=(3, 4, 1)), "run from 1 to 4; allowed are 1 to 3"),
        ],
    )
    def test_recordings_that_do_not_fit(self, engine: Engine, replay: Replay, message: str) -> None:
        with pytest.raises(InputError, match=message):
            engine.submit([1], Sampling(max_tokens=3), replay=replay)
        engine.check_idle()


def test_rows_that_step_aside_while_they_fill_may_end_together() -> None:
    """Begun anew, a filling row and the frontier behind it run side by side and reach the last loop in one tick."""
    sampling, replay = Sampling(max_tokens=6, max_loops=3), Replay(loops=(3, 1, 3, 1, 3, 2))
    wanted = Engine(tiny(), speculate="off").generate([[7, 8]], sampling, replays=[replay])[0]
    engine = Engine(tiny(), speculate="off")
    ticket = engine.submit([7, 8], sampling, replay=replay)
    scheduler = engine._core.scheduler
    while engine.tick():
        flight = scheduler.running[0].flight if scheduler.running else []
        if [(row.left, row.loop) for row in flight] == [(1, 2), (0, 1)] and scheduler.preemptions < 2:
            scheduler.step_aside(scheduler.running[0])
    assert scheduler.preemptions == 2
    check_same(ticket.completion, wanted)
    engine.check_idle()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"memory": "lots"}, "memory='lots': allowed is a number of bytes"),
            ({"memory": "4 parsecs"}, "memory='4 parsecs'"),
            ({"memory": 0}, "memory=0"),
            ({"seats": 0}, "seats=0: allowed is 1 or more"),
            ({"rows": 0}, "rows=0"),
            ({"chunk": 0}, "chunk=0"),
            ({"max_loops": -1}, "max_loops=-1"),
            ({"max_loops": 0}, "max_loops=0"),
            ({"policy": "shared"}, "policy='shared': allowed are"),
            ({"speculate": "always"}, "speculate='always': allowed are"),
            ({"speculate": "0"}, "draft_loop=0"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            Engine(tiny(), **options)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("prompt", "sampling", "message"),
        [
            ([], {}, "the prompt is empty"),
            ([99], {}, "token id 99"),
            ([1] * 64, {}, "context holds 64"),
            ("text", {}, "no tokenizer"),
            ([1], {"stop": ("x",)}, "no tokenizer"),
            ([1], {"exit": "nonsense"}, "unknown exit rule"),
            ([1], {"max_loops": 17}, r"max_loops=17: .* Engine\(..., max_loops=17\)"),
            ([1], {"min_loops": 4, "max_loops": 3}, "min_loops=4"),
            ([1], {"logit_bias": ((23, 1.0),)}, "logit_bias of token 23"),
            ([1], {"logprobs": 24}, "logprobs=24"),
            ([1], {"max_tokens": 63, "max_loops": 16}, r"up to (\d+) bytes .* memory=\1\)"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::loopwise.errors.LoopRangeWarning")
    def test_requests(self, prompt: Any, sampling: dict[str, Any], message: str) -> None:
        model = tiny()
        engine = Engine(model, speculate="off", memory=3 * layout_of(model).group_bytes(16))
        for ask in (engine.submit, lambda *given: engine.generate([given[0]], given[1])):
            with pytest.raises((ConfigError, InputError), match=message) as caught:
                ask(prompt, Sampling(**({"max_tokens": 4} | sampling)))
            assert "\n" not in str(caught.value)
        engine.check_idle()

    def test_a_request_that_just_fits(self) -> None:
        model = tiny()
        with pytest.raises(InputError) as caught:
            Engine(model, memory=1, max_loops=3).submit([1], Sampling(max_tokens=63))
        needed = int(str(caught.value).rpartition("memory=")[2].rstrip(")"))
        done = Engine(model, speculate="off", memory=needed, max_loops=3).generate([[1]], Sampling(max_tokens=63))[0]
        assert len(done.tokens) == 63
        with pytest.raises(InputError):
            Engine(model, memory=needed - 1, max_loops=3).submit([1], Sampling(max_tokens=63))

    def test_lists_of_different_lengths(self, engine: Engine) -> None:
        with pytest.raises(InputError, match="1 sampling for 2 prompts"):
            engine.generate([[1], [2]], [Sampling()])
        with pytest.raises(InputError, match="3 replays for 2 prompts"):
            engine.generate([[1], [2]], replays=[None] * 3)

    def test_loops_beyond_training_warn(self) -> None:
        engine = Engine(tiny(trained_loops=(1, 3)), speculate="off", max_loops=5)
        with pytest.warns(LoopRangeWarning):
            engine.generate([[1]], Sampling(max_tokens=1, max_loops=5))


@pytest.mark.parametrize(
    ("text", "count"), [("4GiB", 2**32), ("512 MiB", 2**29), ("1.5gb", 1_500_000_000), ("100", 100), (7, 7)]
)
def test_bytes(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count
