"""The readable generator: one sequence at a time, one token at a time, one loop at a time.

Every faster engine has to give its tokens, loops and log-probabilities. Exits are real here: under `last_exited` a
token that stops does not run its remaining loops.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.engine.sampling import Sampling, choose, log_probability
from loopwise.engine.text import TextStream
from loopwise.errors import ConfigError, InputError
from loopwise.loops.drivers import bind_rule, check_loops
from loopwise.loops.exits import Budget, ExitRule, Observation
from loopwise.memory.dense import DenseMemory, DensePolicy, check_policy
from loopwise.models.looped_lm import LMContext, LoopedLM
from loopwise.nn.rotary import Rotary


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


@dataclass
class _Sequence:
    """A sequence in progress."""

    model: LoopedLM
    sampling: Sampling
    rule: ExitRule
    policy: DensePolicy
    max_loops: int
    memory: DenseMemory
    positions: Int[Tensor, " capacity"]
    rotary: Rotary
    """Tables of all positions that there is room for."""
    spent: int = 0
    """Loops run by generated rows, for budget rules."""
    rows: int = 0
    """Generated rows begun, for budget rules."""
    tokens: list[int] = field(default_factory=list)

    def encode(self, tokens: Int[Tensor, " rows"], first: int) -> LMContext:
        rows = slice(first, first + len(tokens))
        positions = self.memory.positions = self.positions[rows]
        return self.model.encode(
            tokens,
            positions=positions,
            rotary=Rotary(*(table[rows] for table in self.rotary)),
            memory=self.memory,
        )

    def prefill(self, prompt: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Prompt rows run every loop, in lock-step; the readout of the last one."""
        context = self.encode(torch.tensor(prompt, device=self.positions.device), 0)
        state = self.model.initial_state(context, self.sampling.start)
        for loop in range(1, self.max_loops + 1):
            state = self.model.step(state, context, loop)
        # The whole prompt goes through the coda, which keeps keys and values too; only one row needs the head.
        hidden = self.model.read(state, context)
        return torch.nn.functional.linear(hidden[-1], self.model.head_weight)

    def decode(self, token: int, position: int) -> tuple[Float[Tensor, " vocab"], int]:
        """One generated row: its readout at the loop where the rule stops it, and that loop."""
        model, rule = self.model, self.rule
        context = self.encode(torch.full((1,), token, device=self.positions.device), position)
        state = model.initial_state(context, self.sampling.start)
        tracker = rule.track(1, state.device)
        self.rows += 1
        for exit_loop in range(1, self.max_loops + 1):
            previous, state = state, model.step(state, context, exit_loop)
            self.spent += 1
            if exit_loop == self.max_loops:
                break  # nothing is left to decide
            prediction = model.readout(state, context) if "logits" in rule.needs else None
            observation = Observation(
                loop=exit_loop,
                state=state,
                previous=previous,
                signal=model.signal(state, prediction) if "signal" in rule.needs else None,
                logits=prediction,
                allowance=self._allowance(state.device),
            )
            if bool(tracker.update(observation)) and exit_loop >= self.sampling.min_loops:
                break
        # The coda keeps keys and values too: a position's last readout is that of its exit.
        logits = model.readout(state, context)[0]
        if self.policy == "per_loop":
            for loop in range(exit_loop + 1, self.max_loops + 1):
                state = model.step(state, context, loop)
        else:
            self.memory.settle(position, exit_loop)
        return logits, exit_loop

    def _allowance(self, device: torch.device) -> Tensor | None:
        if not isinstance(self.rule, Budget):
            return None
        return self.rule.allowance(self.rows, torch.tensor([float(self.spent)], device=device))


