"""Random depths: their distribution, that they depend on their address alone, and the gradient window."""

from statistics import mean, median, quantiles

import pytest

from loopwise.errors import ConfigError
from loopwise.objectives import LoopPlan, RandomDepth


def depths(objective: RandomDepth, count: int) -> list[int]:
    return [objective.depth(seed=1, step=step, micro=0) for step in range(count)]


def test_log_normal_poisson_matches_the_published_figures() -> None:
    drawn = depths(RandomDepth(loops=32), 20_000)
    assert mean(drawn) == pytest.approx(33, abs=0.5)
    assert median(drawn) == pytest.approx(29, abs=1)
    percent = quantiles(drawn, n=100)
    assert percent[4] == pytest.approx(12, abs=1)
    assert percent[94] == pytest.approx(66, abs=2)
    assert percent[98] == pytest.approx(94, abs=4)
    assert sum(depth <= 8 for depth in drawn) / len(drawn) == pytest.approx(0.015, abs=0.004)
    assert sum(depth > 64 for depth in drawn) / len(drawn) == pytest.approx(0.056, abs=0.006)
    modal = max(range(1, 60), key=lambda depth: sum(abs(other - depth) <= 2 for other in drawn))
    assert abs(modal - 24) <= 3


def test_without_spread_it_is_a_shifted_poisson() -> None:
    drawn = depths(RandomDepth(loops=4, sigma=0.0, max_loops=100), 20_000)
    assert mean(drawn) == pytest.approx(5, abs=0.06)
    assert sum((depth - 5) ** 2 for depth in drawn) / len(drawn) == pytest.approx(4, abs=0.2)


def test_held_between_its_limits() -> None:
    free = depths(RandomDepth(loops=8, max_loops=10_000), 2_000)
    held = depths(RandomDepth(loops=8, min_loops=4, max_loops=12), 2_000)
    assert held == [min(12, max(4, depth)) for depth in free]
    assert {min(held), max(held)} == {4, 12}
    assert RandomDepth(loops=8).deepest == 32


def test_very_deep_means_do_not_underflow() -> None:
    drawn = depths(RandomDepth(loops=2_000, sigma=0.0), 50)
    assert mean(drawn) == pytest.approx(2_001, abs=30)


def test_uniform_draws_every_depth_alike() -> None:
    objective = RandomDepth(loops=5, sampler="uniform", min_loops=2)
    drawn = depths(objective, 14_000)
    assert objective.deepest == 8
    assert set(drawn) == set(range(2, 9))
    for depth in range(2, 9):
        assert drawn.count(depth) / len(drawn) == pytest.approx(1 / 7, abs=0.012)


def test_fixed() -> None:
    assert set(depths(RandomDepth(loops=6, sampler="fixed"), 50)) == {6}


def test_the_address_alone_decides() -> None:
    objective = RandomDepth(loops=32)

    def depth(seed: int, step: int, micro: int) -> int:
        return objective.depth(seed=seed, step=step, micro=micro)

    late = depth(3, 999, 2)
    assert [depth(3, step, 2) for step in range(1_000)][999] == late
    base = [depth(0, step, 0) for step in range(200)]
    assert base != [depth(1, step, 0) for step in range(200)]
    assert base != [depth(0, step, 1) for step in range(200)]
    # Written down so that a change of the hash, which would change every resumed run, cannot pass unseen.
    assert base[:8] == PINNED


PINNED = [36, 17, 60, 29, 26, 23, 21, 18]


def test_gradient_window() -> None:
    objective = RandomDepth(loops=8, backprop=8)
    plans = [objective.plan(seed=0, step=step, micro=0) for step in range(300)]
    assert {plan.loops > 8 for plan in plans} == {True, False}
    for plan in plans:
        assert plan == LoopPlan(loops=plan.loops, backprop=min(8, plan.loops), read="last")
    assert RandomDepth(loops=8, backprop=None).plan(seed=0, step=0, micro=0).backprop is None


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="log-normal-poisson, uniform, fixed"):
        RandomDepth(sampler="poisson")
    with pytest.raises(ConfigError, match="log-normal-poisson alone"):
        RandomDepth(sampler="uniform", sigma=0.3)
    with pytest.raises(ConfigError, match="draws nothing"):
        RandomDepth(sampler="fixed", max_loops=9)
    with pytest.raises(ConfigError, match="give 1 to 4"):
        RandomDepth(loops=4, min_loops=6, max_loops=4)
    with pytest.raises(ConfigError, match="backprop=0"):
        RandomDepth(backprop=0)
