"""Prompts that obey the exit rule: the definitions, the promise, what is shared, and what is refused; in float64."""

import runpy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loopwise.engine import write
from loopwise.engine.answer import Completion
from loopwise.engine.checks import check_sampling
from loopwise.engine.engine import Engine
from loopwise.engine.layout import layout_of
from loopwise.engine.reference import generate
from loopwise.engine.request import Replay
from loopwise.engine.sampling import Sampling, choose
from loopwise.engine.speculation import Speculation
from loopwise.engine.write import Writer
from loopwise.errors import ConfigError, InputError
from loopwise.models.looped_lm import LoopedLM

TESTS = Path(__file__).parents[1]
naive = runpy.run_path(str(TESTS / "models" / "naive_lm.py"))
NaiveLM, naive_rule, tiny = naive["NaiveLM"], naive["naive_rule"], naive["tiny"]
LOOPS = 4
POLICIES = ["per_loop", "last_exited"]
RULES = {
    "ouro": ["fixed:2", "hazard:0.7", "kl:0.3", "patience:2:delta:0.9"],
    "huginn": ["delta:0.8"],
    "retrofitted-llama": [None, "delta:0.7"],
    "coda": ["hazard:0.9"],
    "zeros": ["hazard:0.8"],
}
WHOLE = [(name, rule) for name, rules in RULES.items() for rule in rules]
FEW = [
    ("ouro", "hazard:0.7", "last_exited"),
    ("ouro", "kl:0.3", "per_loop"),
    ("huginn", "delta:0.8", "last_exited"),
    ("coda", "hazard:0.9", "per_loop"),
]
WAYS: dict[str, dict[str, Any]] = {
    "together": {"speculate": "off"},
    "chunks": {"speculate": "off", "chunk": 3, "prefix_cache": False},
    "few rows": {"speculate": "off", "rows": 2, "chunk": 2, "seats": 3},
    "drafts": {"speculate": Speculation(draft_loop=1, redraft=True, window=3)},
    "everything": {"speculate": Speculation(window=3), "memory": 6, "rows": 5, "chunk": 4, "seats": 5, "aside": True},
}
SHORT = ["few rows", "everything"]


@cache
def model_of(name: str) -> LoopedLM:
    model: LoopedLM = tiny(name)
    return model


def read_from_the_beginning(model: LoopedLM, prompt: Sequence[int], sampling: Sampling, policy: str) -> Completion:
    """By the formulas: every position, of prompt or answer, runs alone until the rule stops it."""
    tokens, loops, logprobs = list(prompt), [], []
    for _ in range(sampling.max_tokens):
        rows = NaiveLM(model).run(
            tokens,
            loops=LOOPS,
            stop=naive_rule(sampling.exit) if sampling.exit else None,
            fill=policy == "per_loop",
            min_loops=sampling.min_loops,
        )
        chances = np.exp(rows[-1].prediction - rows[-1].prediction.max())
        tokens.append(choose(torch.from_numpy(rows[-1].prediction), sampling, position=len(tokens), seen=tokens))
        loops.append(rows[-1].loops)
        logprobs.append(float(np.log(chances[tokens[-1]] / chances.sum())))
    return Completion(
        prompt=tuple(prompt),
        tokens=tuple(tokens[len(prompt) :]),
        text=None,
        loops=tuple(loops),
        logprobs=tuple(logprobs),
        prompt_loops=tuple(row.loops for row in rows[: len(prompt)]),
        finish_reason="length",
        kv_bytes=0,
    )


def check_same(got: Sequence[Completion], wanted: Sequence[Completion]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.loops == theirs.loops
        assert mine.prompt_loops == theirs.prompt_loops
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-9)


def answer(model: LoopedLM, prompt: Sequence[int], sampling: Sampling, policy: str) -> Completion:
    return generate(model, [prompt], sampling, policy=policy, prompt_depth="exit")[0]


