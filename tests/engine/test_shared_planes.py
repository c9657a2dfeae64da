"""The shared plane policies against their definitions, in float64; and what cannot go together is refused."""

import runpy
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwise.engine.answer import Completion
from loopwise.engine.engine import Engine
from loopwise.engine.layout import layout_of
from loopwise.engine.sampling import Sampling
from loopwise.engine.speculation import Speculation
from loopwise.errors import ConfigError, InputError
from loopwise.loops.planes import parse_policy
from loopwise.models.looped_lm import LoopedLM

HERE = Path(__file__).parent
tiny: Callable[..., LoopedLM] = runpy.run_path(str(HERE.parent / "models" / "naive_lm.py"))["tiny"]
naive = runpy.run_path(str(HERE / "naive_planes.py"))
NaivePlanes, Answer = naive["NaivePlanes"], naive["Answer"]

LOOPS = 5
PLAIN = ["per_loop", "last_exited", "collapse", "decode_shared"]
LOCKSTEP = ["single", "average", "first_then_shared", "modulo:2", "modulo:3"]
POLICIES = [*PLAIN, *LOCKSTEP, *(f"{policy}:per_position" for policy in LOCKSTEP)]
RULES = {
    "ouro": [None, "hazard:0.7", "budget:2.5:hazard:0.97"],
    "huginn": ["delta:0.8", "kl:0.3"],
    "retrofitted-llama": ["fixed:2", "delta:0.8"],
}
CASES = [(name, rule) for name, rules in RULES.items() for rule in rules]
WHOLE_PROMPTS: dict[str, dict[str, Any]] = {
    "together": {},
    "few rows": {"rows": 2, "seats": 3},
    "crowded": {"memory": "few", "seats": 4, "aside": True},
}
ANY_CHUNKS = WHOLE_PROMPTS | {
    "chunks": {"chunk": 3},
    "prefixes": {"prefix_cache": True},
    "everything": {"memory": "few", "rows": 3, "chunk": 5, "seats": 4, "prefix_cache": True, "aside": True},
}


