import math

import pytest
import torch

from loopwise.errors import ConfigError
from loopwise.objectives.certainty import certainty_loss, within_reach
from loopwise.tasks.problems import IGNORED


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_hand_example() -> None:
    """Two loops, one sample, two classes: chances of the right class 1/4 and 1/2; the first loop is more certain."""
    logits = torch.tensor([[[1.0, 3.0]], [[1.0, 1.0]]]).log().requires_grad_()
    found = certainty_loss(logits, torch.tensor([0]), torch.tensor([[0.19], [0.0]]))
    assert float(found.total.detach()) == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert (found.best.tolist(), found.certain.tolist()) == ([2], [1])
    last = certainty_loss(logits, torch.tensor([0]), torch.tensor([[0.19], [0.0]]), last=True)
    assert float(last.total.detach()) == pytest.approx(math.log(2))


def test_equals_a_loop_over_samples() -> None:
    logits, certainties = drawn(6, 5, 4, 3), drawn(6, 5)
    targets = torch.randint(3, (5, 4), generator=torch.Generator().manual_seed(1))
    targets[0, 2] = IGNORED
    total = 0.0
    for sample in range(5):
        asked = targets[sample] != IGNORED
        losses = [
            -logits[loop, sample].log_softmax(-1)[asked].gather(1, targets[sample][asked][:, None]).mean()
            for loop in range(6)
        ]
        total += float(min(losses)) / 2 + float(losses[int(certainties[:, sample].argmax())]) / 2
    assert float(certainty_loss(logits, targets, certainties).total) == pytest.approx(total / 5)


def test_only_the_two_loops_learn() -> None:
    logits = drawn(6, 5, 4, 3).requires_grad_()
    targets = torch.zeros(5, 4, dtype=torch.long)
    found = certainty_loss(logits, targets, drawn(6, 5))
    found.total.backward()
    touched = logits.grad.abs().sum((2, 3)) > 0
    for sample in range(5):
        loops = {int(found.best[sample]), int(found.certain[sample])}
        assert {loop + 1 for loop in range(6) if touched[loop, sample]} == loops


def route(*right: str) -> torch.Tensor:
    """Logits of loops for one sample whose targets are all 0; a dot is a right place."""
    return torch.tensor([[[[1.0, 0.0] if place == "." else [0.0, 1.0] for place in loop]] for loop in right])


@pytest.mark.parametrize(
    ("loops", "counted"),
    [
        (("xxxxxx",), 2),  # as if the first alone were right
        ((".xxxxx",), 2),
        (("..x...",), 3),
        (("x.....", "...xxx"), 4),  # the best loop says how far
        (("......",), 6),
    ],
)
def test_a_route_is_trained_a_little_beyond_what_is_right(loops: tuple[str, ...], counted: int) -> None:
    reach = within_reach(route(*loops), torch.zeros(1, 6, dtype=torch.long), 2)
    assert reach.tolist() == [[place < counted for place in range(6)]]


def test_the_curriculum_leaves_places_out_of_the_loss() -> None:
    logits, targets = route("..xxxx"), torch.zeros(1, 6, dtype=torch.long)
    wrong, right = math.log(1 + math.e), math.log(1 + math.exp(-1))
    found = certainty_loss(logits, targets, torch.zeros(1, 1), lookahead=3)
    assert float(found.total) == pytest.approx((2 * right + 2 * wrong) / 4)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="lookahead=0"):
        certainty_loss(drawn(2, 3, 4, 5), torch.zeros(3, 4, dtype=torch.long), drawn(2, 3), lookahead=0)
    with pytest.raises(ConfigError, match="for routes only"):
        certainty_loss(drawn(2, 3, 5), torch.zeros(3, dtype=torch.long), drawn(2, 3), lookahead=5)
