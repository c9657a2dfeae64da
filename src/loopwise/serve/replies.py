"""Pieces of an answer in OpenAI's shapes."""

from collections.abc import Sequence
from typing import Any

from loopwise.engine.answer import Emission
from loopwise.hub.tokenizer import Tokenizer
from loopwise.serve.asked import Order


def chat_logprobs(tokenizer: Tokenizer, emissions: Sequence[Emission], likeliest: int) -> list[dict[str, Any]]:
    """One entry for each token, with this many of the likeliest beside it."""
    return [
        _named(tokenizer, one.token, one.logprob)
        | {"top_logprobs": [_named(tokenizer, token, logprob) for token, logprob in one.tops[:likeliest]]}
        for one in emissions
    ]


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": logprob}


class CompletionLogprobs:
    """Log-probabilities of /v1/completions, whose offsets go on from event to event."""

    def __init__(self, tokenizer: Tokenizer | None, likeliest: int) -> None:
        self._tokenizer = tokenizer
        self._likeliest = likeliest
        self._offset = 0

    def of(self, emissions: Sequence[Emission]) -> dict[str, Any]:
        """The entries of some tokens; equal texts of different tokens keep the likelier one."""
        offsets, tops = [], []
        for one in emissions:
            offsets.append(self._offset)
            self._offset += len(one.text or "")
            best: dict[str, float] = {}
            for token, logprob in one.tops[: self._likeliest]:
                best.setdefault(self._name(token), logprob)
            tops.append(best)
        return {
            "tokens": [self._name(one.token) for one in emissions],
            "token_logprobs": [one.logprob for one in emissions],
            "top_logprobs": tops if self._likeliest else None,
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._tokenizer is None else self._tokenizer.pieces([token])[0]


def loop_report(order: Order, emissions: Sequence[Emission], drafts: Sequence[Emission] = ()) -> dict[str, Any] | None:
    """Loops and signals of each token, in the order of the log-probabilities; None where they were not asked for."""
    told: dict[str, Any] = {}
    if order.loop.tokens:
        told["tokens"] = [one.token for one in emissions]
        told["loops"] = [one.loops for one in emissions]
    if order.loop.signals:
        told["signals"] = [list(one.signals) for one in emissions]
    if drafts:
        told["drafts"] = [
            {"index": one.index, "token": one.token, "text": one.text, "loops": one.loops} for one in drafts
        ]
    return told or None