def requests(rule: str | None, *, sampled: bool) -> list[tuple[tuple[int, ...], Sampling]]:
    """Four prompts, some of which begin alike, of different efforts."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(0, 23, (19,), generator=generator).tolist()
    prompts = [common, [3, 1, 7], [*common[:17], 5, 2], common[:6]]
    return [
        (
            tuple(prompt),
            Sampling(
                max_tokens=length,
                exit=rule,
                max_loops=loops,
                min_loops=1 + length % 2,
                temperature=0.9 if sampled else 0.0,
                top_p=0.9 if sampled and length % 2 else None,
                repetition_penalty=1.3 if length == 12 else 1.0,
                seed=length,
            ),
        )
        for prompt, length, loops in zip(prompts, [5, 12, 3, 7], [5, 3, 4, 5], strict=True)
    ]


@lru_cache
def model_of(name: str) -> LoopedLM:
    return tiny(name, seed=2, loops=LOOPS)


@cache
def expected(name: str, policy: str, prompt: tuple[int, ...], sampling: Sampling) -> Any:
    return NaivePlanes(model_of(name), policy).answer(prompt, sampling)


def check_same(got: Sequence[Completion], wanted: Sequence[Any]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.loops == theirs.loops
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-9)


def check_cell(name: str, rule: str | None, policy: str, *, sampled: bool, ways: Sequence[str]) -> None:
    """The engine gives what the definitions give, each way."""
    model, asked = model_of(name), requests(rule, sampled=sampled)
    wanted = [expected(name, policy, prompt, sampling) for prompt, sampling in asked]
    for way in ways:
        options = {"chunk": None, "prefix_cache": False} | ANY_CHUNKS[way]
        aside = options.pop("aside", False)
        if "memory" in options:
            options["memory"] = 3 * layout_of(model).group_bytes(
                len(parse_policy(policy).stored(LOOPS, generated=False))
            )
        engine = Engine(model, policy, speculate="off", max_loops=LOOPS, **options)
        # Twice, so that prefixes are found.
        for _ in range(1 + options["prefix_cache"]):
            tickets = [engine.submit(prompt, sampling) for prompt, sampling in asked]
            if aside:
                drive_out(engine)
            check_same([ticket.wait() for ticket in tickets], wanted)
        engine.check_idle()
        if way == "prefixes":
            assert engine._core.prefix is not None
            assert engine._core.prefix.hits > 0


def drive_out(engine: Engine) -> None:
    """What a lack of pages does to the youngest, done to anyone now and then."""
    scheduler = engine._core.scheduler
    for turn in range(12):
        for _ in range(1 + 2 * turn):
            engine.tick()
        if scheduler.running:
            scheduler.step_aside(scheduler.running[turn % len(scheduler.running)])
    assert scheduler.preemptions > 3


SHORT = {"lockstep": ["few rows", "crowded"], "chunks": ["chunks", "everything"], "per_position": ["everything"]}
"""The ways that the short matrix tries, by how prompts are read."""


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_those_of_the_definition(policy: str) -> None:
    place = POLICIES.index(policy) + 1
    name, rule = CASES[place % len(CASES)]
    check_cell(name, rule, policy, sampled=place % 2 == 0, ways=SHORT[parse_policy(policy).prefill])


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "rule"), [*CASES, ("coda", "stable:2"), ("zeros", "hazard:0.8")])
def test_the_whole_matrix_of_policies(name: str, rule: str | None, policy: str) -> None:
    sampled = (POLICIES.index(policy) + len(rule or "")) % 2 == 0
    check_cell(name, rule, policy, sampled=sampled, ways=list(WHOLE_PROMPTS if policy in LOCKSTEP else ANY_CHUNKS))


def test_the_policies_differ() -> None:
    """Otherwise the tests above would tell little; B and the lock-step form of one plane are the same numbers."""
    prompt, sampling = requests(None, sampled=False)[0]
    answers = {policy: expected("ouro", policy, prompt, sampling).logprobs for policy in POLICIES}
    assert answers["single"] == pytest.approx(answers["collapse"], abs=1e-12)
    assert answers["per_loop"] == answers["last_exited"]
    del answers["collapse"], answers["last_exited"]
    assert len({round(logprobs[-1], 6) for logprobs in answers.values()}) == len(answers)


@pytest.mark.parametrize(
    ("policy", "planes"), [("per_loop", 10), ("collapse", 2), ("decode_shared", 6), ("single:per_position", 2)]
)
def test_memory_that_an_answer_keeps(policy: str, planes: int) -> None:
    """The prompt fills one page, the answer begins another."""
    model = model_of("ouro")
    engine = Engine(model, policy, speculate="off", max_loops=8)
    kept = engine.generate([[1] * 16], Sampling(max_tokens=5, max_loops=5))[0].kv_bytes
    assert kept == planes * layout_of(model).page_bytes(1)
    engine.check_idle()


def test_an_answer_goes_on_where_a_collapsed_prompt_ends() -> None:
    model = model_of("ouro")
    done = Engine(model, "collapse", max_loops=8).generate([[1] * 18], Sampling(max_tokens=5, max_loops=3))[0]
    assert done.kv_bytes == 2 * layout_of(model).page_bytes(1)


def test_shared_answers_fit_where_planes_of_their_own_would_not() -> None:
    model, sampling = model_of("ouro"), Sampling(max_tokens=46)
    room = 2 * layout_of(model).group_bytes(LOOPS)
    assert (
        len(Engine(model, "decode_shared", memory=room, max_loops=LOOPS).generate([[1, 2]], sampling)[0].tokens) == 46
    )
    with pytest.raises(InputError, match=r"prompt and answer of 48 tokens need up to (\d+) bytes.*memory=\1\)"):
        Engine(model, "per_loop", memory=room, max_loops=LOOPS).generate([[1, 2]], sampling)


class TestRefusals:
    @pytest.mark.parametrize("policy", LOCKSTEP)
    @pytest.mark.parametrize("options", [{}, {"chunk": None}, {"prefix_cache": False}, {"chunk": 4}])
    def test_lockstep_prompts_take_neither_chunks_nor_prefixes(self, policy: str, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"policy={policy}: .*policy='{policy}:per_position'") as caught:
            Engine(model_of("ouro"), policy, **options)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("policy", ["collapse", "decode_shared", "single:per_position", "modulo:2:per_position"])
    def test_no_drafts_where_positions_wait_for_each_other(self, policy: str) -> None:
        for drafts in ("1", "2:once", Speculation(window=2)):
            with pytest.raises(ConfigError, match='type speculate="off"') as caught:
                Engine(model_of("ouro"), policy, speculate=drafts)
            assert "\n" not in str(caught.value)
        assert Engine(model_of("ouro"), policy)._core.speculator is None

    @pytest.mark.parametrize(
        "policy",
        [
            "",
            "shared",
            "modulo",
            "modulo:0",
            "modulo:x",
            "single:2",
            "per_loop:skip",
            "collapse:per_position",
            "average:",
        ],
    )
    def test_unknown_policies(self, policy: str) -> None:
        with pytest.raises(ConfigError, match="allowed are per_loop, last_exited, collapse") as caught:
            Engine(model_of("ouro"), policy)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_policy_is_named_by_its_own_text(self, policy: str) -> None:
        assert str(parse_policy(policy)) == policy
        assert parse_policy(parse_policy(policy)) == parse_policy(policy)
