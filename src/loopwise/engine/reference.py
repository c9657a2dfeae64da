"""The readable generator: one sequence at a time, one token at a time, one loop at a time.

Every faster engine has to give its tokens, loops and log-probabilities. Exits are real here: under `last_exited` a
token that stops does not run its remaining loops.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.engine.answer import Answer, Completion, Emission
from loopwise.engine.checks import Checked, check_sampling, encode_prompt
from loopwise.engine.depth import PromptDepth
from loopwise.engine.sampling import Sampling, choose, likeliest, log_probability
from loopwise.loops.drivers import check_loops
from loopwise.loops.exits import Budget, ExitRule, Observation
from loopwise.memory.dense import DenseMemory, DensePolicy
from loopwise.models.looped_lm import LMContext, LoopedLM
from loopwise.nn.rotary import Rotary


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
    prompt_depth: PromptDepth = "full"
    prompt_loops: list[int] = field(default_factory=list)
    """Loops of each prompt position, where prompts obey the exit rule."""
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

    def prefill(self, prompt: Sequence[int]) -> tuple[Float[Tensor, " vocab"], int]:
        """The readout of the prompt's last row, and the loops that it ran."""
        if self.prompt_depth == "exit":
            for position, token in enumerate(prompt):
                hidden, loop = self.run(token, position)
                self.prompt_loops.append(loop)
            return self._head(hidden), loop
        # Every loop, in lock-step.
        context = self.encode(torch.tensor(prompt, device=self.positions.device), 0)
        state = self.model.initial_state(context, self.sampling.start)
        for loop in range(1, self.max_loops + 1):
            state = self.model.step(state, context, loop)
        # The whole prompt goes through the coda, which keeps keys and values too; only one row needs the head.
        hidden = self.model.read(state, context)
        return self._head(hidden), self.max_loops

    def _head(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, " vocab"]:
        return torch.nn.functional.linear(hidden[-1], self.model.head_weight)

    def decode(self, token: int, position: int) -> tuple[Float[Tensor, " vocab"], int]:
        """One generated row: its readout at the loop where the rule stops it, and that loop."""
        hidden, loop = self.run(token, position)
        return self._head(hidden), loop

    def run(self, token: int, position: int) -> tuple[Float[Tensor, "1 width"], int]:
        """One row: what the head is to read, from the loop where the rule stops it, and that loop."""
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
        hidden = model.read(state, context)
        if self.policy == "per_loop":
            for loop in range(exit_loop + 1, self.max_loops + 1):
                state = model.step(state, context, loop)
        else:
            self.memory.settle(position, exit_loop)
        return hidden, exit_loop

    def _allowance(self, device: torch.device) -> Tensor | None:
        if not isinstance(self.rule, Budget):
            return None
        return self.rule.allowance(self.rows, torch.tensor([float(self.spent)], device=device))


class Generation:
    """One answer as it grows, token by token. Made by `stream`; iterate over it once.

    A token is given out as soon as its text is certain: at once, unless its end may be the beginning of a stop text.
    Who stops early, be it by an interrupt, finds what there is in `completion` and `held`.
    """

    def __init__(self, sequence: _Sequence, answer: Answer) -> None:
        self._sequence = sequence
        self._answer = answer
        self._prompt_seconds = 0.0
        self._seconds = 0.0
        self.prompt = answer.prompt
        self.rule = sequence.rule
        self.policy: str = sequence.policy
        self.max_loops = sequence.max_loops

    def __iter__(self) -> Iterator[Emission]:
        while not self._answer.over:
            yield from self._answer.take(self._next())

    @torch.inference_mode()
    def _next(self) -> Emission:
        """Run one more row, or at first the prompt, and choose the token that follows."""
        began = time.perf_counter()
        sequence, made = self._sequence, self._answer.made
        tokens = [*self.prompt, *(emission.token for emission in made)]
        if made:
            logits, loop = sequence.decode(tokens[-1], len(tokens) - 1)
        else:
            logits, loop = sequence.prefill(self.prompt)
            self._answer.prompt_loops = tuple(sequence.prompt_loops)
        token = choose(logits, sequence.sampling, position=len(tokens), sample=self._answer.sample, seen=tokens)
        emission = Emission(
            token=token,
            loops=loop,
            logprob=log_probability(logits, token),
            tops=likeliest(logits, sequence.sampling.logprobs),
            index=len(made),
        )
        took = time.perf_counter() - began
        self._seconds += took
        if not made:
            self._prompt_seconds = took
        return emission

    @property
    def held(self) -> list[Emission]:
        """Tokens that were not given out, because a stop text might have begun in them; empty once all has ended."""
        return self._answer.held

    @property
    def completion(self) -> Completion:
        """What there is so far."""
        self._answer.kv_bytes = self._sequence.memory.nbytes
        return self._answer.completion(seconds=self._seconds, prompt_seconds=self._prompt_seconds)


def stream(
    model: LoopedLM,
    prompt: str | Sequence[int],
    sampling: Sampling | None = None,
    *,
    policy: str | None = None,
    prompt_depth: str = "full",
    sample: int = 0,
) -> Generation:
    """Answer one prompt token by token; see `generate` for the arguments and errors.

    Args:
        sample: which of several answers to the same prompt this is; each draws its own noise.
    """
    sampling = sampling or Sampling()
    checked = check_sampling(model, sampling, policy=policy, prompt_depth=prompt_depth)
    check_loops(model, checked.max_loops)
    return _begin(model, encode_prompt(model, prompt), sampling, checked, sample)


def generate(
    model: LoopedLM,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling | None = None,
    *,
    policy: str | None = None,
    prompt_depth: str = "full",
    watch: Callable[[Emission], None] | None = None,
) -> list[Completion]:
    """Answer prompts one after the other; several answers (`sampling.n`) to one prompt stand side by side.

    Args:
        prompts: texts, or token ids.
        policy: "per_loop" (stopped tokens fill their remaining planes: the authors' numbers) or "last_exited"
            (they do not: work is saved). None takes "last_exited" when there is an exit rule.
        prompt_depth: "full" (prompts run every loop) or "exit" (a prompt's positions stop where the rule stops them).
        watch: called with each token as it leaves.

    Raises:
        ConfigError: for a rule that this model cannot serve, an unknown policy, or what is no language model.
        InputError: for an empty prompt, one longer than the context, ids outside the vocabulary, or text or stop
            strings without a tokenizer.
    """
    sampling = sampling or Sampling()
    checked = check_sampling(model, sampling, policy=policy, prompt_depth=prompt_depth)
    check_loops(model, checked.max_loops)
    done: list[Completion] = []
    for ids in [encode_prompt(model, prompt) for prompt in prompts]:
        for sample in range(sampling.n):
            generation = _begin(model, ids, sampling, checked, sample)
            for emission in generation:
                if watch is not None:
                    watch(emission)
            done.append(generation.completion)
    return done


def _begin(model: LoopedLM, prompt: tuple[int, ...], sampling: Sampling, checked: Checked, sample: int) -> Generation:
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
        checked.prompt_depth,
    )
    return Generation(sequence, Answer.of(model, prompt, sampling, room=room, sample=sample))
