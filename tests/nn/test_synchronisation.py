import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.nn.synchronisation import (
    MOST_DECAY,
    choose_neurons,
    count_pairs,
    pair_up,
    products,
    retention,
    sides_of,
    synchronisation,
)


def draw(pairing: str, neurons: int = 12, chosen: int = 5, *, last: bool = False, self_pairs: int = 0) -> Tensor:
    generator = np.random.default_rng(3)
    return choose_neurons(
        pairing, neurons=neurons, chosen=chosen, last=last, self_pairs=self_pairs, generator=generator
    )


def recursive(activity: Tensor, pairs: Tensor, kept: Tensor) -> Tensor:
    """(T, N, D) -> the synchronisation after the last tick, as a machine carries it."""
    total = products(activity[0], pairs)
    weight = torch.ones_like(total)
    for z in activity[1:]:
        total, weight = kept * total + products(z, pairs), kept * weight + 1
    return synchronisation(total, weight)


def direct(activity: Tensor, pairs: Tensor, decay: Tensor) -> Tensor:
    """The paper's sum, written out pair by pair."""
    ticks, rows, _ = activity.shape
    out = torch.zeros(rows, pairs.shape[1], dtype=activity.dtype)
    for row in range(rows):
        for number, (i, j) in enumerate(pairs.T.tolist()):
            weights = [math.exp(-float(decay[number]) * (ticks - 1 - s)) for s in range(ticks)]
            series = [float(activity[s, row, i] * activity[s, row, j]) for s in range(ticks)]
            out[row, number] = sum(w * p for w, p in zip(weights, series, strict=True)) / math.sqrt(sum(weights))
    return out


@pytest.mark.parametrize("pairing", ["first-last", "random", "random-pairing"])
def test_the_recursion_equals_the_direct_sum(pairing: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = pair_up(pairing, draw(pairing))
    activity = torch.randn(7, 3, 12, generator=generator, dtype=torch.float64)
    decay = 2 * torch.rand(pairs.shape[1], generator=generator, dtype=torch.float64)
    torch.testing.assert_close(recursive(activity, pairs, retention(decay)), direct(activity, pairs, decay))


def test_without_decay_it_is_a_plain_mean_times_the_root_of_the_count() -> None:
    activity = torch.randn(9, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = pair_up("random-pairing", draw("random-pairing"))
    found = recursive(activity, pairs, retention(torch.zeros(5, dtype=torch.float64)))
    torch.testing.assert_close(found, products(activity.flatten(0, 1), pairs).view(9, 2, 5).sum(0) / 3)


def test_sizes() -> None:
    assert count_pairs("first-last", 64) == 2080
    assert count_pairs("random", 32) == 528
    assert count_pairs("random-pairing", 32) == 32
    for pairing in ("first-last", "random", "random-pairing"):
        assert pair_up(pairing, draw(pairing)).shape == (2, count_pairs(pairing, 5))


def test_first_last_takes_the_first_for_answers_and_the_last_for_attention() -> None:
    assert draw("first-last").tolist() == [[0, 1, 2, 3, 4]] * 2
    assert draw("first-last", last=True).tolist() == [[7, 8, 9, 10, 11]] * 2
    assert pair_up("first-last", draw("first-last", chosen=3)).T.tolist() == [
        [0, 0],
        [0, 1],
        [0, 2],
        [1, 1],
        [1, 2],
        [2, 2],
    ]


def test_self_pairs_are_a_neuron_with_itself() -> None:
    left, right = draw("random-pairing", neurons=1000, chosen=8, self_pairs=3)
    assert torch.equal(left[:3], right[:3])
    assert not (left[3:] == right[3:]).any()


@pytest.mark.parametrize("pairing", ["first-last", "random", "random-pairing"])
def test_sides_are_found_again(pairing: str) -> None:
    sides = draw(pairing)
    assert torch.equal(sides_of(pairing, pair_up(pairing, sides), 5), sides)


def test_pairs_that_no_choice_makes_are_refused() -> None:
    pairs = pair_up("random", draw("random")).clone()
    pairs[0, 1] = (pairs[0, 1] + 1) % 12
    with pytest.raises(ConfigError, match="not what pairing='random' of 5"):
        sides_of("random", pairs, 5)


def slope(decay: float, target: float) -> float:
    """Gradient of how far `retention` is above (target 1) or below (target -1) something."""
    leaf = torch.tensor([decay], dtype=torch.float64, requires_grad=True)
    (target * retention(leaf).sum()).backward()
    return float(leaf.grad)


def test_a_decay_of_zero_learns_both_ways() -> None:
    assert slope(0.0, 1.0) == -1.0
    assert slope(0.0, -1.0) == 1.0


def test_a_decay_outside_can_come_back_and_goes_no_further() -> None:
    assert slope(-0.3, 1.0) == -1.0  # descent raises it, back to 0
    assert slope(-0.3, -1.0) == 0.0
    assert slope(MOST_DECAY + 1, 1.0) == 0.0
    assert slope(MOST_DECAY + 1, -1.0) == pytest.approx(math.exp(-MOST_DECAY))
    assert retention(torch.tensor([-1.0, 0.0, 99.0])).tolist() == pytest.approx([1.0, 1.0, math.exp(-15.0)])
