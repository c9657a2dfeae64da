"""Word problems whose structure stays while the surface is swapped: is it the sum that was learned, or the wording?

A structure is a chain of l operations: a first count, and then counts that are each made of the one before, by a
number more, a number fewer, a number of times, or both it and an earlier one together. A surface says it: names,
things, verbs, the order of words in a sentence and of sentences, and sentences that do not matter. Problem n of a seed
has the same structure, and so the same answer, in every surface:

    market     bos Ann has 3 apples . Cid has 2 times the apples of Ann . how many apples has Cid ?
    harbour    bos aboard Aurora lie 3 crates . Corvus holds 2 fold what Aurora holds in crates . count up crates on
               Corvus ?
    league     bos Reds won 3 medals . each of the medals by Reds brought 2 to Greens . tell medals by Greens ?

Counts go round modulo m, so that no answer is likelier than another by its size, as in iGSM (Ye et al., arXiv
2407.20311: arithmetic modulo 23). Swapped names and sentences that do not matter are the tests of GSM-Symbolic
(Mirzadeh et al., arXiv 2410.05229). A sentence that does not matter gives a count to somebody else, who may be compared
with anybody; so names must be read, and it is not enough to take the sentence before.

Token ids, with modulus m:

    0 .. m-1     numbers
    m            bos, at the beginning
    m+1          padding after the question, which a causal model cannot see from there
    m+2          `.`, the end of a sentence
    m+3          `?`, where the answer is read
    m+4 ..       the words of all surfaces, in the order of `WordProblems.words`; all surfaces share one vocabulary,
                 and of their words only `of` and `the` stand in more than one

The difficulty of a problem is l, its number of operations, whatever the surface.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.problems import IGNORED, ExactTask, Problems, generator

OPERATIONS = ("more", "fewer", "times", "both")
"""How a count is made of others; `start` is the count that is given."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """How a structure is worded.

    A sentence is a row of words with places for `{a}`, whose count it gives, `{b}` and `{d}`, whose counts it is made
    of, `{c}`, a number, and `{o}`, the things counted.
    """

    names: tuple[str, ...]
    """Whose counts they are."""
    things: tuple[str, ...]
    """What is counted; one for each problem."""
    sentences: Mapping[str, str]
    """The sentence of `start` and of each operation."""
    question: str
    """Asks for the count of `{a}`."""


SURFACES: Mapping[str, Surface] = {
    "market": Surface(
        names=("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jim", "Kay", "Leo"),
        things=("apples", "pears", "plums", "figs"),
        sentences={
            "start": "{a} has {c} {o}",
            "more": "{a} has {c} more {o} than {b}",
            "fewer": "{a} has {c} fewer {o} than {b}",
            "times": "{a} has {c} times the {o} of {b}",
            "both": "{a} has as many {o} as {b} and {d}",
        },
        question="how many {o} has {a}",
    ),
    "harbour": Surface(
        names=(
            *("Aurora", "Borea", "Corvus", "Dorado", "Estrel", "Fulmar"),
            *("Gannet", "Heron", "Iris", "Juno", "Kestrel", "Lyra"),
        ),
        things=("crates", "barrels", "sacks", "chests"),
        sentences={
            "start": "aboard {a} lie {c} {o}",
            "more": "{b} is {c} {o} short of {a}",
            "fewer": "{b} beats {a} with {c} extra {o}",
            "times": "{a} holds {c} fold what {b} holds in {o}",
            "both": "the {o} of {b} plus {d} fill {a}",
        },
        question="count up {o} on {a}",
    ),
    "league": Surface(
        names=(
            *("Reds", "Blues", "Greens", "Golds", "Greys", "Pinks"),
            *("Whites", "Blacks", "Browns", "Limes", "Mauves", "Teals"),
        ),
        things=("medals", "goals", "points", "cups"),
        sentences={
            "start": "{a} won {c} {o}",
            "more": "after {c} further {o} {b} would equal {a}",
            "fewer": "robbed of {c} {o} {b} would equal {a}",
            "times": "each of the {o} by {b} brought {c} to {a}",
            "both": "{b} joined by {d} equal {a} at {o}",
        },
        question="tell {o} by {a}",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One count of a structure."""

    kind: str
    """`start` or one of `OPERATIONS`."""
    of: tuple[int, ...] = ()
    """The numbers of the counts it is made of: none, one, or two for `both`."""
    count: int = 0
    """The number in the sentence; `both` has none."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """A structure with what else it takes to tell it."""

    steps: tuple[Step, ...]
    """The structure's counts, then those that do not matter."""
    asked: int
    """The number of the count that is asked for, the structure's last."""
    order: tuple[int, ...]
    """The numbers of the counts, in the order of their sentences."""
    names: tuple[str, ...]
    """Whose counts they are, by number."""
    thing: str
    """What is counted."""


