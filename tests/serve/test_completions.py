"""/v1/completions as the official client uses it; every answer is the readable generator's."""

import json
from typing import Any

import openai
import pytest

from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling

from .conftest import Live


def test_texts_and_token_ids_and_several_of_them(live: Live, client: openai.OpenAI) -> None:
    sampling = Sampling(max_tokens=7, temperature=1.0, seed=4, n=2, logprobs=3, exit="hazard:0.3")
    wanted = generate(live.model, ["Once", "And so"], sampling, policy="last_exited")
    ask: dict[str, Any] = {"model": "talker", "max_tokens": 7, "seed": 4, "n": 2, "logprobs": 3}
    ask["extra_body"] = {"loop": {"rule": "hazard:0.3", "tokens": True}}
    for prompt in (["Once", "And so"], [list(b"Once"), list(b"And so")]):
        got = client.completions.create(prompt=prompt, **ask)
        assert [choice.text for choice in got.choices] == [one.text for one in wanted]
        assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
        for choice, one in zip(got.choices, wanted, strict=True):
            extra: Any = choice.model_extra
            assert extra["loop"] == {"tokens": list(one.tokens), "loops": list(one.loops)}
            assert choice.logprobs is not None
            assert choice.logprobs.token_logprobs == pytest.approx(one.logprobs, abs=1e-4)
            assert choice.logprobs.tokens == live.model.tokenizer.pieces(one.tokens)
            assert choice.logprobs.text_offset is not None
            assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)
            assert all(1 <= len(top) <= 3 for top in choice.logprobs.top_logprobs or [])
        assert got.usage is not None
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (10, 28)


@pytest.mark.parametrize("prompt", ["Once", list(b"Once")])
def test_one_prompt(live: Live, client: openai.OpenAI, prompt: Any) -> None:
    wanted = generate(live.model, ["Once"], Sampling(max_tokens=16), policy="last_exited")[0]
    got = client.completions.create(model="talker", prompt=prompt, temperature=0)
    assert got.choices[0].text == wanted.text
    assert got.choices[0].logprobs is None
    assert got.choices[0].finish_reason == "length"


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "talker", "prompt": ["Once", "And so"], "max_tokens": 12, "seed": 9, "logprobs": 2}
    whole = client.completions.create(**ask)
    texts, logprobs, offsets = ["", ""], [[], []], [[], []]  # type: ignore[var-annotated]
    ends: list[Any] = [None, None]
    usage = None
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            assert choice.logprobs is not None
            logprobs[choice.index] += choice.logprobs.token_logprobs or []
            offsets[choice.index] += choice.logprobs.text_offset or []
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert texts[choice.index] == choice.text
        assert ends[choice.index] == choice.finish_reason
        assert logprobs[choice.index] == pytest.approx(choice.logprobs.token_logprobs)
        assert offsets[choice.index] == choice.logprobs.text_offset
    assert usage is not None
    assert whole.usage is not None
    assert usage.model_dump() == whole.usage.model_dump()


def test_text_never_becomes_a_special_token(live: Live, client: openai.OpenAI) -> None:
    got = client.completions.create(model="talker", prompt="<|endoftext|>", max_tokens=1)
    assert got.usage is not None
    assert got.usage.prompt_tokens == len("<|endoftext|>")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "a prompt is empty"),
        ([], "prompt is an empty list"),
        ([[]], "a prompt is empty"),
        ([5000], "token id 5000 is not in the model's vocabulary"),
        ("x" * 512, "the prompt has 512 tokens and the context holds 512"),
        ("\ud800", "prompt: Input should be a valid string"),
    ],
)
def test_prompts_that_cannot_be(live: Live, prompt: Any, message: str) -> None:
    with live.http() as http:
        got = http.post(
            "/v1/completions",
            content=json.dumps({"model": "talker", "prompt": prompt}),
            headers={"content-type": "application/json"},
        )
    assert got.status_code == 400
    assert message in got.json()["error"]["message"]
    live.settle()
