"""/v1/chat/completions as the official client uses it; every answer is the readable generator's."""

from typing import Any

import openai
import pytest

from loopwise.engine.answer import Completion
from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.engine.speculation import Speculation
from loopwise.models.looped_lm import LoopedLM

from .conftest import Live, serving, talker

HELLO: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <|endoftext|> there"},
]
LAID_OUT = "<system>Be brief.\n<user>Hello <|endoftext|> there\n<assistant>"


def alone(live: Live, sampling: Sampling, text: str = LAID_OUT) -> Completion:
    """What the readable generator says; the bytes of a text, so that none of it is a special token."""
    return generate(live.model, [list(text.encode())], sampling, policy="last_exited")[0]


class TestWhole:
    def test_an_answer_is_the_generators(self, live: Live, client: openai.OpenAI) -> None:
        wanted = alone(live, Sampling(max_tokens=12, temperature=0.7, seed=5, exit="hazard:0.3", top_p=0.9))
        got = client.chat.completions.create(
            model="talker",
            messages=HELLO,
            max_completion_tokens=12,
            temperature=0.7,
            top_p=0.9,
            seed=5,
            extra_body={"loop": {"rule": "hazard:0.3", "tokens": True, "signals": True}},
            logprobs=True,
            top_logprobs=2,
        )
        choice = got.choices[0]
        assert choice.message.content == wanted.text
        assert choice.message.role == "assistant"
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        told = choice.logprobs.content
        assert [one.logprob for one in told] == pytest.approx(wanted.logprobs, abs=1e-4)
        assert [bytes(one.bytes or []) for one in told] == [live.model.tokenizer.token_bytes(i) for i in wanted.tokens]
        assert all(len(one.top_logprobs) == 2 for one in told)
        extra: Any = choice.model_extra
        assert extra["loop"]["tokens"] == list(wanted.tokens)
        assert extra["loop"]["loops"] == list(wanted.loops)
        assert [len(row) for row in extra["loop"]["signals"]] == list(wanted.loops)
        assert len(set(wanted.loops)) > 1  # or nothing about loops has been tried here

    def test_usage_counts_loops_and_never_as_reasoning(self, live: Live, client: openai.OpenAI) -> None:
        wanted = alone(live, Sampling(max_tokens=9, exit="hazard:0.3"))
        got = client.chat.completions.create(
            model="talker",
            messages=HELLO,
            max_tokens=9,
            temperature=0,
            extra_body={"loop": {"rule": "hazard:0.3"}},
        )
        assert got.usage is not None
        assert got.usage.prompt_tokens == len(LAID_OUT)
        assert got.usage.completion_tokens == 9
        assert got.usage.total_tokens == len(LAID_OUT) + 9
        assert got.usage.completion_tokens_details is not None
        assert got.usage.completion_tokens_details.reasoning_tokens == 0
        loop: Any = (got.usage.model_extra or {})["loop"]
        assert loop["total"] == sum(wanted.loops)
        assert loop["mean"] == pytest.approx(wanted.mean_loops)
        assert loop["max"] == max(wanted.loops)
        assert loop["kv_bytes"] > 0
        assert loop["flops"] > 0

    def test_a_seed_that_was_not_given_is_told_and_gives_the_same_again(self, client: openai.OpenAI) -> None:
        ask: dict[str, Any] = {"model": "talker", "messages": HELLO, "max_tokens": 8}
        first, other = (client.chat.completions.create(**ask) for _ in range(2))
        seed = (first.model_extra or {})["loop"]["seed"]
        assert seed != (other.model_extra or {})["loop"]["seed"]
        again = client.chat.completions.create(**ask, seed=seed)
        assert again.choices[0].message.content == first.choices[0].message.content

    def test_several_answers_stand_side_by_side(self, live: Live, client: openai.OpenAI) -> None:
        sampling = Sampling(max_tokens=6, temperature=1.0, seed=3, n=3)
        wanted = generate(live.model, [list(LAID_OUT.encode())], sampling, policy="last_exited")
        got = client.chat.completions.create(model="talker", messages=HELLO, max_tokens=6, n=3, seed=3)
        assert [choice.message.content for choice in got.choices] == [one.text for one in wanted]
        assert [choice.index for choice in got.choices] == [0, 1, 2]

    def test_stop_texts_and_bias(self, live: Live, client: openai.OpenAI) -> None:
        bias = ((ord("a"), 100.0), (ord("b"), 100.0))
        free = alone(live, Sampling(max_tokens=30, temperature=1.0, seed=1, logit_bias=bias)).text or ""
        stop = free[4:7]
        got = client.chat.completions.create(
            model="talker",
            messages=HELLO,
            max_tokens=30,
            seed=1,
            stop=[stop, "never"],
            logit_bias={str(token): int(added) for token, added in bias},
        )
        assert set(free) == {"a", "b"}
        assert got.choices[0].message.content == free[: free.index(stop)]
        assert got.choices[0].finish_reason == "stop"

    def test_without_a_number_the_answer_may_fill_the_context(self, live: Live, client: openai.OpenAI) -> None:
        got = client.chat.completions.create(
            model="talker",
            messages=[{"role": "user", "content": "x" * 470}],
            temperature=0,
            reasoning_effort="none",
            extra_body={"ignore_eos": True},
        )
        assert got.usage is not None
        assert got.usage.total_tokens == live.model.config.max_positions
        assert got.choices[0].finish_reason == "length"


