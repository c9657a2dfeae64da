"""Each statistic beside a second one: worked by hand, counted pair by pair, or integrated numerically."""

import itertools
import math

import numpy as np
import pytest

from loopwise.errors import InputError
from loopwise.study.statistics import (
    Interval,
    auroc,
    bootstrap,
    clustered_error,
    mean_interval,
    principal_components,
    rank_correlation,
    ranks,
    reliability,
    t_quantile,
)


def test_ranks_share_ties() -> None:
    assert ranks(np.array([5, 1, 5, 9])).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_rank_correlation() -> None:
    assert rank_correlation(np.array([1, 2, 3]), np.array([10, 20, 90])) == pytest.approx(1.0)
    # Ties share their mean rank: ranks 1.5 1.5 3 against 1 2 3.
    assert rank_correlation(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(rank_correlation(np.array([1, 1]), np.array([1, 2])))
    # Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)).
    drawn = np.random.default_rng(0)
    first, second = drawn.permutation(40), drawn.permutation(40)
    squares = float(((first - second) ** 2).sum())
    assert rank_correlation(first, second) == pytest.approx(1 - 6 * squares / (40 * (40**2 - 1)))


def test_auroc_is_the_share_of_pairs() -> None:
    drawn = np.random.default_rng(1)
    scores, positive = drawn.integers(0, 6, 50), drawn.random(50) < 0.4
    pairs = list(itertools.product(scores[positive], scores[~positive]))
    expected = np.mean([1.0 if high > low else 0.5 if high == low else 0.0 for high, low in pairs])
    assert auroc(scores, positive) == pytest.approx(expected)
    assert math.isnan(auroc(scores, np.zeros(50, dtype=bool)))
    assert math.isnan(auroc(np.array([1.0, math.nan]), np.array([True, False])))


def test_calibration_by_hand() -> None:
    confidence = np.array([0.05, 0.15, 0.15, 0.95, 0.95, 1.0])
    right = np.array([False, True, False, True, True, False])
    found = reliability(confidence, right, bins=10)
    assert found.count.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 3]
    assert found.accuracy[[0, 1, 9]].tolist() == pytest.approx([0.0, 0.5, 2 / 3])
    assert np.isnan(found.accuracy[5])
    gaps = 1 * 0.05 + 2 * 0.35 + 3 * abs(2 / 3 - (0.95 + 0.95 + 1.0) / 3)
    assert found.ece == pytest.approx(gaps / 6)
    assert found.brier == pytest.approx(np.mean([0.05**2, 0.85**2, 0.15**2, 0.05**2, 0.05**2, 1.0]))


def test_bins_of_equal_mass_hold_equally_many() -> None:
    drawn = np.random.default_rng(2)
    confidence = drawn.random(100) ** 4
    found = reliability(confidence, drawn.random(100) < confidence, bins=5, equal="mass")
    assert found.count.tolist() == [20] * 5
    with pytest.raises(InputError, match="width and mass"):
        reliability(confidence, confidence > 0.5, equal="size")


def test_perfect_calibration_has_no_error() -> None:
    confidence = np.repeat([0.25, 0.75], [40, 40])
    right = np.concatenate([np.arange(40) < 10, np.arange(40) < 30])
    assert reliability(confidence, right).ece == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 5, 9, 10, 14, 30])
def test_t_quantile_leaves_a_fortieth_above(freedom: int) -> None:
    """The density, integrated up to the quantile by Simpson's rule."""
    high = t_quantile(freedom)
    grid = np.linspace(0, high, 20001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_scale) * (1 + grid**2 / freedom) ** (-(freedom + 1) / 2)
    weights = np.where(np.arange(len(grid)) % 2, 4, 2)
    weights[[0, -1]] = 1
    area = 0.5 + float((weights * density).sum()) * (grid[1] - grid[0]) / 3
    assert area == pytest.approx(0.975, abs=2e-5)


def test_intervals_over_seeds() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.value, found.high - found.value) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    assert math.isnan(mean_interval([1.0]).low)
    assert str(found) == "2.000 [-0.484, 4.484]"
    assert str(mean_interval([1.0])) == "1.000"
    assert str(Interval(value=math.nan, low=math.nan, high=math.nan)).startswith("undefined")


def test_the_clustered_error_is_the_plain_one_when_every_unit_stands_alone() -> None:
    values = np.random.default_rng(3).random(30)
    assert clustered_error(values, np.arange(30)) == pytest.approx(values.std(ddof=1) / math.sqrt(30))


def test_the_clustered_error_counts_copies_once() -> None:
    values = np.random.default_rng(4).random(12)
    copies, groups = np.repeat(values, 5), np.repeat(np.arange(12), 5)
    both = np.stack([copies, 2 * copies])
    alone = values.std(ddof=1) / math.sqrt(12)
    assert clustered_error(both, groups).tolist() == pytest.approx([alone, 2 * alone])
    assert math.isnan(clustered_error(values, np.zeros(12, dtype=int)))


def test_the_bootstrap_draws_whole_groups() -> None:
    values, groups = np.repeat([0.0, 1.0], 50), np.repeat([0, 1], 50)
    seen = set()

    def mean(units: np.ndarray) -> float:
        seen.add(round(float(values[units].mean()), 9))
        return float(values[units].mean())

    found = bootstrap(mean, groups, samples=200)
    assert seen == {0.0, 0.5, 1.0}
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_the_bootstrap_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(5).normal(size=400)
    found = bootstrap(lambda units: float(values[units].mean()), np.arange(400), samples=2000)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    again = bootstrap(lambda units: float(values[units].mean()), np.arange(400), samples=2000)
    assert again == found


@pytest.mark.parametrize("shape", [(40, 6), (5, 12), (3, 2), (1, 4)])
def test_principal_components_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    points = np.random.default_rng(1).normal(size=shape) * np.arange(1, shape[1] + 1)
    placed, shares = principal_components(points, 3)
    centred = points - points.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    kept = min(3, len(sizes))
    np.testing.assert_allclose(np.abs(placed[:, :kept]), np.abs(left * sizes)[:, :kept], atol=1e-6)
    total = (sizes**2).sum()
    np.testing.assert_allclose(shares[:kept], sizes[:kept] ** 2 / total if total else 0.0, atol=1e-9)
