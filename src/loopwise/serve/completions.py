"""/v1/completions."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loopwise.engine.answer import Emission
from loopwise.errors import InputError
from loopwise.serve.asked import Order, check_model, encode, order, refused_input
from loopwise.serve.replies import CompletionLogprobs, loop_report
from loopwise.serve.schema import CompletionRequest
from loopwise.serve.service import Answering, Service
from loopwise.serve.stream import Chunks, EventStream, whole
from loopwise.serve.usage import usage

_MOST = 16
"""Tokens of an answer when a request does not say, as OpenAI has it."""


def routes(service: Service, fingerprint: str) -> APIRouter:
    """The route, for one service."""
    router = APIRouter()

    @router.post("/v1/completions", tags=["openai"])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several texts."""
        check_model(service, body.model)
        prompts = await _prompts(service, body)
        wanted = order(service, body, prompts, logprobs=body.logprobs or 0, most=body.max_tokens or _MOST)
        run = Continuation(service, body, wanted, fingerprint)
        run.answering.begin()
        if body.stream:
            return EventStream(run.events(), run.answering)
        return await whole(request, run.answering, run.reply)

    return router


async def _prompts(service: Service, body: CompletionRequest) -> list[tuple[int, ...]]:
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    try:
        return [await encode(service, one) if isinstance(one, str) else tuple(one) for one in given]
    except InputError as error:
        raise refused_input(error, "prompt") from None


class Continuation:
    """One request's answers, whole or as events."""

    def __init__(self, service: Service, body: CompletionRequest, wanted: Order, fingerprint: str) -> None:
        self._service = service
        self._body = body
        self._order = wanted
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": fingerprint,
        }
        self.answering = Answering(service, wanted.voices(), stream=bool(body.stream))
        tokenizer = service.engine.model.tokenizer
        self._logprobs = [CompletionLogprobs(tokenizer, body.logprobs or 0) for _ in self.answering.voices]

    async def reply(self) -> dict[str, Any]:
        """The whole answer."""
        count = len(self.answering.voices)
        texts = [""] * count
        emissions: list[list[Emission]] = [[] for _ in range(count)]
        keep = self._body.logprobs is not None or self._order.loop.tokens or self._order.loop.signals
        async for delta in self.answering.deltas():
            texts[delta.index] += delta.text
            if keep:
                emissions[delta.index] += delta.emissions
        choices = [
            self._choice(voice.index, texts[voice.index], voice.finish, emissions[voice.index])
            for voice in self.answering.voices
        ]
        return self._head | {"choices": choices, "usage": self._usage(), "loop": self._order.receipt}

    async def events(self) -> AsyncIterator[str]:
        """The answer as it grows, as JSON; the first event carries the receipt."""
        counted = self._body.stream_options is not None and self._body.stream_options.include_usage
        chunks = Chunks(self._head | {"usage": None} if counted else self._head)
        detailed = self._body.logprobs is not None or self._order.loop.tokens or self._order.loop.signals
        begun = False
        async for delta in self.answering.deltas():
            if not (delta.text or delta.finish or delta.drafts or (detailed and delta.emissions)):
                continue
            choice = self._choice(delta.index, delta.text, delta.finish, delta.emissions, delta.drafts)
            yield chunks.choice(choice) if begun else chunks.other(choices=[choice], loop=self._order.receipt)
            begun = True
        if counted:
            yield chunks.other(choices=[], usage=self._usage())

    def _choice(
        self,
        index: int,
        text: str,
        finish: str | None,
        emissions: Sequence[Emission],
        drafts: Sequence[Emission] = (),
    ) -> dict[str, Any]:
        logprobs = None if self._body.logprobs is None else self._logprobs[index].of(emissions)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        report = loop_report(self._order, emissions, drafts)
        return choice if report is None else choice | {"loop": report}

    def _usage(self) -> dict[str, Any]:
        return usage(self._service.engine, self.answering.voices, prompt_tokens=self._order.prompt_tokens)