class TestStreams:
    def test_a_stream_says_what_the_whole_answer_says(self, client: openai.OpenAI) -> None:
        ask: dict[str, Any] = {
            "model": "talker",
            "messages": HELLO,
            "max_tokens": 20,
            "seed": 11,
            "n": 2,
            "logprobs": True,
            "extra_body": {"loop": {"rule": "hazard:0.3", "tokens": True, "signals": True}},
        }
        whole = client.chat.completions.create(**ask)
        texts, loops, signals, logprobs = ["", ""], [[], []], [[], []], [[], []]  # type: ignore[var-annotated]
        ends: list[Any] = [None, None]
        roles, usage, receipts = [], None, []
        for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            receipts += [(chunk.model_extra or {})["loop"]] if "loop" in (chunk.model_extra or {}) else []
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                roles += [choice.delta.role] if choice.delta.role else []
                ends[choice.index] = choice.finish_reason or ends[choice.index]
                told = (choice.model_extra or {}).get("loop", {"loops": [], "signals": []})
                loops[choice.index] += told["loops"]
                signals[choice.index] += told["signals"]
                if choice.logprobs is not None:
                    logprobs[choice.index] += [one.logprob for one in choice.logprobs.content or []]
        assert roles == ["assistant", "assistant"]
        assert receipts[0] == (whole.model_extra or {})["loop"]
        for choice in whole.choices:
            extra: Any = choice.model_extra
            assert texts[choice.index] == choice.message.content
            assert ends[choice.index] == choice.finish_reason
            assert loops[choice.index] == extra["loop"]["loops"]
            assert [pytest.approx(row) for row in signals[choice.index]] == extra["loop"]["signals"]
            assert choice.logprobs is not None
            assert logprobs[choice.index] == pytest.approx([one.logprob for one in choice.logprobs.content or []])
        assert usage is not None
        assert usage.model_dump() == whole.usage.model_dump()  # type: ignore[union-attr]

    def test_no_usage_unless_asked(self, client: openai.OpenAI) -> None:
        chunks = list(client.chat.completions.create(model="talker", messages=HELLO, max_tokens=3, stream=True))
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)

    def test_events_end_with_done(self, live: Live) -> None:
        body = {"model": "talker", "messages": HELLO, "max_tokens": 2, "stream": True}
        with live.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as got:
            assert got.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in got.iter_lines() if line]
        assert all(line.startswith("data: {") for line in lines[:-1])
        assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_the_clients_own_errors(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=HELLO, stream=stream)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        client.chat.completions.create(
            model="talker", messages=HELLO, stream=stream, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="talker", messages=[{"role": "user", "content": "x" * 600}], stream=stream)
    assert long.value.code == "context_length_exceeded"


def test_an_assistants_message_goes_back_as_the_client_dumps_it(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="talker", messages=HELLO, max_tokens=3)
    messages = [*HELLO, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "And?"}]}]
    second = client.chat.completions.create(model="talker", messages=messages, max_tokens=3)
    assert second.usage is not None
    assert second.usage.completion_tokens == 3


def test_a_base_model_talks_only_in_plain_lines(model: LoopedLM) -> None:
    base = talker()
    assert base.tokenizer is not None
    base.tokenizer.chat_template = None
    with serving(base) as live, live.client() as client:
        assert (client.models.retrieve("talker").model_extra or {})["chat"] is False
        with pytest.raises(openai.BadRequestError, match="no chat template") as refused:
            client.chat.completions.create(model="talker", messages=HELLO)
        assert refused.value.code == "no_chat_template"
    with serving(base, plain=True) as live, live.client() as client:
        wanted = alone(
            live,
            Sampling(max_tokens=9, temperature=1.0, seed=2),
            "System: Be brief.\nUser: Hello <|endoftext|> there\nAssistant:",
        )
        got = client.chat.completions.create(model="talker", messages=HELLO, max_tokens=9, seed=2)
        assert got.choices[0].message.content == wanted.text


def test_drafts_are_told_while_streaming_and_change_nothing(model: LoopedLM) -> None:
    ask: dict[str, Any] = {"model": "talker", "messages": HELLO, "max_tokens": 16, "seed": 1, "stream": True}
    with serving(model, speculate=Speculation(window=2), pace=0.0) as live, live.client() as client:
        plain = "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask))
        text, drafts, loops = "", [], []
        for chunk in client.chat.completions.create(**ask, extra_body={"loop": {"drafts": True, "tokens": True}}):
            text += chunk.choices[0].delta.content or ""
            told = (chunk.choices[0].model_extra or {}).get("loop", {})
            drafts += told.get("drafts", [])
            loops += told.get("loops", [])
        live.settle()
    assert text == plain
    assert loops == [4] * 16
    assert drafts
    assert all(0 <= draft["index"] < 16 and draft["loops"] < 4 for draft in drafts)


def test_pace_gathers_tokens_into_fewer_events(model: LoopedLM) -> None:
    ask: dict[str, Any] = {"model": "talker", "messages": HELLO, "max_tokens": 60, "seed": 1, "stream": True}
    ask |= {"logprobs": True, "top_logprobs": 1}  # so that every tick is one by itself
    counts = []
    for pace in (0.0, 1.0):
        with serving(model, pace=pace) as live, live.client() as client:
            chunks = list(client.chat.completions.create(**ask))
            counts.append(len(chunks))
            assert sum(len(chunk.choices[0].delta.content or "") for chunk in chunks) > 30
            live.settle()
    assert counts[0] > 20
    assert counts[1] <= 4
