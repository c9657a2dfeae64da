"""Pointer chasing: how far a model can follow a table by thinking in loops.

A prompt lists a successor for each of N nodes, in random order, and then asks: which node is k hops from this one?
One hop is one lookup, so one loop can do one hop and k hops need k loops, while a model without loops needs k
layers (Depo in Physics of Language Models 4; p-hop induction in Saunshi et al. 2502.17416). The table is new in each
prompt, so nothing can be learned by heart.

A sequence holds one table and then Q independent questions, so that one table teaches Q times:

    edges (default):  4→7 0→2 … 7→1   3 hops from, 4   1 hop from, 0   …
    pairs:            4→ 7 0→ 2 … 7→ 1   3 hops from, 4   1 hop from, 0   …

The answer is read at the question's last token, the start node; no answer stands in the sequence, so no question
helps with another. Token ids, with nodes a and b counted from 0 and hops k from 1:

    a                  a node: a start or an answer; in `pairs` the end of an edge too
    N + k - 1          "k hops from"
    N + K + a*N + b    `edges`: the whole edge a→b in one token
    N + K + a          `pairs`: "a→", followed by the node b

Start and answer share their ids on purpose: with tied embeddings, a lookup then leaves in the state just what the
next lookup starts from, and the second hop costs nothing more to learn. In `edges` one attention layer does a hop.
`pairs` is the harder task: a layer before the loops must first bring each edge's two tokens together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.nn.noise import uniform


@dataclass(frozen=True, kw_only=True)
class PointerChasingConfig:
    """The size and shape of the task."""

    nodes: int = 10
    """N, nodes in the table."""
    max_hops: int = 4
    """K; a question asks for 1 to K hops, each equally often."""
    questions: int = 8
    """Q, questions after each table."""
    table: str = "cycle"
    """`cycle`: one cycle through all nodes, so that no two hop counts below N share an answer. `permutation`: any
    permutation, where short cycles come back early."""
    layout: str = "edges"
    """How an edge is written: one token, or two."""

    def __post_init__(self) -> None:
        if self.nodes < 2 or self.max_hops < 1 or self.questions < 1:
            raise ConfigError(
                f"pointer chasing with nodes={self.nodes}, max_hops={self.max_hops}, questions={self.questions} asks "
                "nothing; give at least 2 nodes, 1 hop and 1 question"
            )
        if self.table not in ("cycle", "permutation"):
            raise ConfigError(f"table={self.table!r} is unknown; give cycle or permutation")
        if self.layout not in ("edges", "pairs"):
            raise ConfigError(f"layout={self.layout!r} is unknown; give edges or pairs")
        if self.table == "cycle" and self.max_hops >= self.nodes:
            raise ConfigError(
                f"max_hops={self.max_hops} goes all the way round a cycle of {self.nodes} nodes; "
                f"give max_hops below {self.nodes}, or table=permutation"
            )


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Sequences with their answers."""

    tokens: Int[Tensor, "rows tokens"]
    """Token ids."""
    answers: Int[Tensor, "rows tokens"]
    """The right node where a question ends, 0 elsewhere."""
    hops: Int[Tensor, "rows tokens"]
    """The difficulty: hops asked for where a question ends, 0 elsewhere."""


