"""What the engine carries: a request, its prompt chunk, and its rows in flight.

A row is one position on its way through the loops. A request has one when nothing is speculated and nothing is
filled; otherwise its rows stand in order of position:

    [filling ...] [frontier] [draft] [draft] ...

The *frontier* is the first row whose answer has not left for good. Rows before it have answered and run on to fill
their planes; rows after it were started from drafts and count only once the token they were started from is confirmed.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.engine.answer import Answer
from loopwise.engine.sampling import Sampling
from loopwise.errors import InputError
from loopwise.loops.exits import Budget, ExitRule, Tracker
from loopwise.memory.paged import PageList
from loopwise.memory.snapshot import Snapshot

_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A recorded answer to follow: its tokens, its loops, or both. For measurements and tests."""

    tokens: tuple[int, ...] | None = None
    """Token ids to emit, whatever the model would have chosen."""
    loops: tuple[int, ...] | None = None
    """Loops of the row that emits each token; the first is the prompt's own number."""
    prompt_loops: tuple[int, ...] | None = None
    """Loops of each prompt position, where prompts obey the exit rule; the last is the first of `loops`."""


class Choice(NamedTuple):
    """A token read out of a row."""

    token: int
    logprob: float
    tops: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, where they were asked for."""


@dataclass(slots=True, eq=False)
class Row:
    """One position in flight."""

    position: int
    token: int
    seat: int = -1
    """Where its state lies, once it has one."""
    started: bool = False
    """Whether embeddings and prelude have run."""
    loop: int = 0
    """Loops that have run."""
    left: int = 0
    """The loop after which it stopped; 0 while that is open."""
    planned: int = 0
    """The loop after which it will stop, where that is known before it runs; -1 where its rule is asked, 0 before its
    first loop."""
    asked: bool = False
    """Whether it was read from the first draft loop on."""
    spare: Choice | None = None
    """The readout at its exit, when that is known before the row is confirmed."""
    left_state: Float[Tensor, " width"] | None = None
    """The state it stopped at, kept while it runs on before that state was read for good."""
    signals: list[float] = field(default_factory=list)
    """The model's signal after each of its loops, where it was asked for."""
    survival: float = 1.0
    """The chance of having gone on so far, by its hazards, where its rule is Q-exit."""
    watched: bool = False
    """Whether its exit rule already keeps memory of it."""
    launched: int = -1
    """Its place in the present launch."""


@dataclass(slots=True, eq=False)
class Chunk:
    """Prompt positions that go through the loops in lock-step."""

    first: int
    last: int
    loop: int = 0
    state: Float[Tensor, "rows width"] | None = None
    """None until embeddings and prelude have run."""
    before: Float[Tensor, "rows width"] | None = None
    """The state before the loop that has run last."""
    injected: Float[Tensor, "rows width"] | None = None
    signals: list[float] = field(default_factory=list)
    """The model's signal at the last position after each loop, where it was asked for."""
    positions: Int[np.ndarray, " rows"] = field(init=False)
    """Those that still run."""
    exits: "Exits | None" = None
    """Who has stopped, where prompts obey the exit rule."""

    def __post_init__(self) -> None:
        self.positions = np.arange(self.first, self.last + 1)

    @property
    def rows(self) -> int:
        """How many run."""
        return len(self.positions)


@dataclass(slots=True, eq=False)
class Exits:
    """Which of a chunk's positions have stopped, counted from the chunk's first."""

    left: Int[np.ndarray, " chunk"]
    """The loop after which each stopped; 0 while that is open."""
    open: Int[np.ndarray, " open"]
    """Those that have not."""
    state: Float[Tensor, "chunk width"]
    """The state at which each stopped."""
    tracker: Tracker | None
    """The rule's memory of those that have not; None where the loops are known beforehand."""
    planned: Int[np.ndarray, " chunk"]
    """The loop after which each is to stop, where that is known; the most loops otherwise."""


