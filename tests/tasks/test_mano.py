"""Mano against Python's own arithmetic, and against the distribution of its source."""

import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.mano import Mano, ManoConfig
from loopwise.tasks.problems import IGNORED, numbers


def infix(words: list[str]) -> tuple[str, list[str]]:
    """The first whole expression of some words in prefix form as Python source, and the words after it."""
    word, *rest = words
    if word not in "+-*":
        return word, rest
    left, rest = infix(rest)
    right, rest = infix(rest)
    return f"({left} {word} {right})", rest


tasks = st.builds(
    lambda modulus, most, least, asked: Mano(
        ManoConfig(modulus=modulus, operations=most, shortest=min(least, most), asked=asked)
    ),
    st.integers(2, 23),
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from(["answer", "parts"]),
)


@given(task=tasks, seed=st.integers(0, 2**40), number=st.integers(0, 2**40))
def test_answers_are_what_python_finds(task: Mano, seed: int, number: int) -> None:
    problems = task.draw(seed, torch.tensor([number]))
    tokens, targets = problems.inputs[0].tolist(), problems.targets[0].tolist()
    operations = int(problems.difficulty)
    assert len(tokens) == task.length
    assert task.config.shortest <= operations <= task.config.operations
    length, *words, equals = task.text(tokens).split()
    assert (length, equals) == (f"<{operations}>", "=")
    source, rest = infix(words)
    assert rest == []
    assert len(words) == 2 * operations + 1
    end = tokens.index(task.equals)
    assert targets[end] == eval(source) % task.config.modulus == task.solve(tokens[2:end])
    asked = [place for place, target in enumerate(targets) if target != IGNORED]
    if task.config.asked == "answer":
        assert asked == [end]
        return
    # The largest part that ends at a token: of all parts that end there, the one that begins first.
    for place in range(2, end):
        parts = []
        for first in range(place, 1, -1):
            try:
                source, rest = infix(words[first - 2 : place - 1])
            except ValueError:
                continue
            if not rest:
                parts.append(eval(source) % task.config.modulus)
        assert targets[place] == (parts[-1] if parts else IGNORED)


def test_a_worked_example() -> None:
    task = Mano(ManoConfig(modulus=23, operations=3))
    plus, minus, times = 23, 24, 25
    # (17 * 2) - (4 + 15) = 34 - 19 = 15.
    assert task.solve([minus, times, 17, 2, plus, 4, 15]) == 15
    assert task.parts([minus, times, 17, 2, plus, 4, 15]) == [IGNORED, IGNORED, 17, 11, IGNORED, 4, 15]
    assert task.solve([minus, 3, 5]) == 21


def test_lengths_operators_splits_and_leaves_are_uniform() -> None:
    task = Mano(ManoConfig(modulus=5, operations=4))
    problems = task.draw(0, numbers(0, 4000))
    lengths = Counter(problems.difficulty.tolist())
    expressions = [
        row[2 : row.index(task.equals)]
        for row, count in zip(problems.inputs.tolist(), problems.difficulty, strict=True)
        if count == 4
    ]
    roots = Counter(expression[0] for expression in expressions)
    last = Counter(expression[-1] for expression in expressions)
    lefts = Counter(_operations_left(task, expression) for expression in expressions)
    for counts, kinds in ((lengths, 4), (roots, 3), (last, 5), (lefts, 4)):
        total = sum(counts.values())
        assert len(counts) == kinds
        # Five standard deviations of a share of 1 / kinds.
        slack = 5 * math.sqrt((1 / kinds) * (1 - 1 / kinds) / total)
        assert all(abs(count / total - 1 / kinds) < slack for count in counts.values())


def _operations_left(task: Mano, expression: list[int]) -> int:
    """Operations in the left side of the root."""
    open_ends = 1
    for place, token in enumerate(expression[1:], start=1):
        open_ends += 1 if token >= task.config.modulus else -1
        if open_ends == 0:
            return (place - 1) // 2
    raise AssertionError


def test_a_problem_depends_on_its_seed_and_number_alone() -> None:
    task = Mano(ManoConfig())
    whole = task.draw(3, numbers(0, 6))
    part = task.draw(3, torch.tensor([4, 1]))
    assert torch.equal(part.inputs, whole.inputs[[4, 1]])
    assert torch.equal(part.targets, whole.targets[[4, 1]])
    assert not torch.equal(task.draw(4, numbers(0, 6)).inputs, whole.inputs)


def test_the_verifier_looks_at_what_is_asked() -> None:
    task = Mano(ManoConfig(modulus=7, operations=2))
    problems = task.draw(0, numbers(0, 8))
    answers = torch.where(problems.targets == IGNORED, 99, problems.targets)
    assert task.verify(problems, answers).all()
    wrong = torch.where(problems.targets == IGNORED, 99, (problems.targets + 1) % 7)
    assert not task.verify(problems, wrong).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modulus": 1}, "modulus=1"),
        ({"operations": 0}, "shortest=1 and operations=0"),
        ({"shortest": 11}, "shortest=11 and operations=10"),
        ({"asked": "all"}, "give answer or parts"),
    ],
)
def test_sizes_that_ask_nothing_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ManoConfig(**settings)


@pytest.mark.parametrize("tokens", [[], [23, 1], [1, 2], [23, 1, 2, 3], [26], [1, 23, 2]])
def test_what_is_no_expression_is_refused(tokens: list[int]) -> None:
    with pytest.raises(InputError, match="not one prefix expression"):
        Mano(ManoConfig()).solve(tokens)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    task = Mano(ManoConfig(modulus=5, operations=2))
    with pytest.raises(InputError, match="ids run from 0 to 12"):
        task.text([13])