class Generation:
    """One answer as it grows, token by token. Made by `stream`; iterate over it once.

    A token is given out as soon as its text is certain: at once, unless its end may be the beginning of a stop text.
    Who stops early, be it by an interrupt, finds what there is in `completion` and `held`.
    """

    def __init__(
        self, sequence: _Sequence, prompt: tuple[int, ...], *, room: int, sample: int, ends: Sequence[int]
    ) -> None:
        self._sequence = sequence
        self._room = room
        self._sample = sample
        self._ends = ends
        tokenizer = sequence.model.tokenizer
        self._stream = None if tokenizer is None else TextStream(tokenizer, sequence.sampling.stop)
        self._made: list[Emission] = []
        """Every token so far, without text."""
        self._texts: list[str] = []
        """Texts of the tokens that were given out."""
        self._reason = "abort"
        self._prompt_seconds = 0.0
        self._seconds = 0.0
        self.prompt = prompt
        self.rule = sequence.rule
        self.policy: str = sequence.policy
        self.max_loops = sequence.max_loops

    def __iter__(self) -> Iterator[Emission]:
        ended = False
        while not ended:
            token = self._next()
            certain, ended = self._take(token)
            yield from certain

    @torch.inference_mode()
    def _next(self) -> int:
        """Run one more row, or at first the prompt, and choose the token that follows."""
        began = time.perf_counter()
        position = len(self.prompt) + len(self._made)
        if self._made:
            logits, loop = self._sequence.decode(self._made[-1].token, position - 1)
        else:
            logits, loop = self._sequence.prefill(self.prompt), self.max_loops
        token = choose(logits, self._sequence.sampling, position=position, sample=self._sample)
        made = Emission(token=token, loops=loop, logprob=log_probability(logits, token))
        took = time.perf_counter() - began
        self._seconds += took
        if not self._made:
            self._prompt_seconds = took
        self._made.append(made)
        return token

    def _take(self, token: int) -> tuple[list[Emission], bool]:
        """The tokens whose text the newest one makes certain, and whether it is the last."""
        over = token in self._ends
        last = over or len(self._made) == self._room
        if last:
            self._reason = (
                "stop" if over else "length" if self._room == self._sequence.sampling.max_tokens else "context"
            )
        if self._stream is None:
            return [self._made[-1]], last
        texts = self._stream.push(None if over else token, last=last)
        if self._stream.stopped:
            self._reason = "stop"
        first = len(self._texts)
        self._texts += texts
        return _with_texts(self._made[first:], texts), last or self._stream.stopped

    @property
    def held(self) -> list[Emission]:
        """Tokens that were not given out, because a stop text might have begun in them; empty once all has ended."""
        return [] if self._stream is None else _with_texts(self._made[len(self._texts) :], self._stream.held)

    @property
    def completion(self) -> Completion:
        """What there is so far."""
        return Completion(
            prompt=self.prompt,
            tokens=tuple(made.token for made in self._made),
            text=None if self._stream is None else "".join(self._texts + self._stream.held),
            loops=tuple(made.loops for made in self._made),
            logprobs=tuple(made.logprob for made in self._made),
            finish_reason=self._reason,
            kv_bytes=self._sequence.memory.nbytes,
            sample=self._sample,
            seconds=self._seconds,
            prompt_seconds=self._prompt_seconds,
        )


def _with_texts(made: Sequence[Emission], texts: Sequence[str]) -> list[Emission]:
    return [replace(emission, text=text) for emission, text in zip(made, texts, strict=False)]


def stream(
    model: LoopedLM,
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    policy: str | None = None,
    sample: int = 0,
) -> Generation:
    """Answer one prompt token by token; see `generate` for the arguments and errors.

    Args:
        sample: which of several answers to the same prompt this is; each draws its own noise.
    """
    sampling = sampling or Sampling()
    check_loops(model, sampling.max_loops or model.config.loops)
    return _begin(model, encode_prompt(model, prompt), sampling, policy, sample)