@dataclass(frozen=True, kw_only=True)
class WordProblemsConfig:
    """The size of the task, and its surface."""

    modulus: int = 7
    """m: counts are 0..m-1."""
    operations: int = 4
    """L, the most operations of a problem."""
    shortest: int = 1
    """Fewest operations; each number from here to L is equally likely."""
    kinds: tuple[str, ...] = OPERATIONS
    """Which operations there are, each equally likely where it is possible; `both` needs two counts before it."""
    surface: str = "market"
    """The wording: market, harbour or league."""
    names: int = 12
    """How many names of the surface are drawn from; fewer are learned sooner."""
    telling: int = 0
    """The seed of the names, the things, the sentences that do not matter and the places of sentences, which are the
    same ones by number in every surface: the third name of one stands where the third of another does. Another telling
    draws all of them anew for the same structures."""
    order: str = "told"
    """Of the sentences. `told`: each comes after those that it speaks of. `shuffled`: any order."""
    distractors: int = 1
    """Sentences that do not matter, in every problem."""
    asked: str = "answer"
    """`answer`: at `?` alone. `parts`: besides, at the end of each sentence that can be understood by then, the count
    that it gives. Many more answers a row, so a small model learns sooner; what is asked at `?` is the same."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("asked", self.asked, ("answer", "parts")),
            ("order", self.order, ("told", "shuffled")),
            ("surface", self.surface, tuple(SURFACES)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is unknown; give {' or '.join(allowed)}")
        if len(set(self.kinds)) < len(self.kinds) or not {"both"} < {"both", *self.kinds} <= set(OPERATIONS):
            raise ConfigError(
                f"kinds={list(self.kinds)}; give some of {', '.join(OPERATIONS)}, each once, and not both alone"
            )
        if self.modulus < 3:
            raise ConfigError(f"modulus={self.modulus} leaves nothing to multiply by; give at least 3")
        if not 1 <= self.shortest <= self.operations:
            raise ConfigError(
                f"word problems with shortest={self.shortest} and operations={self.operations}; "
                f"give shortest from 1 to operations, and at least 1 operation"
            )
        most = min(len(surface.names) for surface in SURFACES.values())
        needed = self.operations + 1 + max(self.distractors, 0)
        if self.distractors < 0 or not needed <= self.names <= most:
            raise ConfigError(
                f"names={self.names} and distractors={self.distractors} with {self.operations} operations; give at "
                f"least 0 distractors and from {needed} to {most} names, and fewer operations if that is none"
            )


class WordProblems(ExactTask):
    """The task: its tokens, its problems, and the truth about them.

    Rows are as long, and tokens mean the same, in every surface and order of one size.
    """

    def __init__(self, config: WordProblemsConfig) -> None:
        self.config = config
        self.bos, self.padding, self.stop, self.ask = range(config.modulus, config.modulus + 4)
        self.words = tuple(dict.fromkeys(word for surface in SURFACES.values() for word in _words(surface)))
        """Every word of every surface, in the order of the token ids."""
        self._ids = {word: self.ask + 1 + place for place, word in enumerate(self.words)}
        self.vocab_size = self.ask + 1 + len(self.words)
        self.length = max(self._longest(surface) for surface in SURFACES.values())
        """Tokens of a row: the longest that any surface can make."""

    def _longest(self, surface: Surface) -> int:
        tokens = {kind: len(sentence.split()) + 1 for kind, sentence in surface.sentences.items()}
        most = max(tokens[kind] for kind in self.config.kinds)
        extra = self.config.distractors * max(most, tokens["start"])
        return 1 + tokens["start"] + self.config.operations * most + extra + len(surface.question.split()) + 1

    def draw(self, seed: int, numbers: Int[Tensor, " problems"]) -> Problems:
        """Problem n has the structure `structure(seed, n)`, however it is told."""
        rows = np.full((len(numbers), self.length), self.padding, dtype=np.int64)
        targets = np.full_like(rows, IGNORED)
        counts = np.empty(len(numbers), dtype=np.int64)
        for row, number in enumerate(numbers.tolist()):
            structure = self.structure(seed, number)
            tokens, asked = self.tell(self.story(structure, generator(seed, f"telling {self.config.telling}", number)))
            rows[row, : len(tokens)] = tokens
            targets[row, : len(tokens)] = asked
            counts[row] = len(structure) - 1
        return Problems(
            inputs=torch.from_numpy(rows), targets=torch.from_numpy(targets), difficulty=torch.from_numpy(counts)
        )

    def structure(self, seed: int, number: int) -> tuple[Step, ...]:
        """The counts of a problem, from the one that is given to the one that is asked for; all of them matter."""
        random = generator(seed, "word problems", number)
        length = int(random.integers(self.config.shortest, self.config.operations + 1))
        steps = [self._start(random)]
        for place in range(1, length + 1):
            steps.append(self._step(random, place - 1, place))
        return tuple(steps)

    def _start(self, random: np.random.Generator) -> Step:
        return Step(kind="start", count=int(random.integers(0, self.config.modulus)))

    def _step(self, random: np.random.Generator, base: int, known: int) -> Step:
        """A count made of number `base` of the `known` ones, and for `both` of another one."""
        kinds = [kind for kind in self.config.kinds if kind != "both" or known > 1]
        kind = str(random.choice(kinds))
        if kind == "both":
            other = int(random.choice([place for place in range(known) if place != base]))
            return Step(kind=kind, of=(base, other) if random.random() < 0.5 else (other, base))
        least = 2 if kind == "times" else 1
        return Step(kind=kind, of=(base,), count=int(random.integers(least, self.config.modulus)))

    def values(self, steps: Sequence[Step]) -> list[int]:
        """All counts, each made of those before it."""
        found: list[int] = []
        for step in steps:
            parts = [found[place] for place in step.of]
            found.append(_value(step.kind, parts, step.count) % self.config.modulus)
        return found

    def story(self, structure: Sequence[Step], random: np.random.Generator) -> Story:
        """A structure with all that is drawn to tell it."""
        steps = list(structure)
        order = list(range(len(steps)))
        for place in range(len(steps), len(steps) + self.config.distractors):
            compared = random.random() < 0.5
            extra = self._step(random, int(random.integers(0, place)), place) if compared else self._start(random)
            first = max((order.index(known) + 1 for known in extra.of), default=0)
            order.insert(int(random.integers(first, len(order) + 1)), place)
            steps.append(extra)
        if self.config.order == "shuffled":
            order = random.permutation(len(steps)).tolist()
        surface = SURFACES[self.config.surface]
        return Story(
            steps=tuple(steps),
            asked=len(structure) - 1,
            order=tuple(order),
            names=tuple(random.permutation(surface.names[: self.config.names]).tolist()[: len(steps)]),
            thing=str(random.choice(surface.things)),
        )

    def tell(self, story: Story) -> tuple[list[int], list[int]]:
        """A story in this task's surface: the tokens from bos to `?`, and the target at each."""
        surface = SURFACES[self.config.surface]
        values = self.values(story.steps)
        tokens, targets = [self.bos], [IGNORED]
        told: set[int] = set()
        for place in story.order:
            step = story.steps[place]
            who = (story.names[place], *(story.names[known] for known in step.of))
            sentence = surface.sentences[step.kind].format(
                **dict(zip("abd", who, strict=False)), c=step.count, o=story.thing
            )
            tokens += [*self._tokens(sentence), self.stop]
            targets += [IGNORED] * (len(tokens) - len(targets))
            if told.issuperset(step.of):
                told.add(place)
                if self.config.asked == "parts":
                    targets[-1] = values[place]
        question = surface.question.format(a=story.names[story.asked], o=story.thing)
        tokens += [*self._tokens(question), self.ask]
        targets += [IGNORED] * (len(tokens) - len(targets))
        targets[-1] = values[story.asked]
        return tokens, targets

    def _tokens(self, sentence: str) -> Iterator[int]:
        return (int(word) if word.isdigit() else self._ids[word] for word in sentence.split())

    def solve(self, tokens: Sequence[int]) -> int:
        """The answer to a row in any surface, by reading its sentences and putting in what is known until no more
        counts are found.

        Raises:
            InputError: the tokens are not such a problem, or no answer follows from them.
        """
        body = [int(token) for token in tokens if token != self.padding]
        if body[:1] == [self.bos] and body[-1:] == [self.ask]:
            *sentences, question = " ".join(self._pieces(body[1:-1])).split(" . ")
            for surface in SURFACES.values():
                facts = [_read(surface, sentence) for sentence in sentences]
                asked = re.fullmatch(_pattern(surface, surface.question), question)
                if asked is None or None in facts:
                    continue
                answer = self._find(asked["a"], [fact for fact in facts if fact is not None])
                if answer is not None:
                    return answer
        raise InputError(
            "these tokens are not sentences of one surface from which an answer follows; "
            "make a row with WordProblems.draw"
        )

    def _find(self, asked: str, facts: Sequence[tuple[str, str, list[str], int]]) -> int | None:
        known: dict[str, int] = {}
        found = True
        while found:
            found = False
            for who, kind, of, count in facts:
                if who not in known and known.keys() >= set(of):
                    known[who] = _value(kind, [known[name] for name in of], count) % self.config.modulus
                    found = True
        return known.get(asked)

    def text(self, tokens: Sequence[int]) -> str:
        """A row for people: `Ann has 3 apples. how many apples has Ann?`.

        Raises:
            InputError: an id outside the vocabulary.
        """
        return " ".join(filter(None, self._pieces(tokens))).replace(" .", ".").replace(" ?", "?")

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        marks = {self.bos: "", self.padding: "", self.stop: ".", self.ask: "?"}
        pieces = []
        for token in map(int, tokens):
            if not 0 <= token < self.vocab_size:
                raise InputError(f"token id {token} is outside the vocabulary; ids run from 0 to {self.vocab_size - 1}")
            if token < self.config.modulus:
                pieces.append(str(token))
            else:
                pieces.append(marks[token] if token in marks else self.words[token - self.ask - 1])
        return pieces


