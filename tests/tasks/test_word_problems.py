"""Word problems against a search over all counts, and structures against the surfaces that say them."""

import math
import re
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.problems import IGNORED, numbers
from loopwise.tasks.word_problems import OPERATIONS, SURFACES, Step, Story, WordProblems, WordProblemsConfig

# What each sentence says about the counts in it, written down anew from the wording alone: name, number and name.
CLAIMS = {
    r"(\w+) has (\d+) [a-z]+": "{0} == {1}",
    r"(\w+) has (\d+) more [a-z]+ than (\w+)": "{0} == {2} + {1}",
    r"(\w+) has (\d+) fewer [a-z]+ than (\w+)": "{0} == {2} - {1}",
    r"(\w+) has (\d+) times the [a-z]+ of (\w+)": "{0} == {1} * {2}",
    r"(\w+) has as many [a-z]+ as (\w+) and (\w+)": "{0} == {1} + {2}",
    r"aboard (\w+) lie (\d+) [a-z]+": "{0} == {1}",
    r"(\w+) is (\d+) [a-z]+ short of (\w+)": "{0} + {1} == {2}",
    r"(\w+) beats (\w+) with (\d+) extra [a-z]+": "{0} - {2} == {1}",
    r"(\w+) holds (\d+) fold what (\w+) holds in [a-z]+": "{0} == {1} * {2}",
    r"the [a-z]+ of (\w+) plus (\w+) fill (\w+)": "{0} + {1} == {2}",
    r"(\w+) won (\d+) [a-z]+": "{0} == {1}",
    r"after (\d+) further [a-z]+ (\w+) would equal (\w+)": "{1} + {0} == {2}",
    r"robbed of (\d+) [a-z]+ (\w+) would equal (\w+)": "{1} - {0} == {2}",
    r"each of the [a-z]+ by (\w+) brought (\d+) to (\w+)": "{0} * {1} == {2}",
    r"(\w+) joined by (\w+) equal (\w+) at [a-z]+": "{0} + {1} == {2}",
}
QUESTIONS = (r"how many [a-z]+ has (\w+)\?", r"count up [a-z]+ on (\w+)\?", r"tell [a-z]+ by (\w+)\?")


def claim(sentence: str) -> str:
    """A sentence as a Python equation between names, modulo m."""
    for pattern, equation in CLAIMS.items():
        found = re.fullmatch(pattern, sentence)
        if found is not None:
            left, right = equation.format(*found.groups()).split("==")
            return f"(({left}) - ({right})) % m == 0"
    raise AssertionError(sentence)


def by_search(text: str, modulus: int) -> tuple[str, dict[str, int]]:
    """Who is asked for, and the one way to give everybody a count that agrees with every sentence."""
    *sentences, question = text.split(". ")
    asked = next(found[1] for found in (re.fullmatch(pattern, question) for pattern in QUESTIONS) if found)
    claims = [claim(sentence) for sentence in sentences]
    names = sorted({name for sentence in sentences for name in re.findall(r"\b[A-Z]\w+", sentence)})
    agrees = eval(f"lambda m, {', '.join(names)}: {' and '.join(claims)}")
    ways = [ways for ways in product(range(modulus), repeat=len(names)) if agrees(modulus, *ways)]
    assert len(ways) == 1
    return asked, dict(zip(names, ways[0], strict=True))


sizes = st.fixed_dictionaries(
    {
        "modulus": st.integers(3, 4),
        "operations": st.integers(1, 4),
        "kinds": st.sampled_from([OPERATIONS, ("times", "both"), ("fewer",)]),
        "surface": st.sampled_from(sorted(SURFACES)),
        "telling": st.integers(0, 2),
        "order": st.sampled_from(["told", "shuffled"]),
        "distractors": st.integers(0, 2),
        "asked": st.sampled_from(["answer", "parts"]),
    }
)


