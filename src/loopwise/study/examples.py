"""What a study asks: batches of problems with their answers, whatever kind of model answers them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int, Real
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.hub.tokenizer import Tokenizer
from loopwise.loops.protocol import tree_map
from loopwise.nn.noise import integer
from loopwise.tasks.corpus import Corpus
from loopwise.tasks.pointer_chasing import PointerChasing
from loopwise.tasks.problems import IGNORED, Task

_BATCH = 2048
"""Tokens read together."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A batch of N problems."""

    inputs: Any
    """What the model's `encode` takes, N leading."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `encode`."""
    targets: Int[Tensor, "problems *places"]
    """The right class at each place, `IGNORED` where nothing is asked."""
    difficulty: Real[Tensor, "problems *at"] | None = None
    """Of each problem, or of each of its places; None where nobody knows."""
    verify: Callable[[Tensor], Bool[Tensor, " problems"]] | None = None
    """Whether whole answers (problems, *places) are right; None compares them with the targets."""
    read: Callable[[Tensor], Tensor] | None = None
    """Brings the model's prediction into the shape (problems, *places, classes), where it has another."""

    def __len__(self) -> int:
        return len(self.targets)


def of_task(
    task: Task, *, seed: int, count: int, rows: int = 256, read: Callable[[Tensor], Tensor] | None = None
) -> list[Examples]:
    """The first `count` problems of a task under a seed, in batches of at most `rows`."""
    if count < 1 or rows < 1:
        raise ConfigError(f"count={count}, rows={rows}: allowed is 1 or more")
    found = []
    for first in range(0, count, rows):
        problems = task.draw(seed, torch.arange(first, min(first + rows, count)))

        def verify(answers: Tensor, problems: Any = problems) -> Tensor:
            return task.verify(problems, answers)

        found.append(
            Examples(
                inputs=problems.inputs,
                targets=problems.targets,
                difficulty=problems.difficulty,
                verify=verify,
                read=read,
            )
        )
    return found


def of_pointer_chasing(task: PointerChasing, *, seed: int, units: int) -> list[Examples]:
    """At least `units` questions; the difficulty is the hops."""
    rows = -(-units // task.config.questions)
    per_batch = max(1, _BATCH // task.length)
    found = []
    for part in torch.split(torch.arange(rows), per_batch):
        drawn = task.generate(integer(seed, "study pointer chasing"), part)
        asked = drawn.hops > 0
        found.append(
            Examples(
                inputs=drawn.tokens,
                targets=torch.where(asked, drawn.answers, IGNORED),
                difficulty=drawn.hops,
            )
        )
    return found


def of_text(
    corpus: Corpus, tokenizer: Tokenizer, *, units: int, length: int, most_documents: int | None = None
) -> list[Examples]:
    """Held-out text: at least `units` next tokens in rows of `length`, a row within one document.

    A document begins as in training, with the beginning-of-text token (or end-of-text, where there is no other).

    Args:
        length: tokens that a row reads.
        most_documents: read at most so many rows of one document, so that the rows are of many.

    Raises:
        InputError: the held-out part of the corpus is too short.
    """
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    before = [] if first is None else [first]
    rows: list[list[int]] = []
    wanted = -(-units // length)
    for text in corpus.part("validation"):
        ids = before + tokenizer.encode(text[: 16 * length * (most_documents or 2**20)])
        pieces = [ids[start : start + length + 1] for start in range(0, len(ids) - length, length)]
        rows += pieces[: most_documents or len(pieces)]
        if len(rows) >= wanted:
            break
    if len(rows) < wanted:
        raise InputError(
            f"the held-out part of {corpus.spec!r} makes {len(rows)} rows of {length} tokens, {wanted} are needed; "
            f"give fewer units, a shorter length, or more text"
        )
    table = torch.tensor(rows[:wanted])
    return [
        Examples(inputs=part[:, :-1].contiguous(), targets=part[:, 1:].contiguous())
        for part in torch.split(table, max(1, _BATCH // length))
    ]


def head(examples: Examples, rows: int) -> Examples:
    """The first rows of a batch."""
    if rows >= len(examples):
        return examples
    whole, verify = len(examples), examples.verify

    def first(answers: Tensor) -> Tensor:
        assert verify is not None
        # The verifier knows the whole batch: rows that were cut off are asked about the last answer there is.
        return verify(answers[torch.arange(whole).clamp(max=rows - 1)])[:rows]

    return replace(
        examples,
        inputs=tree_map(lambda tensor: tensor[:rows], examples.inputs),
        options=tree_map(lambda tensor: tensor[:rows], dict(examples.options)),
        targets=examples.targets[:rows],
        difficulty=None if examples.difficulty is None else examples.difficulty[:rows],
        verify=None if verify is None else first,
    )


def count_units(data: Sequence[Examples]) -> int:
    """Places that are asked, over all batches."""
    return sum(int((examples.targets != IGNORED).sum()) for examples in data)
