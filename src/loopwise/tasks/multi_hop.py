"""Multi-hop questions: facts that must be learned by heart and then be strung together in one breath.

People stand in layers; for each relation a person has one person of the next layer ("the teacher of Ann is Bob"). A
question names a person and k relations, and its answer is one person, k layers further: "Who is the r1 of the r2 of
X?". The facts stand in no prompt: a model meets them only through the questions that it is trained on, and is then
asked others. Source: Yao et al., arXiv 2505.17923, as Ouro uses it (2510.25741, section 6): 500 people
in 5 layers, 20 relations, 3 hops from the first layer, so 800,000 questions, of which 2.5% to 25% train.

One row, here for three hops ("the teacher of the friend of the boss of Ann"):

    teacher friend boss Ann ?       target at `?`: the person

Token ids, with P people in all and R relations:

    0 .. P-1        people, layer by layer
    P .. P+R-1      relations
    P+R             `?`, where the answer is read
    P+R+1           padding before questions of fewer hops (facts), so that `?` is always the last token

The difficulty of a question is its number of hops.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.problems import IGNORED, ExactTask, Problems, generator

PARTS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class MultiHopConfig:
    """The world and which questions of it are asked."""

    people: int = 100
    """People in each layer; there is one layer more than there are hops."""
    relations: int = 20
    """R, relations."""
    hops: int = 3
    """k, relations in a question."""
    world: int = 0
    """The seed of the facts and of which questions train: another number is another world."""
    part: str = "train"
    """`train`: the questions that may be learned from. `test`: held-out ones."""
    train_share: float = 0.15
    """The share of all questions that are in `train`."""
    test_questions: int = 3000
    """How many questions are held out; the same ones for every share."""
    facts: float = 0.0
    """The chance that a training problem is a fact, a question of one hop from any layer but the last, in place of a
    question of k hops."""

    def __post_init__(self) -> None:
        if self.people < 2 or self.relations < 1 or self.hops < 1:
            raise ConfigError(
                f"multi-hop with people={self.people}, relations={self.relations}, hops={self.hops} asks nothing; "
                "give at least 2 people, 1 relation and 1 hop"
            )
        if self.part not in PARTS:
            raise ConfigError(f"part={self.part!r} is unknown; give train or test")
        if not 0 <= self.facts < 1:
            raise ConfigError(f"facts={self.facts}; give a chance from 0 up to, not including, 1")
        total = self.questions
        taken = self.test_questions + round(self.train_share * total)
        if self.test_questions < 1 or not 0 < self.train_share <= 1 or taken > total:
            raise ConfigError(
                f"test_questions={self.test_questions} and train_share={self.train_share} of {total} questions; "
                "both must be above 0 and leave each other room"
            )

    @property
    def questions(self) -> int:
        """All questions of k hops that there are."""
        return int(self.people * self.relations**self.hops)


class MultiHop(ExactTask):
    """The task: its tokens, its problems, and the truth about them."""

    def __init__(self, config: MultiHopConfig) -> None:
        self.config = config
        self.first_relation = config.people * (config.hops + 1)
        self.ask = self.first_relation + config.relations
        self.padding = self.ask + 1
        self.vocab_size = self.padding + 1
        self.length = config.hops + 2
        """Tokens of a row."""

    @cached_property
    def facts(self) -> Int[np.ndarray, "persons relations"]:
        """Who is each person's relation, by person and relation; people of the last layer have none."""
        config = self.config
        random = generator(config.world, "multi-hop facts", 0)
        drawn = random.integers(0, config.people, (config.hops, config.people, config.relations))
        layer = config.people * np.arange(1, config.hops + 1)
        return np.asarray((drawn + layer[:, None, None]).reshape(-1, config.relations))

    @cached_property
    def numbers_asked(self) -> Int[np.ndarray, " questions"]:
        """The numbers of the questions of this part."""
        config = self.config
        order = generator(config.world, "multi-hop parts", 0).permutation(config.questions)
        held_out, rest = order[: config.test_questions], order[config.test_questions :]
        return held_out if config.part == "test" else rest[: round(config.train_share * config.questions)]

    def draw(self, seed: int, numbers: Int[Tensor, " problems"]) -> Problems:
        """Training problems are drawn anew for each number; test problem n is held-out question n, whatever the seed.

        Raises:
            InputError: a test problem's number is beyond the held-out questions.
        """
        config = self.config
        if (
            config.part == "test"
            and len(numbers)
            and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self.numbers_asked)
        ):
            raise InputError(
                f"test problems {int(numbers.min())} to {int(numbers.max())} were asked for; there are 0 to "
                f"{len(self.numbers_asked) - 1}"
            )
        rows = np.full((len(numbers), self.length), self.padding, dtype=np.int64)
        targets = np.full_like(rows, IGNORED)
        hops = np.full(len(numbers), config.hops, dtype=np.int64)
        for row, number in enumerate(numbers.tolist()):
            if config.part == "test":
                question = self._question(int(self.numbers_asked[number]))
            else:
                random = generator(seed, "multi-hop", number)
                if random.random() < config.facts:
                    person, relation = random.integers(0, (len(self.facts), config.relations))
                    question = [self.first_relation + int(relation), int(person)]
                    hops[row] = 1
                else:
                    question = self._question(int(random.choice(self.numbers_asked)))
            rows[row, self.length - 1 - len(question) : -1] = question
            rows[row, -1] = self.ask
            targets[row, -1] = self.solve(question)
        return Problems(
            inputs=torch.from_numpy(rows), targets=torch.from_numpy(targets), difficulty=torch.from_numpy(hops)
        )

    def _question(self, number: int) -> list[int]:
        """Relations from the last to be followed to the first, then the person: the order of the words."""
        relations = []
        for _ in range(self.config.hops):
            number, relation = divmod(number, self.config.relations)
            relations.append(self.first_relation + relation)
        return [*relations, number]

    def solve(self, question: Sequence[int]) -> int:
        """The answer to relations and a person, by looking the facts up one after the other.

        Raises:
            InputError: the tokens are not such a question.
        """
        relations = [token - self.first_relation for token in question[:-1]]
        person = int(question[-1]) if question else -1
        for relation in reversed(relations):
            if not 0 <= relation < self.config.relations or not 0 <= person < len(self.facts):
                person = -1
                break
            person = int(self.facts[person, relation])
        if not 0 <= person < self.first_relation:
            raise InputError(
                f"{list(question)} is not a question of this world; give relation ids from {self.first_relation} to "
                f"{self.ask - 1} and then a person with as many layers to come"
            )
        return person

    def text(self, tokens: Sequence[int]) -> str:
        """A row for people: `who is the r1 of the r0 of p7?`.

        Raises:
            InputError: an id outside the vocabulary.
        """
        words = []
        for token in map(int, tokens):
            if not 0 <= token < self.vocab_size:
                raise InputError(f"token id {token} is outside the vocabulary; ids run from 0 to {self.vocab_size - 1}")
            if token < self.first_relation:
                words.append(f"p{token}")
            elif token < self.ask:
                words.append(f"r{token - self.first_relation} of the")
        return f"who is the {' '.join(words)}?".replace("of the p", "of p")
