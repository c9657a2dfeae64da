"""Answers for whoever has a model and a prompt, against the readable generator in float64."""

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwise.engine import write
from loopwise.engine.answer import Answer, Completion, Emission
from loopwise.engine.engine import Engine
from loopwise.engine.reference import Generation
from loopwise.engine.reference import generate as readable
from loopwise.engine.sampling import Sampling
from loopwise.engine.write import Writer, generate
from loopwise.errors import ConfigError, InputError
from loopwise.loops.planes import parse_policy
from loopwise.models.looped_lm import LoopedLM

HERE = Path(__file__).parent
tiny: Callable[..., LoopedLM] = runpy.run_path(str(HERE.parent / "models" / "naive_lm.py"))["tiny"]
letters = runpy.run_path(str(HERE / "test_reference.py"))["letters"]
PROMPTS = [[3, 1, 7], [3, 1, 7, 7, 2], [9]]
LONG = [3, 1, 7, 2] * 5
EXIT = Sampling(max_tokens=6, exit="hazard:0.7")


@pytest.fixture(params=[True, False], ids=["kernels", "no kernels"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether single answers are an engine's."""
    there: bool = request.param
    monkeypatch.setattr(write, "engine_pays", lambda model, *, answers: there or answers > 1)
    return there


def speaking() -> LoopedLM:
    """A model whose tokens are letters."""
    model = tiny()
    model.tokenizer = letters()
    return model


def check_same(got: Completion, wanted: Completion) -> None:
    for name in ("prompt", "tokens", "loops", "text", "finish_reason", "sample"):
        assert getattr(got, name) == getattr(wanted, name)
    assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-9)
    assert got.seconds >= got.prompt_seconds > 0
    assert got.kv_bytes > 0


@pytest.mark.parametrize("shape", ["ouro", "huginn"])
@pytest.mark.parametrize(
    ("sampling", "policy"),
    [
        (Sampling(max_tokens=6), None),
        (Sampling(max_tokens=6, temperature=0.9, seed=3, n=2, exit="delta:0.5"), None),
        (Sampling(max_tokens=6, exit="kl:0.01", min_loops=2), "per_loop"),
        (Sampling(max_tokens=6, exit="budget:2.0:delta:0.5", max_loops=4), "last_exited"),
    ],
)
def test_answers_are_those_of_the_readable_generator(shape: str, sampling: Sampling, policy: str | None) -> None:
    model = tiny(shape)
    wanted = readable(model, PROMPTS, sampling, policy=policy)
    for got, one in zip(generate(model, PROMPTS, sampling, policy=policy), wanted, strict=True):
        check_same(got, one)


@pytest.mark.usefixtures("kernels")
def test_one_answer_token_by_token() -> None:
    model = speaking()
    sampling = replace(EXIT, temperature=1.0, stop=("zz",))
    for sample in (0, 1):
        writing = Writer(model).stream("abc", sampling, sample=sample)
        told = list(writing)
        wanted = readable(model, ["abc"], replace(sampling, n=sample + 1))[sample]
        check_same(writing.completion, wanted)
        assert "".join(str(one.text) for one in told) == wanted.text
        assert writing.held == []
        assert (str(writing.rule), writing.policy, writing.max_loops) == ("hazard:0.7", "last_exited", 3)
    check_same(generate(model, ["abc"], sampling)[0], readable(model, ["abc"], sampling)[0])


def test_watching_goes_answer_by_answer() -> None:
    seen: list[Emission] = []
    done = generate(tiny(), PROMPTS, replace(EXIT, n=2), watch=seen.append)
    assert [one.token for one in seen] == [token for answer in done for token in answer.tokens]


def test_a_writer_reads_what_prompts_share_once() -> None:
    model = tiny()
    writer = Writer(model)
    first = writer.stream(LONG, EXIT)
    list(first)
    longer = [*LONG, *first.completion.tokens, 4]
    second = writer.stream(longer, EXIT)
    list(second)
    check_same(second.completion, readable(model, [longer], EXIT)[0])
    assert writer._engine is not None
    prefix = writer._engine._core.prefix
    assert prefix is not None
    assert prefix.hits >= 16
    writer._engine.check_idle()


def test_a_writer_changes_its_engine_with_what_is_asked() -> None:
    model = tiny()
    writer = Writer(model)
    engines: list[Engine | None] = []
    asked: list[dict[str, Any]] = [
        {},
        {"max_tokens": 8},
        {"exit": None},
        {"max_loops": 5},
        {"max_tokens": 60, "max_loops": 1},
    ]
    for changes in asked:
        sampling = replace(EXIT, **changes)
        writing = writer.stream([3, 1, 7], sampling)
        list(writing)
        check_same(writing.completion, readable(model, [[3, 1, 7]], sampling)[0])
        engines.append(writer._engine)
    assert engines[0] is engines[1]
    assert len(set(map(id, engines))) == 4


@pytest.mark.usefixtures("kernels")
def test_an_interrupt_leaves_what_there_is_and_harms_no_later_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = speaking()
    writer = Writer(model)
    wanted = readable(model, ["abc"], replace(EXIT, stop=("qqqqqqqqqq",)))[0]
    take = Answer.take

    def interrupted(answer: Answer, emission: Emission) -> list[Emission]:
        if len(answer.made) == 4:
            raise KeyboardInterrupt
        return take(answer, emission)

    with monkeypatch.context() as patch:
        patch.setattr(Answer, "take", interrupted)
        writing = writer.stream("abc", EXIT)
        told: list[Emission] = []
        with pytest.raises(KeyboardInterrupt):
            told.extend(writing)
        told += writing.held[len(told) :] if isinstance(writing, Generation) else writing.held
        done = writing.completion
    assert (done.tokens, done.finish_reason) == (wanted.tokens[:4], "abort")
    assert done.kv_bytes > 0
    again = writer.stream("abc", EXIT)
    list(again)
    check_same(again.completion, readable(model, ["abc"], EXIT)[0])


@pytest.mark.usefixtures("kernels")
def test_who_breaks_off_finds_every_token_that_was_not_given() -> None:
    model = speaking()
    writing = Writer(model).stream("abc", replace(EXIT, stop=("never",)))
    told = [next(iter(writing)), *writing.held]
    assert tuple(one.token for one in told) == writing.completion.tokens
    assert "".join(str(one.text) for one in told) == writing.completion.text


def test_single_answers_are_the_engine_s_where_it_has_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(write, "load_row_kernels", lambda: {torch.float64: None})
    assert write.engine_pays(model, answers=1)
    assert not write.engine_pays(model.bfloat16(), answers=1)
    assert write.engine_pays(model.bfloat16(), answers=2)
    assert isinstance(Writer(model.double()).stream([1], EXIT), write._EngineWriting)
    assert isinstance(Writer(model.bfloat16()).stream([1], EXIT), Generation)


def test_a_long_context_is_given_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "MEMORY", 1)
    sampling = Sampling(max_tokens=16, exit="fixed:1")
    for got, one in zip(generate(tiny(), PROMPTS, sampling), readable(tiny(), PROMPTS, sampling), strict=True):
        check_same(got, one)


def test_what_is_refused() -> None:
    model = tiny()
    assert generate(model, []) == []
    for prompts, sampling, policy, message in (
        ("abc", None, None, r"prompts is one text; give a list of them: generate\(model, \[text\]\)"),
        ([[]], None, None, "the prompt is empty"),
        ([[99]], None, None, "token id 99 is not in the model's vocabulary"),
        ([[1]], None, "single", "policy='single': allowed are per_loop, last_exited"),
        ([[1]], Sampling(min_loops=9), None, "min_loops=9: allowed is 1 to max_loops=3"),
    ):
        with pytest.raises((InputError, ConfigError), match=message):
            generate(model, prompts, sampling, policy=policy)


def test_only_long_answers_of_few_are_drafted() -> None:
    model = tiny()
    drafts = [
        write._engine(
            *(model, parse_policy("per_loop"), 3), memory=2**20, seats=seats, shares=False, tokens=tokens
        )._core.speculator
        for seats, tokens in ((1, 31), (1, 32), (8, 32), (9, 99))
    ]
    assert [one is not None for one in drafts] == [False, True, True, False]
