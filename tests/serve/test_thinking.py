"""Thought is told apart from the answer, and a thought over its budget is closed."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.hub.tokenizer import SpecialIds, Tokenizer
from loopwise.models.looped_lm import LoopedLM
from loopwise.serve.thinking import CLOSE, OPEN, Splitter, markers_of

from .conftest import TEMPLATE, Live, serving, talker

LETTERS = "abcdefghij"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def split(parts: list[str], *, inside: bool = False) -> tuple[str, str]:
    splitter = Splitter(inside=inside)
    said = [splitter.push(part) for part in parts] + [splitter.push("", last=True)]
    return "".join(thought for thought, _ in said), "".join(text for _, text in said)


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


class TestSplitter:
    @pytest.mark.parametrize(
        ("text", "inside", "thought", "answer"),
        [
            ("<think>Hm.</think>Yes.", False, "Hm.", "Yes."),
            ("\n<think>\nHm.\n</think>\n\nYes.", False, "Hm.\n", "Yes."),
            ("Hm.</think>Yes.", True, "Hm.", "Yes."),
            ("Hm.", True, "Hm.", ""),
            ("Hm.</thi", True, "Hm.</thi", ""),
            ("Yes.", False, "", "Yes."),
            ("Yes. <think>no</think>", False, "", "Yes. <think>no</think>"),
            ("<thinking>Yes", False, "", "<thinking>Yes"),
            ("  <thin", False, "", "  <thin"),
            ("<think></think>Yes.", False, "", "Yes."),
            ("Hm.</think>a</think>b", True, "Hm.", "a</think>b"),
            ("", False, "", ""),
        ],
    )
    def test_marks(self, text: str, inside: bool, thought: str, answer: str) -> None:
        assert split([text], inside=inside) == (thought, answer)

    @given(
        st.lists(st.sampled_from([OPEN, CLOSE, "<", "</", "think>", "a", "\n", " "]), max_size=8).map("".join),
        st.lists(st.integers(0, 99), max_size=8),
        st.booleans(),
    )
    def test_where_text_is_cut_does_not_matter(self, text: str, places: list[int], inside: bool) -> None:
        assert split(cut(text, places), inside=inside) == split([text], inside=inside)


def special() -> Tokenizer:
    """Raw bytes whose two marks are special tokens, in a template that opens a thought."""
    plain = json.loads(Tokenizer.bytes().serialized)
    entry = plain["added_tokens"][0]
    for number, mark in enumerate((OPEN, CLOSE), 257):
        plain["added_tokens"].append(entry | {"id": number, "content": mark})
    return Tokenizer(
        json.dumps(plain), special=SpecialIds(bos=256, eos=256, pad=256), chat_template=TEMPLATE + "<think>"
    )


@pytest.fixture(scope="module")
def thinking(model: LoopedLM) -> Iterator[Live]:
    """A server whose model thinks aloud: the template opens the thought."""
    thinker = talker()
    assert thinker.tokenizer is not None
    thinker.tokenizer.chat_template = TEMPLATE + "<think>"
    with serving(thinker) as live:
        yield live


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(model="talker", messages=HELLO, max_tokens=20, seed=2, **options)


class TestMarkers:
    def test_templates_and_tokens_tell(self, model: LoopedLM) -> None:
        assert markers_of(None) is None
        assert markers_of(model.tokenizer) is None
        found = markers_of(special())
        assert found is not None
        assert found.ids == {257: OPEN, 258: CLOSE}
        assert 258 in found.closing

    def test_marks_that_are_special_tokens(self) -> None:
        thinker = talker()
        thinker.tokenizer = special()
        with serving(thinker) as live, live.client() as client:
            got = ask(client, extra_body={"logit_bias": {"258": 100, "65": 100}})  # A or the closing mark, at random
        message = got.choices[0].message
        reasoning = message.model_extra["reasoning"] or ""
        details = got.usage.completion_tokens_details
        assert set(reasoning) <= {"A"}
        assert set(message.content) == {"A"}
        assert details.reasoning_tokens == len(reasoning)


class TestBudget:
    @pytest.mark.parametrize("budget", [0, 5])
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_thought_over_its_budget_is_closed(self, thinking: Live, budget: int, stream: bool) -> None:
        markers = thinking.service.markers
        assert markers is not None
        prompt = list(b"<user>Hello\n<assistant><think>")
        # Letters alone: half a character at the place of a cut is told apart from none.
        sampling = Sampling(
            max_tokens=20, temperature=1.0, seed=2, logit_bias=tuple((ord(letter), 100.0) for letter in LETTERS)
        )
        bias = {str(ord(letter)): 100 for letter in LETTERS}
        free = generate(thinking.model, [prompt], sampling, policy="last_exited")[0]
        begun = [*prompt, *free.tokens[:budget], *markers.closing]
        rest = replace(sampling, max_tokens=20 - budget - len(markers.closing))
        wanted = generate(thinking.model, [begun], rest, policy="last_exited")[0]
        with thinking.client() as client:
            options: dict[str, Any] = {
                "extra_body": {"thinking_token_budget": budget, "logit_bias": bias},
                "stream": stream,
            }
            if stream:
                reasoning, content = "", ""
                for chunk in ask(client, stream_options={"include_usage": True}, **options):
                    usage = chunk.usage
                    for choice in chunk.choices:
                        reasoning += (choice.delta.model_extra or {}).get("reasoning", "")
                        content += choice.delta.content or ""
            else:
                got = ask(client, **options)
                usage, message = got.usage, got.choices[0].message
                reasoning, content = message.model_extra["reasoning"] or "", message.content
        tokenizer = thinking.model.tokenizer
        assert tokenizer is not None
        assert reasoning == tokenizer.decode(free.tokens[:budget])
        assert content == (wanted.text or "").lstrip("\n")
        assert usage.completion_tokens == 20
        assert usage.completion_tokens_details.reasoning_tokens == budget
        assert usage.model_extra["loop"]["total"] == 4 * (20 - len(markers.closing))
        thinking.settle()

    def test_a_budget_that_is_not_reached_changes_nothing(self, thinking: Live) -> None:
        with thinking.client() as client:
            free, within = ask(client), ask(client, extra_body={"thinking_token_budget": 100})
        assert free.choices[0].message.model_extra["reasoning"] == within.choices[0].message.model_extra["reasoning"]
        assert within.choices[0].message.content == ""
        assert within.usage.completion_tokens_details.reasoning_tokens == 20
