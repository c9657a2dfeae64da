"""Nothing is ignored: what is not supported is refused in OpenAI's envelope, naming the field."""

import json
from typing import Any

import pytest

from .conftest import Live

CHAT: dict[str, Any] = {"model": "talker", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "talker", "prompt": "Hi", "max_tokens": 2}


def post(live: Live, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    with live.http() as http:
        got = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    return got.status_code, got.json()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"user": "me"}, "user"),
        ({"verbosity": "low"}, "verbosity"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"n": 33}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 2000}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"thinking_token_budget": 3}, "thinking_token_budget"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"seed": 2**70}, "seed"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs"),
    ],
)
def test_chat(live: Live, change: dict[str, Any], param: str) -> None:
    status, answer = post(live, "/v1/chat/completions", CHAT | change)
    assert status == 400, answer
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": ["x"] * 20, "n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"logit_bias": {"9999": 1}}, None),
    ],
)
def test_completions(live: Live, change: dict[str, Any], param: str | None) -> None:
    status, answer = post(live, "/v1/completions", TEXT | change)
    assert status == 400, answer
    assert answer["error"]["param"] is None if param is None else answer["error"]["param"].startswith(param)


def test_values_that_change_nothing_are_fine(live: Live) -> None:
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "modalities": ["text"],
        "store": False,
        "stream": None,
        "stop": None,
        "seed": None,
    }
    assert post(live, "/v1/chat/completions", CHAT | neutral)[0] == 200
    assert post(live, "/v1/completions", TEXT | {"echo": False, "best_of": 1, "suffix": ""})[0] == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "JSON body is missing"),
        (b"{", "the body is not JSON"),
        (b'{"model": NaN}', "model"),
        (b'"x"', "body"),
        (b"\xff\xfe", "body"),
        (b'{"model":"talker","prompt":"x","seed":' + b"9" * 5000 + b"}", "parsing the body"),
    ],
)
def test_bodies_that_are_none(live: Live, content: bytes, message: str) -> None:
    with live.http() as http:
        got = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert got.status_code == 400
    assert message in got.json()["error"]["message"]


def test_routes_that_are_none(live: Live) -> None:
    with live.http() as http:
        for method, path, status in (
            ("GET", "/v1/embeddings", 404),
            ("GET", "/", 404),
            ("GET", "/docs", 404),
            ("GET", "/v1/completions", 405),
            ("DELETE", "/v1/models/talker", 405),
        ):
            got = http.request(method, path)
            assert got.status_code == status
            assert got.json()["error"]["message"]