@given(size=sizes, seed=st.integers(0, 2**40), number=st.integers(0, 2**40))
def test_answers_are_what_a_search_over_all_counts_finds(size: dict[str, Any], seed: int, number: int) -> None:
    config = WordProblemsConfig(**size, shortest=min(2, size["operations"]))
    task = WordProblems(config)
    problems = task.draw(seed, torch.tensor([number]))
    tokens, targets = problems.inputs[0].tolist(), problems.targets[0].tolist()
    assert len(tokens) == task.length
    assert config.shortest <= int(problems.difficulty) <= config.operations
    asked, counts = by_search(task.text(tokens), config.modulus)
    end = tokens.index(task.ask)
    assert targets[end] == counts[asked] == task.solve(tokens)
    assert set(tokens[end + 1 :]) <= {task.padding}
    stops = [place for place, token in enumerate(tokens) if token == task.stop]
    assert len(stops) == int(problems.difficulty) + 1 + config.distractors
    others = [place for place in range(len(tokens)) if targets[place] != IGNORED and place != end]
    if config.asked == "answer":
        assert others == []
        return
    # A sentence is asked about where it and those before it leave one count only to the name that it gives one to.
    known: set[str] = set()
    first = 1
    for stop in stops:
        sentence = task.text(tokens[first:stop])
        names = re.findall(r"\b[A-Z]\w+", sentence)
        new = [name for name in names if name not in known]
        given = _given(sentence)
        if set(new) == {given}:
            known.add(given)
            assert targets[stop] == counts[given]
        else:
            assert targets[stop] == IGNORED
        first = stop + 1
    assert config.order == "shuffled" or len(known) == len(stops)


def _given(sentence: str) -> str:
    """The name that a sentence gives a count to: in most wordings the first or the last one."""
    names = re.findall(r"\b[A-Z]\w+", sentence)
    last = ("short of", "beats", "plus", "would equal", "brought", "joined")
    return names[-1] if any(words in sentence for words in last) else names[0]


def test_a_worked_example_in_three_surfaces() -> None:
    # 4, then 4 + 5 = 9, then 3 * 9 = 27, then 27 + 4 = 31, then 31 - 6 = 25, which is 2 modulo 23.
    structure = (
        Step(kind="start", count=4),
        Step(kind="more", of=(0,), count=5),
        Step(kind="times", of=(1,), count=3),
        Step(kind="both", of=(2, 0)),
        Step(kind="fewer", of=(3,), count=6),
    )
    said = {
        "market": "Ann has 4 figs. Bob has 5 more figs than Ann. Cid has 3 times the figs of Bob. "
        "Dan has as many figs as Cid and Ann. Eve has 6 fewer figs than Dan. how many figs has Eve?",
        "harbour": "aboard Aurora lie 4 chests. Aurora is 5 chests short of Borea. "
        "Corvus holds 3 fold what Borea holds in chests. the chests of Corvus plus Aurora fill Dorado. "
        "Dorado beats Estrel with 6 extra chests. count up chests on Estrel?",
        "league": "Reds won 4 cups. after 5 further cups Reds would equal Blues. "
        "each of the cups by Blues brought 3 to Greens. Greens joined by Reds equal Golds at cups. "
        "robbed of 6 cups Golds would equal Greys. tell cups by Greys?",
    }

    for surface, text in said.items():
        task = WordProblems(WordProblemsConfig(modulus=23, surface=surface, distractors=0, asked="parts"))
        assert task.values(structure) == [4, 9, 4, 8, 2]
        words = SURFACES[surface]
        story = Story(steps=structure, asked=4, order=(0, 1, 2, 3, 4), names=words.names[:5], thing=words.things[-1])
        tokens, targets = task.tell(story)
        assert task.text(tokens) == text
        assert task.solve(tokens) == 2
        assert [target for target in targets if target != IGNORED] == [4, 9, 4, 8, 2, 2]


def test_a_structure_stays_while_its_surface_is_swapped() -> None:
    base = WordProblemsConfig(modulus=7, operations=4, distractors=2, asked="parts")
    tasks = [
        WordProblems(replace(base, surface=surface, telling=telling))
        for surface in sorted(SURFACES)
        for telling in (0, 1)
    ]
    drawn = [task.draw(5, numbers(0, 200)) for task in tasks]
    assert len({(task.length, task.vocab_size, task.words) for task in tasks}) == 1
    structures = [tasks[0].structure(5, number) for number in range(200)]
    for task, problems in zip(tasks, drawn, strict=True):
        assert [task.structure(5, number) for number in range(200)] == structures
        assert torch.equal(problems.difficulty, drawn[0].difficulty)
        answers = [[target for target in row if target != IGNORED][-1] for row in problems.targets.tolist()]
        assert answers == [task.values(structure)[-1] for structure in structures]
        # In the same telling, sentence for sentence the same counts; in another, other sentences that do not matter.
        parts = [[target for target in row if target != IGNORED] for row in problems.targets.tolist()]
        first = [[target for target in row if target != IGNORED] for row in drawn[0].targets.tolist()]
        same = sum(one == other for one, other in zip(parts, first, strict=True))
        assert same == 200 if task.config.telling == 0 else same < 50
    texts = {task.text(problems.inputs[0].tolist()) for task, problems in zip(tasks, drawn, strict=True)}
    assert len(texts) == len(tasks)


