"""/v1/chat/completions."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loopwise.engine.answer import Emission
from loopwise.errors import InputError
from loopwise.serve.asked import Order, check_model, encode, order, refused_input, tokenizer_of
from loopwise.serve.errors import ApiError
from loopwise.serve.replies import chat_logprobs, loop_report
from loopwise.serve.schema import ChatRequest, Message
from loopwise.serve.service import Answering, Service
from loopwise.serve.stream import Chunks, EventStream, whole
from loopwise.serve.usage import usage
from loopwise.serve.voice import Delta

_TURNS = {"system": "System", "user": "User", "assistant": "Assistant"}


def routes(service: Service, fingerprint: str) -> APIRouter:
    """The route, for one service."""
    router = APIRouter()

    @router.post("/v1/chat/completions", tags=["openai"])
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        check_model(service, body.model)
        talk = Talk(service, body, await _order(service, body), fingerprint)
        talk.answering.begin()
        if body.stream:
            return EventStream(talk.events(), talk.answering)
        return await whole(request, talk.answering, talk.reply)

    return router


async def _order(service: Service, body: ChatRequest) -> Order:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs says how many beside logprobs; set logprobs to true", param="top_logprobs")
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise ApiError("max_tokens and max_completion_tokens differ; give one of them", param="max_completion_tokens")
    if body.thinking_token_budget is not None and service.markers is None:
        raise ApiError("this checkpoint does not think aloud; leave it out", param="thinking_token_budget")
    prompt = await _prompt(service, body)
    return order(
        service,
        body,
        [prompt],
        logprobs=body.top_logprobs or 0,
        most=body.max_completion_tokens or body.max_tokens,
        stop=(f"\n{_TURNS['user']}:",) if service.settings.plain else (),
    )


async def _prompt(service: Service, body: ChatRequest) -> tuple[int, ...]:
    tokenizer = tokenizer_of(service)
    messages = [_plain(message) for message in body.messages]
    try:
        if service.settings.plain:
            said = [f"{_TURNS[message['role']]}: {message['content']}\n" for message in messages]
            return await encode(service, "".join(said) + f"{_TURNS['assistant']}:")
        if tokenizer.chat_template is None:
            raise ApiError(
                f"{service.name} has no chat template: it continues text, so ask /v1/completions, or start the server "
                "with plain=true",
                code="no_chat_template",
            )
        # A template is a program: others need not wait for it.
        return tuple(await asyncio.to_thread(tokenizer.chat, messages))
    except InputError as error:
        raise refused_input(error, "messages") from None


def _plain(message: Message) -> Mapping[str, str]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    # Templates know the older of the two names.
    return {"role": "system" if message.role == "developer" else message.role, "content": text}


class Talk:
    """One conversation's answers, whole or as events."""

    def __init__(self, service: Service, body: ChatRequest, wanted: Order, fingerprint: str) -> None:
        self._service = service
        self._body = body
        self._order = wanted
        self._tokenizer = tokenizer_of(service)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": fingerprint,
        }
        self._thinks = service.markers is not None
        voices = wanted.voices(thinks=True, budget=body.thinking_token_budget)
        self.answering = Answering(service, voices, stream=bool(body.stream))

    async def reply(self) -> dict[str, Any]:
        """The whole answer."""
        count = len(self.answering.voices)
        texts, thoughts = [""] * count, [""] * count
        emissions: list[list[Emission]] = [[] for _ in range(count)]
        keep = self._body.logprobs or self._order.loop.tokens or self._order.loop.signals
        async for delta in self.answering.deltas():
            texts[delta.index] += delta.text
            thoughts[delta.index] += delta.thought
            if keep:
                emissions[delta.index] += delta.emissions
        choices = []
        for voice in self.answering.voices:
            message: dict[str, Any] = {"role": "assistant", "content": texts[voice.index], "refusal": None}
            if self._thinks:
                message["reasoning"] = thoughts[voice.index] or None
            choice = {"index": voice.index, "message": message, "finish_reason": voice.finish}
            choices.append(choice | self._beside(Delta(voice.index, emissions=emissions[voice.index]), always=True))
        return self._head | {
            "object": "chat.completion",
            "choices": choices,
            "usage": self._usage(),
            "loop": self._order.receipt,
        }

    async def events(self) -> AsyncIterator[str]:
        """The answer as it grows, as JSON."""
        head = self._head | {"object": "chat.completion.chunk"}
        counted = self._body.stream_options is not None and self._body.stream_options.include_usage
        chunks = Chunks(head | {"usage": None} if counted else head)
        for voice in self.answering.voices:
            first = {"index": voice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield chunks.other(choices=[first | {"logprobs": None}], loop=self._order.receipt)
        async for delta in self.answering.deltas():
            choice = self._choice(delta)
            if choice is not None:
                yield chunks.choice(choice)
        if counted:
            yield chunks.other(choices=[], usage=self._usage())

    def _choice(self, delta: Delta) -> dict[str, Any] | None:
        """A part of one choice; None while nothing can be told."""
        said: dict[str, Any] = {}
        if delta.thought:
            said["reasoning"] = delta.thought
        if delta.text:
            said["content"] = delta.text
        beside = self._beside(delta)
        if not said and not beside and delta.finish is None:
            return None
        return {"index": delta.index, "delta": said, "finish_reason": delta.finish} | beside

    def _beside(self, delta: Delta, *, always: bool = False) -> dict[str, Any]:
        """Log-probabilities and loops, where they were asked for."""
        told: dict[str, Any] = {}
        if self._body.logprobs and (delta.emissions or always):
            entries = chat_logprobs(self._tokenizer, delta.emissions, self._body.top_logprobs or 0)
            told["logprobs"] = {"content": entries, "refusal": None}
        elif always:
            told["logprobs"] = None
        if delta.emissions or delta.drafts or always:
            report = loop_report(self._order, delta.emissions, delta.drafts)
            if report is not None:
                told["loop"] = report
        return told

    def _usage(self) -> dict[str, Any]:
        return usage(self._service.engine, self.answering.voices, prompt_tokens=self._order.prompt_tokens)