class Stage(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


@dataclass(eq=False, kw_only=True)
class Request:
    """One prompt on its way to one answer."""

    prompt: tuple[int, ...]
    sampling: Sampling
    rule: ExitRule
    max_loops: int
    answer: Answer
    drafts: bool = False
    """Whether its positions may be started from drafts."""
    provisional: bool = False
    """Whether drafts are told too."""
    signals: bool = False
    """Whether the model's signal after each loop is told."""
    replay: Replay | None = None
    solo: bool | None = None
    """Whether it can run many ticks in one call when it is alone (`engine/solo.py`); None until asked."""
    number: int = field(default_factory=lambda: next(_numbers))
    """Rises with every request: who came first."""

    identity: object = None
    """What its prompt's numbers depend on beside its tokens, when it was let in."""
    stage: Stage = Stage.WAITING
    pages: PageList | None = None
    snapshot: Snapshot | None = None
    """What it will come back with, after it had to step aside."""
    cursor: int = 0
    """Prompt positions that are settled."""
    chunk: Chunk | None = None
    tokens: list[int] = field(default_factory=list)
    """Prompt and confirmed answer."""
    left: list[int] = field(default_factory=list)
    """The loop after which each position of `tokens` stopped, as far as that is certain."""
    flight: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def prompt_done(self) -> bool:
        return self.cursor == len(self.prompt)

    @property
    def last_row(self) -> int:
        """The last position that may run: it emits the answer's last token."""
        return len(self.prompt) + self.answer.room - 2

    @property
    def settled(self) -> int:
        """Leading positions that have written all they will ever write."""
        if self.flight:
            return min(self.flight[0].position, len(self.left))
        return self.cursor if not self.prompt_done else len(self.left)

    @property
    def frontier(self) -> int:
        """Index in `flight` of the first row whose answer is not certain; the number of filling rows."""
        return max(0, len(self.left) - self.flight[0].position) if self.flight else 0

    def seen(self, position: int) -> Sequence[int]:
        """Every token up to a position, drafts included, for penalties."""
        if self.sampling.repetition_penalty == 1.0:
            return ()
        rows = [row.token for row in self.flight if len(self.tokens) <= row.position <= position]
        return [*self.tokens[: position + 1], *rows]

    def forced_loops(self, position: int) -> int | None:
        """Loops that the recorded answer gives the row at this position."""
        if self.replay is None or self.replay.loops is None:
            return None
        if position < len(self.prompt):
            return None if self.replay.prompt_loops is None else self.replay.prompt_loops[position]
        return self.replay.loops[position - len(self.prompt) + 1]

    def forced_token(self, position: int) -> int | None:
        """The recorded token at this position."""
        if self.replay is None or self.replay.tokens is None:
            return None
        return self.replay.tokens[position - len(self.prompt)]

    def allowance(self, row: Row) -> float | None:
        """Loops that a budget still grants this row; None without a budget."""
        if not isinstance(self.rule, Budget):
            return None
        begun = row.position - len(self.prompt) + 1
        spent = sum(self.left[len(self.prompt) : row.position]) + row.loop
        return self.rule.mean * begun - spent


def check_replay(
    replay: Replay | None, room: int, max_loops: int, vocab_size: int, *, prompt: int, exits: bool
) -> None:
    """Refuse a recording that does not fit the request.

    Args:
        prompt: how many tokens the prompt has.
        exits: whether its positions obey the exit rule.

    Raises:
        InputError: too few tokens or loops, or some out of range.
    """
    if replay is None:
        return
    for name, numbers in (("tokens", replay.tokens), ("loops", replay.loops)):
        if numbers is not None and len(numbers) < room:
            raise InputError(f"replay has {len(numbers)} {name}, the answer may have {room} tokens; give as many")
    if replay.tokens is not None and not all(0 <= token < vocab_size for token in replay.tokens):
        raise InputError(f"replay.tokens hold an id outside the vocabulary; ids run from 0 to {vocab_size - 1}")
    for name, numbers in (("loops", replay.loops), ("prompt_loops", replay.prompt_loops)):
        if numbers and not 1 <= min(numbers) <= max(numbers) <= max_loops:
            raise InputError(f"replay.{name} run from {min(numbers)} to {max(numbers)}; allowed are 1 to {max_loops}")
    if (replay.prompt_loops is not None) != (exits and replay.loops is not None):
        raise InputError(
            "replay.prompt_loops goes with replay.loops where prompts obey the exit rule; give it there "
            '(Engine(..., prompt_depth="exit")) and leave it out elsewhere'
        )
    if replay.prompt_loops is not None and replay.loops is not None:
        told = (len(replay.prompt_loops), replay.prompt_loops[-1:])
        if told != (prompt, replay.loops[:1]):
            raise InputError(
                f"replay.prompt_loops has {told[0]} numbers for a prompt of {prompt} tokens and ends with "
                f"{list(told[1])}, replay.loops begins with {list(replay.loops[:1])}; give one for each prompt token, "
                "the last being the first of replay.loops"
            )
