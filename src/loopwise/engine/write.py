"""Answers for whoever has a model and a prompt: `loopwise.generate`, `loopwise generate` and `loopwise chat`.

An engine made for the occasion writes them, long answers with drafts where they pay. The readable generator
(`reference.py`) has the same tokens, loops and log-probabilities up to rounding; it writes a single answer where an
engine is slower, which is where the kernels of few rows are missing (no C++ compiler, an accelerator, bfloat16): there
it is the engine's many small operations that take the time, and several answers at once make up for them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from loopwise.engine import reference
from loopwise.engine.answer import Completion, Emission
from loopwise.engine.checks import Checked, check_sampling, encode_prompt
from loopwise.engine.depth import PromptDepth
from loopwise.engine.engine import Engine
from loopwise.engine.layout import layout_of
from loopwise.engine.sampling import Sampling
from loopwise.engine.ticket import Ticket
from loopwise.errors import InputError
from loopwise.loops.drivers import check_loops
from loopwise.loops.exits import ExitRule
from loopwise.loops.planes import PlanePolicy, parse_policy
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.kernels.rows import load_row_kernels

SEATS = 64
"""Answers that are written at once, at most."""
DRAFTED = 32
"""Tokens from which on an answer is long enough for drafts: their start-up takes the time of some five tokens."""
CROWD = 8
"""Answers at once beyond which drafts are not tried: rows of the others fill the ticks."""
MEMORY = 2**32
"""Bytes of keys and values of many answers together; a single one may have more."""


@runtime_checkable
class Writing(Protocol):
    """One answer as it grows: iterate over it once. Who breaks off finds what there is in `completion` and `held`."""

    prompt: tuple[int, ...]
    rule: ExitRule
    policy: str
    max_loops: int

    def __iter__(self) -> Iterator[Emission]: ...

    @property
    def held(self) -> list[Emission]:
        """Tokens that were chosen and not given out."""
        ...

    @property
    def completion(self) -> Completion:
        """What there is so far; its times leave out what was done between two tokens."""
        ...


class Writer:
    """Writes one answer after the other with one model.

    Its engine stays, so what a prompt has in common with an earlier one is not read again.
    """

    def __init__(self, model: LoopedLM) -> None:
        self.model = model
        self._engine: Engine | None = None

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        policy: str | None = None,
        prompt_depth: str = "full",
        sample: int = 0,
    ) -> Writing:
        """Answer a prompt token by token; see `generate` for the arguments and errors.

        Args:
            sample: which of several answers to the same prompt this is; each draws its own noise.
        """
        model, sampling = self.model, replace(sampling or Sampling(), n=1)
        checked = check_sampling(model, sampling, policy=policy, prompt_depth=prompt_depth)
        check_loops(model, checked.max_loops)
        ids = encode_prompt(model, prompt)
        if not engine_pays(model, answers=1):
            return reference.stream(model, ids, sampling, policy=policy, prompt_depth=prompt_depth, sample=sample)
        engine = self._engine_for(checked, parse_policy(checked.policy), len(ids), sampling.max_tokens)
        return _EngineWriting(engine, engine.submit(ids, sampling, sample=sample), checked)

    def _engine_for(self, checked: Checked, policy: PlanePolicy, prompt: int, answer: int) -> Engine:
        """The engine of the last answer, or another where that one cannot write this one."""
        engine = self._engine
        loops = checked.max_loops if engine is None else max(checked.max_loops, engine.max_loops)
        needed = _bytes_for(self.model, policy, loops, [prompt + answer])
        wanted = (policy, loops, checked.prompt_depth)
        fits = engine is not None and (engine.policy, engine.max_loops, engine.prompt_depth) == wanted
        fits = fits and engine is not None and engine.budget >= needed
        if engine is None or not fits or engine.failed:
            # Twice of it: the next turn of a conversation is longer.
            engine = _engine(
                *(self.model, policy, loops),
                memory=2 * needed,
                seats=1,
                shares=True,
                tokens=answer,
                prompt_depth=checked.prompt_depth,
            )
            self._engine = engine
        return engine


class _EngineWriting:
    """A `Writing` by an engine."""

    def __init__(self, engine: Engine, ticket: Ticket, checked: Checked) -> None:
        self.prompt = ticket.prompt
        self.rule = checked.rule
        self.policy: str = checked.policy
        self.max_loops = checked.max_loops
        self._engine = engine
        self._ticket = ticket
        self._given = 0
        self._seconds = 0.0
        self._prompt_seconds = 0.0

    def __iter__(self) -> Iterator[Emission]:
        emissions = iter(self._ticket)
        while True:
            began = time.perf_counter()
            emission = next(emissions, None)
            self._seconds += time.perf_counter() - began
            if emission is None:
                return
            if not self._given:
                self._prompt_seconds = self._seconds
            self._given += 1
            yield emission

    @property
    def held(self) -> list[Emission]:
        return self._ticket.rest(self._given)

    @property
    def completion(self) -> Completion:
        return replace(
            self._ticket.completion,
            seconds=self._seconds,
            prompt_seconds=self._prompt_seconds,
            kv_bytes=self._engine.kv_bytes(self._ticket),
        )


def generate(
    model: LoopedLM,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling | None = None,
    *,
    policy: str | None = None,
    prompt_depth: str = "full",
    watch: Callable[[Emission], None] | None = None,
) -> list[Completion]:
    """Answer prompts, all of them together; several answers (`sampling.n`) to one prompt stand side by side.

    Args:
        prompts: texts, or token ids.
        policy: "per_loop" (stopped tokens fill their remaining planes: the authors' numbers) or "last_exited"
            (they do not: work is saved). None takes "last_exited" when there is an exit rule.
        prompt_depth: "full" (prompts run every loop) or "exit" (a prompt's positions stop where the rule stops them).
        watch: called with each token, answer by answer, in order.

    Raises:
        ConfigError: for a rule that this model cannot serve, or an unknown policy.
        InputError: for an empty prompt, one longer than the context, ids outside the vocabulary, or text or stop
            strings without a tokenizer.
    """
    if isinstance(prompts, str):
        raise InputError("prompts is one text; give a list of them: generate(model, [text])")
    sampling = sampling or Sampling()
    checked = check_sampling(model, sampling, policy=policy, prompt_depth=prompt_depth)
    ids = [encode_prompt(model, prompt) for prompt in prompts]
    answers = len(ids) * sampling.n
    if not answers:
        return []
    if not engine_pays(model, answers=answers):
        return reference.generate(model, ids, sampling, policy=policy, prompt_depth=prompt_depth, watch=watch)
    check_loops(model, checked.max_loops)
    planes = parse_policy(checked.policy)
    lengths = [len(prompt) + sampling.max_tokens for prompt in ids for _ in range(sampling.n)]
    longest = _bytes_for(model, planes, checked.max_loops, [max(lengths)])
    needed = _bytes_for(model, planes, checked.max_loops, lengths)
    engine = _engine(
        *(model, planes, checked.max_loops),
        memory=max(longest, min(needed, MEMORY)),
        seats=min(answers, SEATS),
        shares=answers > 1,
        tokens=sampling.max_tokens,
        prompt_depth=checked.prompt_depth,
    )
    one = replace(sampling, n=1)
    tickets = [engine.submit(prompt, one, sample=sample) for prompt in ids for sample in range(sampling.n)]
    if watch is not None:
        for ticket in tickets:
            for emission in ticket:
                watch(emission)
    return [ticket.wait() for ticket in tickets]


def engine_pays(model: LoopedLM, *, answers: int) -> bool:
    """Whether an engine writes so many answers at once faster than the readable generator does one by one."""
    weight = model.embed.weight
    return answers > 1 or (weight.device.type == "cpu" and weight.dtype in load_row_kernels())


def _engine(
    model: LoopedLM,
    policy: PlanePolicy,
    loops: int,
    *,
    memory: int,
    seats: int,
    shares: bool,
    tokens: int,
    prompt_depth: PromptDepth = "full",
) -> Engine:
    return Engine(
        *(model, policy),
        speculate="auto" if tokens >= DRAFTED and seats <= CROWD else "off",
        memory=memory,
        prefix_cache=shares,
        seats=seats,
        max_loops=loops,
        prompt_depth=prompt_depth,
    )


def _bytes_for(model: LoopedLM, policy: PlanePolicy, loops: int, lengths: Sequence[int]) -> int:
    """Bytes of keys and values of sequences that run at once, with the page that each of them will soon want."""
    layout = layout_of(model)
    longest = model.config.max_positions
    pages = sum(-(-min(length, longest) // layout.page) + 1 for length in lengths)
    return pages * layout.group_bytes(len(policy.stored(loops, generated=False)))
