"""The readable generator: one sequence at a time, one token at a time, one loop at a time.

Every faster engine has to give its tokens, loops and log-probabilities. Exits are real here: under `last_exited` a
token that stops does not run its remaining loops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from loopwise.engine.sampling import Sampling, choose, log_probability
from loopwise.errors import ConfigError, InputError
from loopwise.loops.drivers import bind_rule, check_loops
from loopwise.loops.exits import Budget, ExitRule, Observation
from loopwise.memory.dense import DenseMemory, DensePolicy, check_policy
from loopwise.models.looped_lm import LMContext, LoopedLM


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one prompt was answered with."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """Generated token ids, the end-of-text token included."""
    text: str | None
    """Decoded text without stop strings; None when the model has no tokenizer."""
    loops: tuple[int, ...]
    """Loops of the row that emitted each token, that is of the position before it."""
    logprobs: tuple[float, ...]
    """Log-probability of each token in nats, at the loop it left, before temperature and filters."""
    finish_reason: str
    """"stop" (end of text or a stop string), "length" (max_tokens) or "context" (no room left)."""
    kv_bytes: int
    """Bytes of keys and values held at the end."""

    @property
    def mean_loops(self) -> float:
        return sum(self.loops) / len(self.loops)


@dataclass(frozen=True, kw_only=True)
class Emission:
    """One token as it leaves, for those who watch."""

    token: int
    loops: int
    logprob: float


@dataclass
class _Sequence:
    """A sequence in progress."""

    model: LoopedLM
    sampling: Sampling
    rule: ExitRule
    policy: DensePolicy
    max_loops: int
    memory: DenseMemory
    spent: int = 0
    """Loops run by generated rows, for budget rules."""
    rows: int = 0
    """Generated rows begun, for budget rules."""
    tokens: list[int] = field(default_factory=list)

    def encode(self, tokens: Sequence[int], first: int) -> LMContext:
        device = self.model.embed.weight.device
        positions = torch.arange(first, first + len(tokens))
        self.memory.positions = positions.to(device)
        inputs = torch.tensor(list(tokens), device=device)
        return self.model.encode(inputs, positions=self.memory.positions, memory=self.memory)

    def prefill(self, prompt: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Prompt rows run every loop, in lock-step; the readout of the last one."""
        context = self.encode(prompt, 0)
        state = self.model.initial_state(context, self.sampling.start)
        for loop in range(1, self.max_loops + 1):
            state = self.model.step(state, context, loop)
        # The whole prompt goes through the coda, which keeps keys and values too; only one row needs the head.
        hidden = self.model.read(state, context)
        return torch.nn.functional.linear(hidden[-1], self.model.head_weight)

    def decode(self, token: int, position: int) -> tuple[Float[Tensor, " vocab"], int]:
        """One generated row: its readout at the loop where the rule stops it, and that loop."""
        model, rule = self.model, self.rule
        context = self.encode([token], position)
        state = model.initial_state(context, self.sampling.start)
        tracker = rule.track(1, state.device)
        self.rows += 1
        exit_loop, exit_state = self.max_loops, state
        for loop in range(1, self.max_loops + 1):
            previous = state
            state = model.step(state, context, loop)
            self.spent += 1
            prediction = model.readout(state, context) if "logits" in rule.needs else None
            observation = Observation(
                loop=loop,
                state=state,
                previous=previous,
                signal=model.signal(state, prediction) if "signal" in rule.needs else None,
                logits=prediction,
                allowance=self._allowance(state.device),
            )
            fired = bool(tracker.update(observation))
            if (fired and loop >= self.sampling.min_loops) or loop == self.max_loops:
                exit_loop, exit_state = loop, state
                break
        if self.policy == "per_loop":
            for loop in range(exit_loop + 1, self.max_loops + 1):
                state = model.step(state, context, loop)
        else:
            self.memory.settle(position, exit_loop)
        # Last, so that the coda's keys and values of this position are those of its exit.
        return model.readout(exit_state, context)[0], exit_loop

    def _allowance(self, device: torch.device) -> Tensor | None:
        if not isinstance(self.rule, Budget):
            return None
        return self.rule.allowance(self.rows, torch.tensor([float(self.spent)], device=device))


