"""Multi-hop questions against a reader of the facts, and the parts they fall into."""

import re
from collections import Counter

import pytest
import torch

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.multi_hop import MultiHop, MultiHopConfig
from loopwise.tasks.problems import IGNORED, numbers

SMALL = MultiHopConfig(people=6, relations=3, hops=3, train_share=0.5, test_questions=40)


def small(**settings: object) -> MultiHop:
    from dataclasses import replace

    return MultiHop(replace(SMALL, **settings))  # type: ignore[arg-type]


def facts_by_words(task: MultiHop) -> dict[tuple[str, str], str]:
    """Every fact, as a person would write it: (relation, person) to person. From one-hop questions alone."""
    known = {}
    for person in range(len(task.facts)):
        for relation in range(task.config.relations):
            question = [task.first_relation + relation, person]
            words = task.text([*question, task.ask]).removesuffix("?").split()
            assert words[:3] == ["who", "is", "the"]
            known[words[3], words[-1]] = f"p{task.solve(question)}"
    return known


def test_answers_string_facts_together() -> None:
    task = small()
    known = facts_by_words(task)
    problems = task.draw(0, numbers(0, 100))
    assert set(problems.difficulty.tolist()) == {3}
    for tokens, targets in zip(problems.inputs.tolist(), problems.targets.tolist(), strict=True):
        text = task.text(tokens)
        *relations, person = re.findall(r"[rp]\d+", text)
        assert text == f"who is the {' of the '.join(relations)} of {person}?"
        for relation in reversed(relations):
            person = known[relation, person]
        assert targets == [IGNORED] * 4 + [int(person[1:])]
        assert int(person[1:]) // 6 == 3


def test_people_have_one_relation_each_in_the_next_layer() -> None:
    facts = MultiHop(MultiHopConfig()).facts
    assert facts.shape == (300, 20)
    for person, row in enumerate(facts):
        assert {target // 100 for target in row} == {person // 100 + 1}
    # As the paper has it: 100 * 20^3 questions.
    assert MultiHopConfig().questions == 800_000


def test_train_and_test_share_no_question_and_shares_nest() -> None:
    def rows(task: MultiHop, count: int) -> set[tuple[int, ...]]:
        return set(map(tuple, task.draw(0, numbers(0, count)).inputs.tolist()))

    test = rows(small(part="test"), 40)
    assert len(test) == 40
    assert rows(small(part="test", train_share=0.1), 40) == test
    half, tenth = rows(small(), 4000), rows(small(train_share=0.1), 4000)
    assert len(half) == 81
    assert len(tenth) == 16
    assert tenth < half
    assert not half & test
    assert not rows(small(world=1), 4000) <= half


def test_facts_are_mixed_in_as_often_as_asked() -> None:
    task = small(facts=0.3)
    problems = task.draw(0, numbers(0, 3000))
    hops = Counter(problems.difficulty.tolist())
    assert set(hops) == {1, 3}
    assert abs(hops[1] / 3000 - 0.3) < 5 * (0.21 / 3000) ** 0.5
    fact = problems.inputs[problems.difficulty == 1][0].tolist()
    assert fact[:2] == [task.padding] * 2
    asked = {tuple(row[2:4]) for row in problems.inputs[problems.difficulty == 1].tolist()}
    assert len(asked) == 18 * 3
    for row, target in zip(problems.inputs.tolist(), problems.targets[:, -1].tolist(), strict=True):
        assert target == task.solve([token for token in row[:-1] if token != task.padding])


def test_a_problem_depends_on_its_seed_and_number_alone() -> None:
    task = small(facts=0.5)
    whole = task.draw(3, numbers(0, 9))
    assert torch.equal(task.draw(3, torch.tensor([5])).inputs[0], whole.inputs[5])
    assert not torch.equal(task.draw(4, numbers(0, 9)).inputs, whole.inputs)
    assert task.verify(whole, whole.targets).all()
    assert not task.verify(whole, whole.targets + 1).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"people": 1}, "people=1"),
        ({"part": "valid"}, "give train or test"),
        ({"facts": 1.0}, "facts=1.0"),
        ({"train_share": 0.9}, "of 162 questions"),
        ({"train_share": 0.0}, "train_share=0.0"),
    ],
)
def test_worlds_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        small(**settings)


def test_questions_that_are_none_are_refused() -> None:
    task = small(part="test")
    with pytest.raises(InputError, match="there are 0 to 39"):
        task.draw(0, numbers(1, 40))
    for question in ([], [3], [task.first_relation, 18], [task.ask, 0], [task.first_relation] * 4 + [0]):
        if question == [3]:
            assert task.solve(question) == 3
            continue
        with pytest.raises(InputError, match="not a question of this world"):
            task.solve(question)