def _words(surface: Surface) -> Iterator[str]:
    """The words of a surface; places to fill in are none."""
    yield from surface.names
    yield from surface.things
    for sentence in (*surface.sentences.values(), surface.question):
        yield from (word for word in sentence.split() if not word.startswith("{"))


def _value(kind: str, parts: Sequence[int], count: int) -> int:
    """A count before it is taken modulo m."""
    match kind:
        case "more":
            return parts[0] + count
        case "fewer":
            return parts[0] - count
        case "times":
            return parts[0] * count
        case "both":
            return parts[0] + parts[1]
    return count


def _pattern(surface: Surface, sentence: str) -> str:
    """A sentence as a regular expression with a group for each place to fill in."""
    names, things = "|".join(surface.names), "|".join(surface.things)
    groups = {place: f"(?P<{place}>{names})" for place in "abd"}
    return sentence.format(**groups, c=r"(?P<c>\d+)", o=f"(?P<o>{things})")


def _read(surface: Surface, sentence: str) -> tuple[str, str, list[str], int] | None:
    """Whose count a sentence gives, its kind, whose counts it is made of, and its number; None: not of this surface."""
    for kind, template in surface.sentences.items():
        found = re.fullmatch(_pattern(surface, template), sentence)
        if found is not None:
            parts = found.groupdict()
            return parts["a"], kind, [parts[place] for place in "bd" if place in parts], int(parts.get("c", 0))
    return None
