"""Pointer chasing against a brute-force reader of its display text."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.pointer_chasing import PointerChasing, PointerChasingConfig


@st.composite
def tasks(draw: st.DrawFn) -> PointerChasing:
    nodes = draw(st.integers(2, 9))
    table = draw(st.sampled_from(["cycle", "permutation"]))
    return PointerChasing(
        PointerChasingConfig(
            nodes=nodes,
            max_hops=draw(st.integers(1, nodes - 1 if table == "cycle" else 6)),
            questions=draw(st.integers(1, 5)),
            table=table,
            layout=draw(st.sampled_from(["edges", "pairs"])),
        )
    )


def read(text: str) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """Successors and (hops, start) of each question, from the text a person sees."""
    words = text.replace("→ ", "→").split()
    edges = dict(map(int, word.split("→")) for word in words if "→" in word)
    rest = [word for word in words if "→" not in word]
    return edges, [(int(rest[i]), int(rest[i + 3])) for i in range(0, len(rest), 4)]


@given(task=tasks(), seed=st.integers(0, 2**40), index=st.integers(0, 2**40))
def test_answers_are_what_a_reader_of_the_text_finds(task: PointerChasing, seed: int, index: int) -> None:
    sample = task.sample(seed, index)
    tokens = sample.tokens[0].tolist()
    assert len(tokens) == task.length
    edges, questions = read(task.text(tokens))
    assert sorted(edges) == sorted(edges.values()) == list(range(task.config.nodes))
    asked = sample.hops[0].nonzero()[:, 0].tolist()
    assert len(asked) == len(questions) == task.config.questions
    assert asked[-1] == task.length - 1
    for place, (hops, start) in zip(asked, questions, strict=True):
        node = start
        for _ in range(hops):
            node = edges[node]
        assert sample.hops[0, place] == hops <= task.config.max_hops
        assert sample.answers[0, place] == node
        prompt = tokens[: place + 1]
        assert [answer for answer in range(task.config.nodes) if task.verify(prompt, answer)] == [node]
    assert not sample.answers[sample.hops == 0].any()
    if task.config.table == "cycle":
        seen = [0]
        while edges[seen[-1]] != 0:
            seen.append(edges[seen[-1]])
        assert len(seen) == task.config.nodes


@given(task=tasks(), seed=st.integers(0, 99), indices=st.lists(st.integers(0, 2**30), min_size=1, max_size=5))
def test_a_row_depends_on_its_own_number_alone(task: PointerChasing, seed: int, indices: list[int]) -> None:
    together = task.generate(seed, torch.tensor(indices))
    for row, index in enumerate(indices):
        alone = task.sample(seed, index)
        assert torch.equal(together.tokens[row], alone.tokens[0])
        assert torch.equal(together.answers[row], alone.answers[0])
        assert torch.equal(together.hops[row], alone.hops[0])


@pytest.mark.parametrize("layout", ["edges", "pairs"])
def test_questions_are_spread_evenly_and_tables_differ(layout: str) -> None:
    task = PointerChasing(PointerChasingConfig(nodes=6, max_hops=3, questions=4, layout=layout))
    sample = task.generate(1, torch.arange(3000))
    assert len({tuple(row) for row in sample.tokens.tolist()}) == 3000
    assert int(sample.tokens.max()) < task.vocab_size
    assert len(sample.tokens[:, : task.table_length].unique()) == (30 if layout == "edges" else 12)
    asked = sample.hops > 0
    # Six standard deviations of a fair draw of 12,000.
    for counts, share in [
        (sample.hops[asked].bincount()[1:], 1 / 3),
        (sample.answers[asked].bincount(), 1 / 6),
        (sample.tokens[asked].bincount(), 1 / 6),
    ]:
        assert (counts / 12_000 - share).abs().max() < 6 * (share * (1 - share) / 12_000) ** 0.5


def test_no_two_hop_counts_share_an_answer_on_a_cycle() -> None:
    task = PointerChasing(PointerChasingConfig(nodes=5, max_hops=4, questions=1))
    tokens = task.sample(0, 0).tokens[0].tolist()
    start = tokens[-1]
    answers = [task.solve([*tokens[:-2], 5 + hop - 1, start]) for hop in range(1, 5)]
    assert len({start, *answers}) == 5


def test_text_is_readable() -> None:
    task = PointerChasing(PointerChasingConfig(nodes=3, max_hops=2, questions=1))
    assert task.text([5 + 0 * 3 + 2, 5 + 2 * 3 + 1, 5 + 1 * 3 + 0, 4, 0]) == "0→2 2→1 1→0 2 hops from 0"
    assert task.solve([7, 12, 8, 4, 0]) == 1
    assert task.pieces([3]) == ["1 hop from"]
    with pytest.raises(InputError, match="from 0 to 13"):
        task.pieces([14])


@pytest.mark.parametrize(
    "prompt",
    [[7, 12, 8, 4], [7, 12, 8, 4, 0, 4], [7, 7, 8, 4, 0], [7, 12, 8, 0, 0], [7, 12, 8, 4, 9], [0, 12, 8, 4, 0]],
)
def test_what_is_no_question_is_refused(prompt: list[int]) -> None:
    task = PointerChasing(PointerChasingConfig(nodes=3, max_hops=2, questions=1))
    with pytest.raises(InputError, match="prompt"):
        task.verify(prompt, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 1}, "at least 2 nodes"),
        ({"max_hops": 0}, "at least 2 nodes"),
        ({"nodes": 4, "max_hops": 4}, "give max_hops below 4"),
        ({"table": "tree"}, "give cycle or permutation"),
        ({"layout": "matrix"}, "give edges or pairs"),
    ],
)
def test_impossible_tasks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PointerChasingConfig(**options)