class PointerChasing:
    """The task: its tokens, its questions, and the truth about them."""

    def __init__(self, config: PointerChasingConfig) -> None:
        self.config = config
        edge_tokens = config.nodes**2 if config.layout == "edges" else config.nodes
        self.vocab_size = config.nodes + config.max_hops + edge_tokens
        self.table_length = config.nodes * (1 if config.layout == "edges" else 2)
        self.length = self.table_length + 2 * config.questions

    def generate(self, seed: int, indices: Int[Tensor, " rows"]) -> Questions:
        """The samples with these numbers: each row is a function of `seed` and its own number alone."""
        nodes, hops = self.config.nodes, self.config.max_hops
        rows = indices.reshape(-1, 1)
        successor = self._successors(seed, rows)
        order = uniform(seed, "edge order", rows, torch.arange(nodes)).argsort(dim=1, stable=True)
        question = torch.arange(self.config.questions)
        start = _below(uniform(seed, "start", rows, question), nodes)
        hop = 1 + _below(uniform(seed, "hops", rows, question), hops)
        node = start
        answer = start
        for count in range(1, hops + 1):
            node = successor.gather(1, node)
            answer = torch.where(hop == count, node, answer)
        asked = torch.stack((nodes + hop - 1, start), dim=2).flatten(1)
        tokens = torch.cat((self._table_tokens(order, successor.gather(1, order)), asked), dim=1)
        answers, difficulty = torch.zeros_like(tokens), torch.zeros_like(tokens)
        answers[:, self.table_length + 1 :: 2] = answer
        difficulty[:, self.table_length + 1 :: 2] = hop
        return Questions(tokens=tokens, answers=answers, hops=difficulty)

    def sample(self, seed: int, index: int) -> Questions:
        """One sequence, as a batch of one row."""
        return self.generate(seed, torch.tensor([index]))

    def _successors(self, seed: int, rows: Int[Tensor, "rows 1"]) -> Int[Tensor, "rows nodes"]:
        shuffled = uniform(seed, "table", rows, torch.arange(self.config.nodes)).argsort(dim=1, stable=True)
        if self.config.table == "permutation":
            return shuffled
        return torch.empty_like(shuffled).scatter_(1, shuffled, shuffled.roll(-1, dims=1))

    def _table_tokens(
        self, source: Int[Tensor, "rows nodes"], target: Int[Tensor, "rows nodes"]
    ) -> Int[Tensor, "rows table"]:
        first_edge = self.config.nodes + self.config.max_hops
        if self.config.layout == "edges":
            return first_edge + source * self.config.nodes + target
        return torch.stack((first_edge + source, target), dim=2).flatten(1)

    def solve(self, prompt: Sequence[int]) -> int:
        """The answer to a prompt's last question, by following its table one edge at a time.

        Args:
            prompt: a table and at least one question; it ends with a question's start node.

        Raises:
            InputError: the prompt is not such a sequence.
        """
        nodes, hops = self.config.nodes, self.config.max_hops
        if len(prompt) < self.table_length + 2 or (len(prompt) - self.table_length) % 2:
            raise InputError(
                f"a prompt of {len(prompt)} tokens does not end with a question; give {self.table_length} tokens of "
                "table and two for each question"
            )
        first_edge = nodes + hops
        table = prompt[: self.table_length]
        if self.config.layout == "edges":
            edges = [divmod(token - first_edge, nodes) for token in table]
        else:
            edges = [(a - first_edge, b) for a, b in zip(table[::2], table[1::2], strict=True)]
        successor = dict(edges)
        hop, node = prompt[-2] - nodes + 1, prompt[-1]
        whole = set(range(nodes))
        if set(successor) != whole or set(successor.values()) != whole or node not in whole or not 1 <= hop <= hops:
            raise InputError(
                "the prompt is not a table of edges and then questions; make one with PointerChasing.sample"
            )
        for _ in range(hop):
            node = successor[node]
        return node

    def verify(self, prompt: Sequence[int], answer: int) -> bool:
        """Whether `answer` is right for a prompt's last question. Raises as `solve` does."""
        return answer == self.solve(prompt)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Display text of each token; joined by spaces they read as table and questions.

        Raises:
            InputError: an id outside the vocabulary.
        """
        return [self._piece(index) for index in ids]

    def text(self, ids: Sequence[int]) -> str:
        """A sequence as one line, `4→7 7→1 1→4 2 hops from 4`."""
        return " ".join(self.pieces(ids))

    def _piece(self, index: int) -> str:
        nodes, hops = self.config.nodes, self.config.max_hops
        if not 0 <= index < self.vocab_size:
            raise InputError(
                f"token id {index} is outside the task's vocabulary; ids run from 0 to {self.vocab_size - 1}"
            )
        if index < nodes:
            return str(index)
        if index < nodes + hops:
            hop = index - nodes + 1
            return "1 hop from" if hop == 1 else f"{hop} hops from"
        if self.config.layout == "pairs":
            return f"{index - nodes - hops}→"
        source, target = divmod(index - nodes - hops, nodes)
        return f"{source}→{target}"


def _below(chance: Tensor, bound: int) -> Int[Tensor, "..."]:
    """Whole numbers from 0 to `bound` - 1 from numbers in (0, 1)."""
    return (chance * bound).long().clamp_(max=bound - 1)