@torch.no_grad()
def generate(
    model: LoopedLM,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling | None = None,
    *,
    policy: str | None = None,
    watch: Callable[[Emission], None] | None = None,
) -> list[Completion]:
    """Answer prompts one after the other.

    Args:
        prompts: texts, or token ids.
        policy: "per_loop" (stopped tokens fill their remaining planes: the authors' numbers) or "last_exited"
            (they do not: work is saved). None takes "last_exited" when there is an exit rule.
        watch: called with each token as it leaves.

    Raises:
        ConfigError: for a rule that this model cannot serve, or an unknown policy.
        InputError: for an empty prompt, one longer than the context, or text or stop strings without a tokenizer.
    """
    sampling = sampling or Sampling()
    max_loops = sampling.max_loops or model.config.loops
    check_loops(model, max_loops)
    if sampling.min_loops > max_loops:
        raise ConfigError(f"min_loops={sampling.min_loops}: allowed is 1 to max_loops={max_loops}")
    if sampling.stop and model.tokenizer is None:
        raise InputError(f"stop={sampling.stop} is text, but this checkpoint has no tokenizer.json; leave it out")
    rule = bind_rule(model, sampling.exit or f"fixed:{max_loops}", sequential=True)
    chosen = check_policy(policy or ("last_exited" if sampling.exit else "per_loop"))
    return [_complete(model, _ids(model, prompt), sampling, rule, chosen, max_loops, watch) for prompt in prompts]


def _ids(model: LoopedLM, prompt: str | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        ids = tuple(prompt)
    elif model.tokenizer is None:
        raise InputError("the prompt is text, but this checkpoint has no tokenizer.json; give token ids")
    else:
        ids = tuple(model.tokenizer.encode(prompt))
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    if len(ids) >= model.config.max_positions:
        raise InputError(
            f"the prompt has {len(ids)} tokens; the context holds {model.config.max_positions}, one of them for the "
            "answer: shorten the prompt"
        )
    return ids


def _complete(
    model: LoopedLM,
    prompt: tuple[int, ...],
    sampling: Sampling,
    rule: ExitRule,
    policy: DensePolicy,
    max_loops: int,
    watch: Callable[[Emission], None] | None,
) -> Completion:
    room = min(sampling.max_tokens, model.config.max_positions - len(prompt))
    memory = DenseMemory(loops=max_loops, capacity=len(prompt) + room)
    sequence = _Sequence(model, sampling, rule, policy, max_loops, memory)
    ends = () if sampling.ignore_eos or model.tokenizer is None else model.tokenizer.stop_ids
    logits, loop = sequence.prefill(prompt), max_loops
    tokens: list[int] = []
    loops: list[int] = []
    logprobs: list[float] = []
    text: str | None = None
    reason = "length" if room == sampling.max_tokens else "context"
    while True:
        token = choose(logits, sampling, position=len(prompt) + len(tokens))
        tokens.append(token)
        loops.append(loop)
        logprobs.append(log_probability(logits, token))
        if watch is not None:
            watch(Emission(token=token, loops=loop, logprob=logprobs[-1]))
        if token in ends:
            reason = "stop"
            break
        if sampling.stop and model.tokenizer is not None:
            text = model.tokenizer.decode(tokens)
            found = [text.index(stop) for stop in sampling.stop if stop in text]
            if found:
                text, reason = text[: min(found)], "stop"
                break
        if len(tokens) == room:
            break
        logits, loop = sequence.decode(token, len(prompt) + len(tokens) - 1)
    if model.tokenizer is not None and not (sampling.stop and reason == "stop" and token not in ends):
        text = model.tokenizer.decode(tokens[:-1] if token in ends else tokens)
    return Completion(
        prompt=prompt,
        tokens=tuple(tokens),
        text=text,
        loops=tuple(loops),
        logprobs=tuple(logprobs),
        finish_reason=reason,
        kv_bytes=memory.nbytes,
    )