@pytest.mark.parametrize(("name", "rule"), WHOLE)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompts_position_stops_where_the_rule_stops_it(name: str, rule: str | None, policy: str) -> None:
    sampled = policy == "per_loop"
    sampling = Sampling(
        max_tokens=3,
        exit=rule,
        max_loops=LOOPS,
        min_loops=1 + sampled,
        temperature=0.9 if sampled else 0.0,
        top_p=0.9 if sampled else None,
    )
    prompt = (3, 1, 22, 7, 0, 4)
    done = answer(model_of(name), prompt, sampling, policy)
    check_same([done], [read_from_the_beginning(model_of(name), prompt, sampling, policy)])
    assert done.prompt_loops[-1] == done.loops[0]


def requests(rule: str | None) -> list[tuple[tuple[int, ...], Sampling]]:
    """Prompts that begin alike, some longer than a page; of different efforts."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(0, 23, (37,), generator=generator).tolist()
    prompts = [[3, 1, 7], common[:20], common, [*common[:33], 5, 2], common[:17]]
    return [
        (
            tuple(prompt),
            Sampling(
                max_tokens=length,
                exit=rule,
                max_loops=loops,
                min_loops=least,
                temperature=0.9 if length % 2 else 0.0,
                seed=length,
            ),
        )
        for prompt, length, loops, least in zip(
            prompts, [5, 12, 3, 9, 7], [3, 4, 4, 4, 3], [2, 1, 1, 1, 1], strict=True
        )
    ]


def check_cell(name: str, rule: str | None, policy: str, *, ways: Sequence[str]) -> None:
    model, asked = model_of(name), requests(rule)
    wanted = [answer(model, prompt, sampling, policy) for prompt, sampling in asked]
    varied = any(len(set(done.prompt_loops)) > 1 for done in wanted)
    assert varied or rule in (None, "fixed:2")
    for way in ways:
        options = dict(WAYS[way])
        aside = options.pop("aside", False)
        if "memory" in options:
            options["memory"] *= layout_of(model).group_bytes(LOOPS)
        engine = Engine(model, policy, max_loops=LOOPS, prompt_depth="exit", **options)
        # Twice, so that prefixes are found.
        for _ in range(2):
            tickets = [engine.submit(prompt, sampling) for prompt, sampling in asked]
            if aside:
                drive_out(engine)
            check_same([ticket.wait() for ticket in tickets], wanted)
        engine.check_idle()
        if way == "few rows":
            assert engine._core.prefix is not None
            assert engine._core.prefix.hits > 32


def drive_out(engine: Engine) -> None:
    """What a lack of pages does to the youngest, done to anyone now and then, in the middle of prompts too."""
    scheduler = engine._core.scheduler
    for turn in range(12):
        for _ in range(1 + turn):
            engine.tick()
        if scheduler.running:
            scheduler.step_aside(scheduler.running[turn % len(scheduler.running)])
    assert scheduler.preemptions > 3


@pytest.mark.parametrize(("name", "rule", "policy"), FEW)
def test_answers_depend_on_nothing_else(name: str, rule: str | None, policy: str) -> None:
    check_cell(name, rule, policy, ways=SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "rule"), WHOLE)
def test_the_whole_matrix(name: str, rule: str | None, policy: str) -> None:
    check_cell(name, rule, policy, ways=list(WAYS))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "rule"), [("ouro", "hazard:0.7"), ("huginn", "delta:0.8"), ("coda", "hazard:0.9")])
def test_scores_are_those_of_the_generator(name: str, rule: str, policy: str) -> None:
    """Alone, and in a batch whose prompts and answers have different lengths."""
    model, asked = model_of(name), requests(rule)[:3]
    done = [answer(model, prompt, sampling, policy) for prompt, sampling in asked]
    for one in done:
        scored = model.score(
            one.prompt + one.tokens, one.loops, len(one.prompt), policy=policy, prompt_loops=one.prompt_loops
        )
        assert scored.tolist() == pytest.approx(one.logprobs, abs=1e-9)
    pad = torch.nn.utils.rnn.pad_sequence

    def table(rows: list[tuple[int, ...]], filler: int, side: str = "right") -> torch.Tensor:
        return pad([torch.tensor(row) for row in rows], True, filler, side)

    tokens = [one.prompt + one.tokens for one in done]
    for side in ("left", "right"):
        scored = model.score(
            table(tokens, 0, side),
            table([one.loops for one in done], 99),
            torch.tensor([len(one.prompt) for one in done]),
            policy=policy,
            prompt_loops=table([one.prompt_loops for one in done], 99),
            padding_mask=table([(1,) * len(row) for row in tokens], 0, side).bool(),
        )
        for row, one in zip(scored.tolist(), done, strict=True):
            assert row[: len(one.logprobs)] == pytest.approx(one.logprobs, abs=1e-9)


def test_scores_refuse_loops_that_do_not_fit() -> None:
    model = model_of("ouro")
    for prompt_loops, said in (((1, 2), "2 numbers for prompts of up to 3"), ((2, 1, 3), "ends with .3.*with .2")):
        with pytest.raises(InputError, match=said):
            model.score((1, 2, 3, 4), (2,), 3, prompt_loops=prompt_loops)
    with pytest.raises(InputError, match="loops from 0 to 2"):
        model.score((1, 2, 3, 4), (2,), 3, prompt_loops=(0, 1, 2))
    with pytest.raises(InputError, match="prompt_loops="):
        model.score((1, 2, 3, 4, 5), (2, 3), 3)


def follow(engine: Engine, prompt: Sequence[int], count: int, replay: Replay | None, **settings: Any) -> Completion:
    return engine.generate([prompt], Sampling(max_tokens=count, **settings), replays=[replay])[0]


class TestPages:
    def test_planes_that_nobody_on_a_page_reached_hold_no_memory(self) -> None:
        model = model_of("ouro")
        page = layout_of(model).page_bytes(1)
        loops = [1] * 16 + [1, 3, 1, 1] + [1] * 12 + [2]
        replay = Replay(loops=(2, 4, 1), prompt_loops=tuple(loops))
        for chunk in (None, 1, 5, 18):
            engine = Engine(
                model,
                "last_exited",
                speculate="off",
                max_loops=LOOPS,
                prompt_depth="exit",
                chunk=chunk,
                prefix_cache=False,
            )
            done = follow(engine, [1] * 33, 3, replay, max_loops=LOOPS)
            # Planes by page: loop 1 alone; up to loop 3; the answer's up to loop 4.
            assert done.kv_bytes == (1 + 3 + 4) * page
            assert done.prompt_loops == tuple(loops)
            engine.check_idle()

    def test_an_answer_that_left_early_is_found_as_a_prompt(self) -> None:
        model = model_of("ouro")
        for policy in POLICIES:
            engine = Engine(model, policy, speculate="off", max_loops=LOOPS, prompt_depth="exit")
            settings = {"exit": "hazard:0.7", "max_loops": LOOPS}
            first = follow(engine, [3, 1, 7], 36, None, **settings)
            assert min(first.loops) < LOOPS
            prefix = engine._core.prefix
            assert prefix is not None
            longer = first.prompt + first.tokens
            second = follow(engine, longer, 4, None, **settings)
            assert prefix.hits == 32
            check_same([second], [answer(model, longer, Sampling(max_tokens=4, **settings), policy)])
            assert second.prompt_loops[:-1] == first.prompt_loops + first.loops[1:]
            # Another rule, another number of loops, another least number: other pages.
            for changes in ({"exit": "hazard:0.8"}, {"max_loops": 3}, {"min_loops": 2}):
                follow(engine, longer, 4, None, **settings | changes)
            follow(engine, longer, 1, Replay(loops=(1,), prompt_loops=(1,) * 39), **settings)
            assert prefix.hits == 32

    def test_an_answer_with_forced_tokens_obeys_the_rule(self) -> None:
        model = model_of("ouro")
        engine = Engine(model, "last_exited", speculate="off", max_loops=LOOPS, prompt_depth="exit")
        settings = Sampling(max_tokens=6, exit="hazard:0.7", max_loops=LOOPS)
        forced = follow(engine, [3, 1, 7], 6, Replay(tokens=(2, 2, 9, 4, 1, 0)), exit="hazard:0.7", max_loops=LOOPS)
        wanted = answer(model, [3, 1, 7, 2, 2, 9], replace(settings, max_tokens=1), "last_exited")
        assert forced.loops[3] == wanted.loops[0]
        assert forced.prompt_loops + forced.loops[1:4] == wanted.prompt_loops


def test_an_answer_replays_itself_and_tells_its_signals() -> None:
    model = model_of("ouro")
    engine = Engine(model, "last_exited", max_loops=LOOPS, prompt_depth="exit")
    done = engine.generate([[7, 8, 9]], Sampling(max_tokens=5, exit="hazard:0.5", max_loops=LOOPS), signals=True)[0]
    assert [len(hazards) for hazards in done.signals] == list(done.loops)
    recording = Replay(loops=done.loops, prompt_loops=done.prompt_loops)
    again = engine.generate([[7, 8, 9]], Sampling(max_tokens=5, max_loops=LOOPS), replays=[recording])[0]
    check_same([again], [done])


def test_who_writes_for_the_commands_does_the_same() -> None:
    """One writer, its engine made anew where the next answer wants another depth."""
    model, prompt = model_of("ouro"), (7, 8, 9, 1, 2)
    sampling = Sampling(max_tokens=4, exit="hazard:0.5", max_loops=LOOPS)
    writer = Writer(model)
    for depth in ("exit", "full", "exit"):
        wanted = generate(model, [prompt], sampling, prompt_depth=depth)
        writing = writer.stream(prompt, sampling, prompt_depth=depth)
        assert len(list(writing)) == 4
        check_same([writing.completion], wanted)
        check_same(write.generate(model, [prompt, prompt], sampling, prompt_depth=depth), wanted * 2)
    assert writing.completion.prompt_loops != (LOOPS,) * len(prompt)


def test_what_is_refused() -> None:
    ouro, coda = model_of("ouro"), model_of("coda")
    with pytest.raises(ConfigError, match="prompt_depth='deep': allowed are full, exit"):
        Engine(ouro, prompt_depth="deep")
    with pytest.raises(ConfigError, match="prompt_depth='deep'"):
        check_sampling(ouro, Sampling(), prompt_depth="deep")
    for policy in ("decode_shared", "collapse", "single:per_position", "modulo:2:per_position"):
        with pytest.raises(ConfigError, match=f"prompt_depth='exit': under policy={policy} ") as caught:
            Engine(ouro, policy, prompt_depth="exit")
        assert "\n" not in str(caught.value)
    for model, rule, said in (
        (ouro, "budget:2.5:hazard:0.9", "spends a budget"),
        (coda, "stable:2", "coda looks at earlier positions"),
        (coda, "patience:2:kl:0.1", "coda looks at earlier positions"),
    ):
        engine, sampling = Engine(model, prompt_depth="exit"), Sampling(max_tokens=2, exit=rule)
        for ask in (
            lambda: engine.submit([1, 2], sampling),  # noqa: B023
            lambda: generate(model, [[1, 2]], sampling, prompt_depth="exit"),  # noqa: B023
        ):
            with pytest.raises(ConfigError, match=said) as caught:
                ask()
            assert "\n" not in str(caught.value)
        engine.check_idle()
        assert len(Engine(model).generate([[1, 2]], sampling)[0].tokens) == 2


@pytest.mark.parametrize(
    ("depth", "replay", "said"),
    [
        ("exit", Replay(loops=(1, 2)), "prompt_loops goes with replay.loops"),
        ("full", Replay(loops=(3, 2), prompt_loops=(1, 2, 3)), "prompt_loops goes with replay.loops"),
        ("exit", Replay(prompt_loops=(1, 2, 3)), "prompt_loops goes with replay.loops"),
        ("exit", Replay(loops=(3, 2), prompt_loops=(2, 3)), "2 numbers for a prompt of 3 tokens"),
        ("exit", Replay(loops=(3, 2), prompt_loops=(1, 2, 1)), "ends with .1., replay.loops begins with .3."),
        ("exit", Replay(loops=(3, 2), prompt_loops=(1, 9, 3)), "run from 1 to 9; allowed are 1 to 3"),
    ],
)
def test_recordings_that_do_not_fit(depth: str, replay: Replay, said: str) -> None:
    engine = Engine(model_of("ouro"), prompt_depth=depth)
    with pytest.raises(InputError, match=said) as caught:
        engine.submit([1, 2, 3], Sampling(max_tokens=2), replay=replay)
    assert "\n" not in str(caught.value)
    engine.check_idle()
