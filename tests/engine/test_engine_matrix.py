"""The promise: an answer does not depend on what else runs, on chunks, prefixes, pre-emption or speculation.

The readable generator is the reference, in float64: the same tokens and loops, log-probabilities to 1e-9.
"""

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loopwise.engine.answer import Completion
from loopwise.engine.engine import Engine
from loopwise.engine.layout import layout_of
from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.engine.speculation import Speculation
from loopwise.models.looped_lm import LoopedLM

TESTS = Path(__file__).parents[1]
tiny: Callable[..., LoopedLM] = runpy.run_path(str(TESTS / "models" / "naive_lm.py"))["tiny"]

LOOPS = 4
POLICIES = ["per_loop", "last_exited"]
WAYS: dict[str, dict[str, Any]] = {
    "together": {"speculate": "off"},
    "chunks": {"speculate": "off", "chunk": 3, "prefix_cache": False},
    "few rows": {"speculate": "off", "rows": 2, "chunk": 2, "seats": 3},
    "crowded": {"speculate": "off", "memory": "few", "seats": 6},
    "drafts": {"speculate": Speculation(draft_loop=1, redraft=True, window=3)},
    "drafts once": {"speculate": Speculation(draft_loop=1, redraft=False, window=2)},
    "late drafts": {"speculate": Speculation(draft_loop=2, redraft=True, window=1), "rows": 3},
    "everything": {"speculate": Speculation(window=3), "memory": "few", "rows": 5, "chunk": 4, "seats": 5},
}
SHORT = ["few rows", "everything"]
"""The ways that the short matrix tries."""
RULES = {
    "ouro": [None, "fixed:2", "hazard:0.7", "delta:0.7", "kl:0.3", "budget:2.5:hazard:0.97", "patience:2:delta:0.9"],
    "huginn": [None, "fixed:2", "delta:0.8", "second-difference:3.0", "kl:0.3"],
    "retrofitted-llama": [None, "fixed:2", "delta:0.8", "entropy:0.1"],
    "retrofitted-olmo": ["delta:0.8"],
    "universal": ["hazard:0.8"],
    "coda": ["hazard:0.9", "stable:2"],
    "zeros": ["hazard:0.8"],
}
WHOLE = [(name, rule) for name, rules in RULES.items() for rule in rules]
FEW = [("ouro", "hazard:0.7"), ("huginn", "delta:0.8"), ("retrofitted-llama", None), ("coda", "hazard:0.9")]


def prompts(model: LoopedLM) -> list[list[int]]:
    """Six prompts, some of which begin alike."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    common = torch.randint(0, vocabulary, (37,), generator=generator).tolist()
    other = torch.randint(0, vocabulary, (9,), generator=generator).tolist()
    return [[3, 1, 7], common[:20], common, [*common[:33], 5, 2], other, common[:17]]


def settings(rule: str | None, *, sampled: bool) -> list[Sampling]:
    return [
        Sampling(
            max_tokens=length,
            exit=rule,
            max_loops=loops,
            min_loops=1 + length % 2,
            temperature=0.9 if sampled else 0.0,
            top_p=0.9 if sampled and length % 2 else None,
            repetition_penalty=1.3 if length == 12 else 1.0,
            seed=length,
        )
        for length, loops in zip([5, 12, 3, 9, 20, 7], [None, 3, 4, 4, 2, 3], strict=True)
    ]


def few_pages(model: LoopedLM) -> int:
    """Bytes that hardly suffice for the longest of the requests."""
    return 4 * layout_of(model).group_bytes(LOOPS)


def reference(model: LoopedLM, settings: Sequence[Sampling], policy: str) -> list[Completion]:
    answers = zip(prompts(model), settings, strict=True)
    return [generate(model, [prompt], one, policy=policy)[0] for prompt, one in answers]


def check_same(got: Sequence[Completion], wanted: Sequence[Completion], tolerance: float = 1e-9) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.loops == theirs.loops
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=tolerance)
        assert mine.finish_reason == theirs.finish_reason


def check_cell(name: str, rule: str | None, policy: str, *, sampled: bool, ways: Sequence[str]) -> None:
    model = tiny(name)
    mine = settings(rule, sampled=sampled)
    wanted = reference(model, mine, policy)
    for way in ways:
        options = dict(WAYS[way])
        if "memory" in options:
            options["memory"] = few_pages(model)
        engine = Engine(model, policy, max_loops=LOOPS, **options)
        check_same(engine.generate(prompts(model), mine), wanted)
        if options.get("prefix_cache", True):
            # Once more, so that prefixes are found.
            check_same(engine.generate(prompts(model), mine), wanted)
        engine.check_idle()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "rule"), FEW)
def test_answers_depend_on_nothing_else(name: str, rule: str | None, policy: str) -> None:
    check_cell(name, rule, policy, sampled=policy == "last_exited", ways=SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "rule"), WHOLE)
def test_the_whole_matrix(name: str, rule: str | None, policy: str, sampled: bool) -> None:
    check_cell(name, rule, policy, sampled=sampled, ways=list(WAYS))
