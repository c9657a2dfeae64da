"""Reachability against a matrix closure, from the text a person sees."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.problems import IGNORED, numbers
from loopwise.tasks.reachability import UNREACHED, Reachability, ReachabilityConfig


@st.composite
def tasks(draw: st.DrawFn) -> Reachability:
    longest = draw(st.integers(1, 6))
    return Reachability(
        ReachabilityConfig(
            longest=longest,
            shortest=draw(st.integers(1, longest)),
            nodes=draw(st.integers(longest + longest // 2 + 2, 16)),
            layout=draw(st.sampled_from(["edges", "pairs"])),
            asked=draw(st.sampled_from(["goal", "end"])),
        )
    )


@given(task=tasks(), seed=st.integers(0, 2**40), number=st.integers(0, 2**40))
def test_answers_are_those_of_the_closure(task: Reachability, seed: int, number: int) -> None:
    nodes, problems = task.config.nodes, task.draw(seed, torch.tensor([number]))
    tokens, targets = problems.inputs[0].tolist(), problems.targets[0]
    assert len(tokens) == task.length
    assert max(tokens) < task.vocab_size
    words = task.text(tokens).split()
    edges, question = words[:nodes], words[nodes:]
    step = np.zeros((nodes, nodes), dtype=bool)
    starts = []
    for edge in edges:
        start, end = map(int, edge.split("→"))
        step[start, end] = True
        starts.append(start)
    # Warshall's closure, and distances by powers of the matrix: a walk of k edges is there for the first time.
    distances, walk = np.full((nodes, nodes), UNREACHED), np.eye(nodes, dtype=bool)
    for length in range(nodes):
        distances[walk & (distances == UNREACHED)] = length
        walk = walk.astype(int) @ step > 0
    asked = targets != IGNORED
    depth = int(problems.difficulty)
    assert task.config.shortest <= depth <= task.config.longest
    found = task.distances(problems.inputs)[0]
    assert bool((found[~asked] == IGNORED).all())
    sinks = [node for node in range(nodes) if step[node, node]]
    ends = [next(sink for sink in sinks if distances[start, sink] != UNREACHED) for start in starts]
    to_end = [int(distances[start, end]) for start, end in zip(starts, ends, strict=True)]
    # Chains: as many nodes one step further from an end as there are chains that long, the longest of D edges.
    assert len(set(ends)) == to_end.count(0)
    assert max(to_end) == depth
    assert step.sum(1).tolist() == [1] * nodes
    assert max(step.sum(0) - step.diagonal()) <= 1
    if task.config.asked == "end":
        assert question == ["where", "do", "they", "end?"]
        assert targets[asked].tolist() == ends
        assert found[asked].tolist() == to_end
        return
    goal = int(question[2].strip("?"))
    assert targets[asked].tolist() == [int(distances[start, goal] != UNREACHED) for start in starts]
    assert found[asked].tolist() == distances[starts, goal].tolist()
    assert sorted(distance for distance in found[asked].tolist() if distance != UNREACHED) == list(range(depth + 1))


def test_every_depth_comes_up_and_a_problem_depends_on_its_number_alone() -> None:
    task = Reachability(ReachabilityConfig(nodes=12, longest=4))
    whole = task.draw(0, numbers(0, 200))
    assert set(whole.difficulty.tolist()) == {1, 2, 3, 4}
    part = task.draw(0, torch.tensor([7, 2]))
    assert torch.equal(part.inputs, whole.inputs[[7, 2]])
    assert task.verify(whole, whole.targets).all()
    flipped = torch.where(whole.targets == IGNORED, IGNORED, 1 - whole.targets)
    assert not task.verify(whole, flipped).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": 13}, "a chain of 8 edges and one of 4 need 14 nodes and there are 13"),
        ({"shortest": 9}, "give shortest from 1 to 8"),
        ({"shortest": 0}, "give shortest from 1 to 8"),
        ({"layout": "matrix"}, "give edges or pairs"),
        ({"asked": "start"}, "give goal or end"),
    ],
)
def test_graphs_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ReachabilityConfig(**settings)


def test_rows_that_are_no_graph_are_refused() -> None:
    task = Reachability(ReachabilityConfig(nodes=4, longest=1, layout="edges"))
    row = task.draw(0, numbers(0, 1)).inputs[0].tolist()
    for broken in ([], row[:-1], [row[0], *row[:-2], row[-1]], [999, *row[1:]]):
        with pytest.raises(InputError, match="not one edge from each of 4 nodes"):
            task.read(broken)
    with pytest.raises(InputError, match="give one of 20 to 24"):
        task.read([*row[:-1], 0])
    # 0 to 1 to 2 to 0, and 3 to itself.
    with pytest.raises(InputError, match="round in a circle"):
        task.read([4 + 1, 8 + 2, 12 + 0, 16 + 3, 20])
