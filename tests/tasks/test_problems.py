"""What all tasks share: the verifier of exact answers, and randomness that is addressed."""

import torch

from loopwise.tasks.problems import IGNORED, ExactTask, Problems, generator, numbers


class Doubling(ExactTask):
    def draw(self, seed, numbers):
        values = torch.stack([torch.from_numpy(generator(seed, "doubling", int(n)).integers(0, 9, 3)) for n in numbers])
        targets = values * 2
        targets[:, 0] = IGNORED
        return Problems(inputs=values, targets=targets, difficulty=torch.ones(len(numbers)))


def test_the_verifier_passes_over_what_is_not_asked():
    problems = Doubling().draw(0, numbers(0, 4))
    answers = problems.inputs * 2
    answers[:, 0] = -1
    answers[2, 1] += 1
    assert len(problems) == 4
    assert Doubling().verify(problems, answers).tolist() == [True, True, False, True]


def test_a_problem_may_ask_for_one_class():
    problems = Problems(inputs=torch.zeros(3), targets=torch.tensor([1, 2, IGNORED]), difficulty=torch.ones(3))
    assert Doubling().verify(problems, torch.tensor([1, 0, 0])).tolist() == [True, False, True]


def test_a_problem_depends_on_seed_and_number_alone():
    whole = Doubling().draw(3, numbers(0, 8)).inputs
    assert torch.equal(Doubling().draw(3, torch.tensor([5, 1])).inputs, whole[[5, 1]])
    assert not torch.equal(Doubling().draw(4, numbers(0, 8)).inputs, whole)
