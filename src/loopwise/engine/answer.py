"""An answer while it grows: tokens become certain text, and the end is noticed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from loopwise.engine.sampling import Sampling
from loopwise.engine.text import TextStream
from loopwise.hub.tokenizer import Tokenizer
from loopwise.models.looped_lm import LoopedLM


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one prompt was answered with."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """Generated token ids, the end-of-text token included."""
    text: str | None
    """Decoded text without stop strings; None when the model has no tokenizer. An unfinished character shows as
    U+FFFD, but is left out of an aborted answer."""
    loops: tuple[int, ...]
    """Loops of the row that emitted each token, that is of the position before it."""
    logprobs: tuple[float, ...]
    """Log-probability of each token in nats, at the loop it left, before temperature and filters."""
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()
    """The likeliest tokens beside each one and their log-probabilities, where they were asked for."""
    signals: tuple[tuple[float, ...], ...] = ()
    """The model's signal (a hazard) after each loop of the row that emitted each token, where it was asked for."""
    prompt_loops: tuple[int, ...] = ()
    """Loops of each position of the prompt, where prompts obey the exit rule; the last is `loops[0]`."""
    finish_reason: str
    """"stop" (end of text or a stop string), "length" (max_tokens), "context" (no room left) or "abort" (nobody asked
    for more tokens)."""
    kv_bytes: int
    """Bytes of keys and values held at the end."""
    sample: int = 0
    """Which of several answers to one prompt this is."""
    seconds: float = field(default=0.0, compare=False)
    """Time it all took, printing aside."""
    prompt_seconds: float = field(default=0.0, compare=False)
    """The part of it that the prompt took, and with it the first token."""

    @property
    def mean_loops(self) -> float:
        """Mean over the generated tokens; NaN when there are none."""
        return sum(self.loops) / len(self.loops) if self.loops else float("nan")

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second after the first one; None when there is no other."""
        rest = self.seconds - self.prompt_seconds
        return (len(self.tokens) - 1) / rest if len(self.tokens) > 1 and rest > 0 else None


@dataclass(frozen=True, kw_only=True)
class Emission:
    """One token as it leaves, for those who watch."""

    token: int
    loops: int
    logprob: float
    text: str | None = None
    """What this token adds to the answer's text (nothing in the middle of a character); None without a tokenizer."""
    tops: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens of its readout and their log-probabilities, where they were asked for."""
    signals: tuple[float, ...] = ()
    """The model's signal (a hazard) after each loop of its row, where it was asked for."""
    index: int = 0
    """Its place in the answer, from 0."""
    provisional: bool = False
    """Whether it is a draft, which another token may still replace at this place."""

    def with_text(self, text: str) -> "Emission":
        """The same with its text; `dataclasses.replace` would take several times as long."""
        return Emission(
            token=self.token,
            loops=self.loops,
            logprob=self.logprob,
            text=text,
            tops=self.tops,
            signals=self.signals,
            index=self.index,
            provisional=self.provisional,
        )


class Answer:
    """Takes confirmed tokens one by one; says which of them may be given out, and when it is over.

    Args:
        room: tokens it may have, at most `sampling.max_tokens`; fewer when the context is full before.
        ends: token ids that end it.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        sampling: Sampling,
        *,
        room: int,
        ends: Sequence[int],
        tokenizer: Tokenizer | None,
        sample: int = 0,
    ) -> None:
        self.prompt = prompt
        self.made: list[Emission] = []
        """Every token so far, without text."""
        self.over = False
        """Whether no token follows."""
        self.reason = "abort"
        self.prompt_loops: tuple[int, ...] = ()
        """Loops of each position of the prompt, where prompts obey the exit rule."""
        self.kv_bytes = 0
        """Bytes of keys and values held at the end."""
        self._sampling = sampling
        self._tokenizer = tokenizer
        self.room = room
        self.ends = frozenset(ends)
        self.sample = sample
        self._stream = None if tokenizer is None else TextStream(tokenizer, sampling.stop)
        self._texts: list[str] = []

    @classmethod
    def of(
        cls, model: LoopedLM, prompt: tuple[int, ...], sampling: Sampling, *, room: int, sample: int = 0
    ) -> "Answer":
        """An answer in this model's tokens, ended by its end-of-text tokens unless `sampling` ignores them."""
        ends = () if sampling.ignore_eos or model.tokenizer is None else model.tokenizer.stop_ids
        return cls(prompt, sampling, room=room, ends=ends, tokenizer=model.tokenizer, sample=sample)

    def take(self, emission: Emission) -> list[Emission]:
        """The tokens whose text the newest one makes certain; sets `over` after the last."""
        self.made.append(emission)
        ended = emission.token in self.ends
        self.over = ended or len(self.made) == self.room
        if self.over:
            full = "length" if self.room == self._sampling.max_tokens else "context"
            self.reason = "stop" if ended else full
        if self._stream is None:
            return [emission]
        texts = self._stream.push(None if ended else emission.token, last=self.over)
        if self._stream.stopped:
            self.reason, self.over = "stop", True
        first = len(self._texts)
        self._texts += texts
        if len(texts) == 1 and len(self._texts) == len(self.made):
            return [emission.with_text(texts[0])]
        return _with_texts(self.made[first:], texts)

    def guess(self, token: int, *, loops: int, logprob: float, position: int) -> Emission:
        """A draft of the token at a position, as it is told to those who asked for drafts."""
        text = None if self._tokenizer is None else self._tokenizer.pieces([token])[0]
        index = position - len(self.prompt)
        return Emission(token=token, loops=loops, logprob=logprob, text=text, index=index, provisional=True)

    @property
    def held(self) -> list[Emission]:
        """Tokens not given out, because a stop text might have begun in them; empty once all has ended."""
        return [] if self._stream is None else self.rest(len(self._texts))

    def rest(self, first: int) -> list[Emission]:
        """The tokens from the one at `first` on, those that were not given out included."""
        if self._stream is None:
            return self.made[first:]
        return _with_texts(self.made[first:], (self._texts + self._stream.held)[first:])

    def completion(self, *, seconds: float, prompt_seconds: float) -> Completion:
        """What there is so far."""
        made = tuple(self.made)  # once, since another thread may add to it meanwhile
        return Completion(
            prompt=self.prompt,
            tokens=tuple(one.token for one in made),
            text=None if self._stream is None else "".join(self._texts + self._stream.held),
            loops=tuple(one.loops for one in made),
            logprobs=tuple(one.logprob for one in made),
            tops=tuple(one.tops for one in made),
            signals=tuple(one.signals for one in made),
            prompt_loops=self.prompt_loops,
            finish_reason=self.reason,
            kv_bytes=self.kv_bytes,
            sample=self.sample,
            seconds=seconds,
            prompt_seconds=prompt_seconds,
        )


def _with_texts(made: Sequence[Emission], texts: Sequence[str]) -> list[Emission]:
    return [emission.with_text(text) for emission, text in zip(made, texts, strict=False)]
