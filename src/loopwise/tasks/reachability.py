"""Graph reachability: which nodes of a directed graph reach a goal, a question whose depth is a distance.

A graph is a set of edges, and so is a row: reading is the same in any order, and every token may look at every other
one (`train.tasks.whole_sequence`). A chase along the edges needs as many loops as the distance to the goal; pointer
doubling, in which every edge replaces its end by the end of its end, needs log2 of it. One looped layer can do either
(Ouro, arXiv 2510.25741, section 6, for the log2 claim; Sanford et al. 2402.09268 for doubling in transformers).

The nodes fall into chains: each has one edge out, to the next node of its chain, and the last one an edge to itself.
One chain has D edges; the others take 0 to D edges each, as long as there are nodes left. The goal is the end of the
chain of D edges, so the D + 1 nodes of it reach the goal, at distances 0..D, and no others do. Token ids, with
nodes a and b of N:

    a              `pairs`: the first token of the edge from a
    N + b          `pairs`: its second token, the edge's end
    N + a*N + b    `edges`: the edge from a to b in one token
    goal + t       "which reach node t", the last token; goal is 2*N for `pairs` and N + N*N for `edges`
    goal + N       "where do they end", in its place

What is asked at each edge's (last) token is whether its start reaches the goal, 1 or 0; or, which says the same of
every goal at once and teaches more, the node 0..N-1 at which the walk from its start ends. The difficulty is D, the
largest distance in the graph: the diameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.problems import IGNORED, ExactTask, Problems, generator

UNREACHED = -1
"""The distance of a node that never arrives."""


@dataclass(frozen=True, kw_only=True)
class ReachabilityConfig:
    """The size and shape of the task."""

    nodes: int = 18
    """N, nodes of every graph."""
    longest: int = 8
    """Largest D; it must leave room for a second chain of half as many edges."""
    shortest: int = 1
    """Smallest D; each number from here to `longest` is equally likely."""
    layout: str = "pairs"
    """How an edge is written: `edges`, one token; or `pairs`, two of a smaller vocabulary, which a layer before the
    loops must first bring together."""
    asked: str = "goal"
    """`goal`: whether each node reaches the goal. `end`: where each node's walk ends."""

    def __post_init__(self) -> None:
        if self.asked not in ("goal", "end"):
            raise ConfigError(f"asked={self.asked!r} is unknown; give goal or end")
        if self.layout not in ("edges", "pairs"):
            raise ConfigError(f"layout={self.layout!r} is unknown; give edges or pairs")
        if not 1 <= self.shortest <= self.longest:
            raise ConfigError(
                f"shortest={self.shortest} with longest={self.longest}; give shortest from 1 to {max(1, self.longest)}"
            )
        needed = self.longest + 1 + self.longest // 2 + 1
        if needed > self.nodes:
            raise ConfigError(
                f"a chain of {self.longest} edges and one of {self.longest // 2} need {needed} nodes and there are "
                f"{self.nodes}; give more nodes or a smaller longest"
            )