def test_surfaces_share_no_words_but_two() -> None:
    words = {}
    for name in SURFACES:
        task = WordProblems(WordProblemsConfig(surface=name, operations=4, distractors=2))
        drawn = task.draw(0, numbers(0, 400)).inputs
        words[name] = {task.words[token - task.ask - 1] for token in drawn.unique().tolist() if token > task.ask}
    shared = [words[one] & words[other] for one in words for other in words if one < other]
    assert set().union(*shared) == {"of", "the"}
    assert set().union(*words.values()) == set(task.words)


def test_only_so_many_names_are_drawn_from() -> None:
    task = WordProblems(WordProblemsConfig(names=6))
    drawn = task.draw(0, numbers(0, 200)).inputs.unique().tolist()
    said = {task.words[token - task.ask - 1] for token in drawn if token > task.ask}
    assert said & set(SURFACES["market"].names) == set(SURFACES["market"].names[:6])


def test_lengths_kinds_starts_and_answers_are_uniform() -> None:
    task = WordProblems(WordProblemsConfig(modulus=5, operations=4))
    structures = [task.structure(0, number) for number in range(3000)]
    lengths = Counter(len(structure) for structure in structures)
    starts = Counter(structure[0].count for structure in structures)
    kinds = Counter(structure[2].kind for structure in structures if len(structure) > 2)
    answers = Counter(
        task.values(structure)[-1] for structure in structures if all(step.kind != "both" for step in structure)
    )
    for counts, expected in ((lengths, 4), (starts, 5), (kinds, 4), (answers, 5)):
        total = sum(counts.values())
        assert len(counts) == expected
        # Five standard deviations of a share of 1 / expected.
        slack = 5 * math.sqrt((1 / expected) * (1 - 1 / expected) / total)
        assert all(abs(count / total - 1 / expected) < slack for count in counts.values())


def test_a_problem_depends_on_its_seed_and_number_alone() -> None:
    task = WordProblems(WordProblemsConfig())
    whole = task.draw(3, numbers(0, 6))
    part = task.draw(3, torch.tensor([4, 1]))
    assert torch.equal(part.inputs, whole.inputs[[4, 1]])
    assert torch.equal(part.targets, whole.targets[[4, 1]])
    assert not torch.equal(task.draw(4, numbers(0, 6)).inputs, whole.inputs)


def test_the_verifier_looks_at_what_is_asked() -> None:
    task = WordProblems(WordProblemsConfig())
    problems = task.draw(0, numbers(0, 8))
    answers = torch.where(problems.targets == IGNORED, 99, problems.targets)
    assert task.verify(problems, answers).all()
    wrong = torch.where(problems.targets == IGNORED, 99, (problems.targets + 1) % 7)
    assert not task.verify(problems, wrong).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modulus": 2}, "modulus=2"),
        ({"operations": 0}, "shortest=1 and operations=0"),
        ({"shortest": 5}, "shortest=5 and operations=4"),
        ({"distractors": -1}, "distractors=-1"),
        ({"names": 5}, "from 6 to 12 names"),
        ({"names": 13}, "from 6 to 12 names"),
        ({"operations": 10, "distractors": 2}, "from 13 to 12 names, and fewer operations"),
        ({"kinds": ("both",)}, "not both alone"),
        ({"kinds": ()}, "give some of more, fewer, times, both"),
        ({"kinds": ("more", "more")}, "each once"),
        ({"kinds": ("less",)}, "kinds=['less']"),
        ({"surface": "moon"}, "give market or harbour or league"),
        ({"order": "reversed"}, "give told or shuffled"),
        ({"asked": "all"}, "give answer or parts"),
    ],
)
def test_sizes_that_ask_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        WordProblemsConfig(**settings)  # type: ignore[arg-type]


def test_what_is_no_problem_is_refused() -> None:
    task = WordProblems(WordProblemsConfig(distractors=0))
    harbour = WordProblems(WordProblemsConfig(distractors=0, surface="harbour"))
    row = [token for token in task.draw(0, numbers(0, 1)).inputs[0].tolist() if token != task.padding]
    other = [token for token in harbour.draw(0, numbers(0, 1)).inputs[0].tolist() if token != task.padding]
    start = row.index(task.stop) + 1
    assert task.solve(row) == harbour.solve(row)
    assert task.solve(other) == harbour.solve(other)
    for wrong in ([], row[1:], row[:-1], [task.bos, *row[start:]], row[:start] + other[1:], row[:2] + row[3:]):
        with pytest.raises(InputError, match="not sentences of one surface"):
            task.solve(wrong)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    task = WordProblems(WordProblemsConfig())
    with pytest.raises(InputError, match=f"ids run from 0 to {task.vocab_size - 1}"):
        task.text([task.vocab_size])
