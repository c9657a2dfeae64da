"""From the body of a request to the answers it asks for, within this server's caps."""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loopwise.engine.sampling import Sampling
from loopwise.errors import ConfigError, InputError
from loopwise.hub.tokenizer import Tokenizer
from loopwise.serve.effort import OFF, Knob
from loopwise.serve.errors import ApiError
from loopwise.serve.schema import Asked, LoopOptions
from loopwise.serve.service import Service
from loopwise.serve.thinking import Splitter, begins_inside
from loopwise.serve.voice import Voice

_SLOW_TEXT = 4096
"""Characters from which a text is encoded in a thread, so that others need not wait for it."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one request wants, checked."""

    service: Service
    prompts: tuple[tuple[int, ...], ...]
    n: int
    sampling: Sampling
    knob: Knob
    loop: LoopOptions
    most: int
    """Tokens of an answer at most, as far as the context has room."""

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def receipt(self) -> dict[str, Any]:
        """With which settings the same answer can be had again."""
        policy = str(self.service.engine.policy)
        knob = self.knob
        return {
            "effort": knob.effort,
            "max": knob.max_loops,
            "min": knob.min_loops,
            "rule": knob.rule or OFF,
            "start": knob.start,
            "policy": policy,
            "prompt_depth": self.service.engine.prompt_depth,
            "seed": self.sampling.seed,
        }

    def voices(self, *, thinks: bool = False, budget: int | None = None) -> list[Voice]:
        """One for each answer: n to each prompt, side by side.

        Args:
            thinks: whether thought is to be told from answers.
        """
        markers = self.service.markers if thinks else None
        tokenizer = self.service.engine.model.tokenizer
        made: list[Voice] = []
        for prompt in self.prompts:
            inside = markers is not None and tokenizer is not None and begins_inside(tokenizer, prompt)
            for sample in range(self.n):
                made.append(
                    Voice(
                        index=len(made),
                        prompt=prompt,
                        sampling=self.sampling,
                        sample=sample,
                        knob=self.knob,
                        room=min(self.most, self.service.engine.model.config.max_positions - len(prompt)),
                        signals=self.loop.signals,
                        drafts=self.loop.drafts,
                        markers=markers,
                        splitter=None if markers is None else Splitter(inside=inside),
                        budget=budget,
                    )
                )
        return made


def order(
    service: Service,
    body: Asked,
    prompts: Sequence[tuple[int, ...]],
    *,
    logprobs: int,
    most: int | None,
    stop: Sequence[str] = (),
) -> Order:
    """Check a request against the model and this server's caps.

    Args:
        logprobs: likeliest tokens to tell beside each chosen one.
        most: tokens of an answer at most; None means what there is room for.
        stop: stop texts beside those of the body.

    Raises:
        ApiError: what is not allowed here.
    """
    settings = service.settings
    n = body.n or 1
    _check_prompts(service, prompts, n)
    loop = body.loop or LoopOptions()
    if loop.signals and service.efforts.signal is None:
        raise ApiError("this model has no gate, so there is no signal to tell", param="loop.signals")
    if loop.drafts and not body.stream:
        raise ApiError("drafts can only be told while streaming; set stream to true", param="loop.drafts")
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options says how to stream; set stream to true", param="stream_options")
    if logprobs > settings.logprobs:
        raise ApiError(f"{logprobs} likeliest tokens were asked for; allowed are {settings.logprobs}", param="logprobs")
    if most is not None and settings.max_tokens is not None and most > settings.max_tokens:
        raise ApiError(f"max_tokens is {most}; allowed are {settings.max_tokens}", param="max_tokens")
    stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])
    if len(stops) > settings.stops:
        raise ApiError(f"{len(stops)} stop texts; allowed are {settings.stops}", param="stop")
    knob = service.efforts.resolve(body.reasoning_effort, body.loop)
    most = most or settings.max_tokens or service.engine.model.config.max_positions
    try:
        sampling = Sampling(
            max_tokens=most,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            logit_bias=_biases(body.logit_bias or {}, settings.biases),
            logprobs=logprobs,
            # Without a seed every answer is another; the receipt says which seed it was.
            seed=secrets.randbits(53) if body.seed is None else body.seed,
            stop=tuple(dict.fromkeys([*stops, *stop])),
            ignore_eos=bool(body.ignore_eos),
            exit=knob.rule,
            max_loops=knob.max_loops,
            min_loops=knob.min_loops,
            start=knob.start,
        )
    except ConfigError as error:
        raise ApiError(str(error)) from None
    return Order(service=service, prompts=tuple(prompts), n=n, sampling=sampling, knob=knob, loop=loop, most=most)


def check_model(service: Service, name: str) -> None:
    """See that this is the model that is served.

    Raises:
        ApiError: it is another.
    """
    if name != service.name:
        raise ApiError(
            f"there is no model {name!r} here; this server has {service.name!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


async def encode(service: Service, text: str) -> tuple[int, ...]:
    """Ids of somebody's text; no part of it becomes a special token.

    Raises:
        ApiError: the model reads no text.
    """
    tokenizer = tokenizer_of(service)
    if len(text) < _SLOW_TEXT:
        return tuple(tokenizer.encode(text, add_special=True))
    return tuple(await asyncio.to_thread(tokenizer.encode, text, add_special=True))


def tokenizer_of(service: Service) -> Tokenizer:
    """The served model's tokenizer.

    Raises:
        ApiError: it has none.
    """
    tokenizer = service.engine.model.tokenizer
    if tokenizer is None:
        raise ApiError("this checkpoint has no tokenizer.json, so it reads no text; send token ids to /v1/completions")
    return tokenizer


def _check_prompts(service: Service, prompts: Sequence[tuple[int, ...]], n: int) -> None:
    settings, context = service.settings, service.engine.model.config.max_positions
    if not prompts:
        raise ApiError("prompt is an empty list; give at least one prompt", param="prompt")
    if len(prompts) * n > settings.choices:
        raise ApiError(
            f"{len(prompts)} prompts times n={n} are more than {settings.choices} answers; ask in several requests",
            param="n",
        )
    for prompt in prompts:
        if len(prompt) >= context:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens and the context holds {context}, one of them for the answer",
                code="context_length_exceeded",
            )
        if settings.prompt is not None and len(prompt) > settings.prompt:
            raise ApiError(f"the prompt has {len(prompt)} tokens; allowed are {settings.prompt}")
        if not prompt:
            raise ApiError("a prompt is empty; give at least one token", param="prompt")


def _biases(given: dict[str, float], most: int) -> tuple[tuple[int, float], ...]:
    if len(given) > most:
        raise ApiError(f"logit_bias has {len(given)} tokens; allowed are {most}", param="logit_bias")
    pairs = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ApiError(f"logit_bias has the key {key[:40]!r}; give token ids", param="logit_bias")
        pairs[int(key)] = bias
    if len(pairs) != len(given):
        raise ApiError("logit_bias names a token twice", param="logit_bias")
    return tuple(pairs.items())


def refused_input(error: InputError, param: str) -> ApiError:
    """A mistake in one field that tokenizer or template noticed."""
    return ApiError(" ".join(str(error).split()), param=param)