def generate(
    model: LoopedLM,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling | None = None,
    *,
    policy: str | None = None,
    samples: int = 1,
    watch: Callable[[Emission], None] | None = None,
) -> list[Completion]:
    """Answer prompts one after the other.

    Args:
        prompts: texts, or token ids.
        policy: "per_loop" (stopped tokens fill their remaining planes: the authors' numbers) or "last_exited"
            (they do not: work is saved). None takes "last_exited" when there is an exit rule.
        samples: answers to each prompt; they stand side by side in the result.
        watch: called with each token as it leaves.

    Raises:
        ConfigError: for a rule that this model cannot serve, or an unknown policy.
        InputError: for an empty prompt, one longer than the context, ids outside the vocabulary, or text or stop
            strings without a tokenizer.
    """
    if samples < 1:
        raise ConfigError(f"samples={samples}: allowed is 1 or more")
    sampling = sampling or Sampling()
    check_loops(model, sampling.max_loops or model.config.loops)
    done: list[Completion] = []
    for ids in [encode_prompt(model, prompt) for prompt in prompts]:
        for sample in range(samples):
            generation = _begin(model, ids, sampling, policy, sample)
            for emission in generation:
                if watch is not None:
                    watch(emission)
            done.append(generation.completion)
    return done


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Settings that this model can serve, with every default filled in."""

    rule: ExitRule
    policy: DensePolicy
    max_loops: int


def check_sampling(model: LoopedLM, sampling: Sampling, *, policy: str | None = None) -> Checked:
    """See whether this model can serve these settings; nothing is run.

    Raises:
        ConfigError, InputError: as `generate` would.
    """
    max_loops = sampling.max_loops or model.config.loops
    if sampling.min_loops > max_loops:
        raise ConfigError(f"min_loops={sampling.min_loops}: allowed is 1 to max_loops={max_loops}")
    if sampling.stop and model.tokenizer is None:
        raise InputError(f"stop={sampling.stop} is text, but this checkpoint has no tokenizer.json; leave it out")
    return Checked(
        rule=bind_rule(model, sampling.exit or f"fixed:{max_loops}", sequential=True),
        policy=check_policy(policy or ("last_exited" if sampling.exit else "per_loop")),
        max_loops=max_loops,
    )


def _begin(model: LoopedLM, prompt: tuple[int, ...], sampling: Sampling, policy: str | None, sample: int) -> Generation:
    checked = check_sampling(model, sampling, policy=policy)
    room = min(sampling.max_tokens, model.config.max_positions - len(prompt))
    capacity = len(prompt) + room
    memory = DenseMemory(loops=checked.max_loops, capacity=capacity)
    positions = torch.arange(capacity, device=model.embed.weight.device)
    sequence = _Sequence(
        model,
        sampling,
        checked.rule,
        checked.policy,
        checked.max_loops,
        memory,
        positions,
        model.rotary(positions),
    )
    ends = () if sampling.ignore_eos or model.tokenizer is None else model.tokenizer.stop_ids
    return Generation(sequence, prompt, room=room, sample=sample, ends=ends)


def encode_prompt(model: LoopedLM, prompt: str | Sequence[int]) -> tuple[int, ...]:
    """A prompt as token ids that this model can read, with room for an answer.

    Raises:
        InputError: empty, too long, text without a tokenizer, or ids outside the vocabulary.
    """
    if not isinstance(prompt, str):
        ids = tuple(prompt)
    elif model.tokenizer is None:
        raise InputError("the prompt is text, but this checkpoint has no tokenizer.json; give token ids")
    else:
        ids = tuple(model.tokenizer.encode(prompt, add_special=True))
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    wrong = [token for token in ids if not 0 <= token < model.config.vocab_size]
    if wrong:
        raise InputError(
            f"token id {wrong[0]} is not in the model's vocabulary; ids run from 0 to {model.config.vocab_size - 1}"
        )
    if len(ids) >= model.config.max_positions:
        raise InputError(
            f"the prompt has {len(ids)} tokens; the context holds {model.config.max_positions}, one of them for the "
            "answer: shorten the prompt"
        )
    return ids