class Reachability(ExactTask):
    """The task: its tokens, its problems, and the truth about them."""

    def __init__(self, config: ReachabilityConfig) -> None:
        self.config = config
        self.first_goal = config.nodes * (1 + (config.nodes if config.layout == "edges" else 1))
        self.vocab_size = self.first_goal + config.nodes + 1
        self.edge_tokens = 1 if config.layout == "edges" else 2
        self.length = config.nodes * self.edge_tokens + 1
        """Tokens of a row."""

    def draw(self, seed: int, numbers: Int[Tensor, " problems"]) -> Problems:
        nodes, config = self.config.nodes, self.config
        rows = np.empty((len(numbers), self.length), dtype=np.int64)
        targets = np.full_like(rows, IGNORED)
        depths = np.empty(len(numbers), dtype=np.int64)
        for row, number in enumerate(numbers.tolist()):
            random = generator(seed, "reachability", number)
            depth = int(random.integers(config.shortest, config.longest + 1))
            labels = random.permutation(nodes)
            successor, ends = np.arange(nodes), np.arange(nodes)
            first, edges = 0, depth
            while first < nodes:
                chain = labels[first : first + edges + 1]
                successor[chain[:-1]], ends[chain] = chain[1:], chain[-1]
                first += len(chain)
                edges = int(random.integers(0, depth + 1))
            goal = ends[labels[0]]
            starts = random.permutation(nodes)
            rows[row, :-1] = self._edges(starts, successor[starts])
            asks_goal = config.asked == "goal"
            rows[row, -1] = self.first_goal + (goal if asks_goal else nodes)
            answers = ends[starts] == goal if asks_goal else ends[starts]
            targets[row, self.edge_tokens - 1 : -1 : self.edge_tokens] = answers
            depths[row] = depth
        return Problems(
            inputs=torch.from_numpy(rows), targets=torch.from_numpy(targets), difficulty=torch.from_numpy(depths)
        )

    def _edges(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        if self.config.layout == "edges":
            return np.asarray(self.config.nodes * (1 + starts) + ends)
        return np.stack((starts, self.config.nodes + ends), axis=1).reshape(-1)

    def distances(self, inputs: Int[Tensor, "problems places"]) -> Int[Tensor, "problems places"]:
        """Edges from each edge's start to the goal, or to the end of its walk where that is asked, at the places that
        are asked: `UNREACHED` if it never arrives, `IGNORED` at other places. Found by walking along the row's edges.

        Raises:
            InputError: a row is not such a graph.
        """
        found = torch.full_like(inputs, IGNORED)
        for row, tokens in enumerate(inputs.tolist()):
            starts, successor, goal = self.read(tokens)
            for edge, node in enumerate(starts):
                steps = 0
                while successor[node] != node and node != goal:
                    node = successor[node]
                    steps += 1
                place = (edge + 1) * self.edge_tokens - 1
                found[row, place] = steps if goal is None or node == goal else UNREACHED
        return found

    def read(self, tokens: Sequence[int]) -> tuple[list[int], dict[int, int], int | None]:
        """The starts of a row's edges in their order, every node's successor, and the goal; None where ends are asked.

        Raises:
            InputError: the row is not such a graph.
        """
        nodes = self.config.nodes
        edges, goal = tokens[:-1], tokens[-1] - self.first_goal if tokens else -1
        if self.config.layout == "edges":
            pairs = [divmod(token - nodes, nodes) for token in edges]
        else:
            pairs = [(start, end - nodes) for start, end in zip(edges[::2], edges[1::2], strict=False)]
        successor = dict(pairs)
        whole = set(range(nodes))
        if len(tokens) != self.length or set(successor) != whole or not whole.issuperset(successor.values()):
            raise InputError(
                f"these {len(tokens)} tokens are not one edge from each of {nodes} nodes and a goal; "
                "make a row with Reachability.draw"
            )
        if _has_cycle(successor):
            raise InputError("the edges go round in a circle, so that some walks never end; only self-loops may")
        if goal not in {*whole, nodes}:
            raise InputError(f"the last token asks nothing; give one of {self.first_goal} to {self.vocab_size - 1}")
        return [start for start, _ in pairs], successor, None if goal == nodes else goal

    def text(self, tokens: Sequence[int]) -> str:
        """A row for people: `4→7 0→0 … which reach 7?`. Raises as `read` does."""
        starts, successor, goal = self.read(tokens)
        question = "where do they end?" if goal is None else f"which reach {goal}?"
        return " ".join([*(f"{start}→{successor[start]}" for start in starts), question])


def _has_cycle(successor: dict[int, int]) -> bool:
    """Whether a walk ever comes back to a node other than by an edge from it to itself."""
    ended: set[int] = set()
    for node in successor:
        path = set()
        while node not in ended and node not in path:
            path.add(node)
            if successor[node] == node:
                break
            node = successor[node]
        else:
            if node in path:
                return True
        ended |= path
    return False
