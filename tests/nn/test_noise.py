"""Addressed noise against plain Python integers, and its distribution."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopwise.nn.noise import _shift_right, gumbel, gumbel_by_key, seed_key, truncated_normal, uniform

naive = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))
LARGE = st.integers(-(2**63), 2**63 - 1)


@given(seed=st.integers(-(2**70), 2**70), counters=st.lists(LARGE, min_size=1, max_size=3))
def test_equals_the_hash_in_python_integers(seed: int, counters: list[int]) -> None:
    tensors = [torch.tensor([counter]) for counter in counters]
    expected = naive["naive_uniform"](seed, "test", *counters)
    assert float(uniform(seed, "test", *tensors)) == expected
    assert float(gumbel(seed, "test", *tensors)) == pytest.approx(-math.log(-math.log(expected)), rel=1e-12)
    normal = naive["naive_normal"](seed, "test", *counters)
    assert float(truncated_normal(seed, "test", *tensors)) == pytest.approx(normal, rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(st.integers(-(2**70), 2**70), LARGE), min_size=1, max_size=5))
def test_a_key_for_each_number_changes_none(addresses: list[tuple[int, int]]) -> None:
    counters, ids = torch.tensor([[counter] for _, counter in addresses]), torch.arange(7)
    found = gumbel_by_key(torch.tensor([seed_key(seed, "test") for seed, _ in addresses])[:, None], counters, ids)
    for (seed, _), counter, row in zip(addresses, counters, found, strict=True):
        assert torch.equal(row, gumbel(seed, "test", counter, ids))


@given(LARGE, st.integers(1, 63))
def test_shifts_are_logical(x: int, bits: int) -> None:
    assert int(_shift_right(torch.tensor(x), bits)) == (x % 2**64) >> bits


@pytest.mark.parametrize("bits", [0, -1])
def test_the_interval_is_open_at_both_ends(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopwise.nn.noise._mix", lambda x: torch.full_like(x, bits))
    assert 0 < float(uniform(0, "x", torch.tensor(0))) < 1
    assert gumbel(0, "x", torch.tensor(0)).isfinite()
    assert abs(float(truncated_normal(0, "x", torch.tensor(0)))) <= 3


def test_seed_domain_order_and_each_counter_matter() -> None:
    a, b = torch.tensor([1]), torch.tensor([2])
    numbers = [
        uniform(0, "x", a, b),
        uniform(0, "x", b, a),
        uniform(0, "x", a, a),
        uniform(1, "x", a, b),
        uniform(0, "y", a, b),
        uniform(0, "x", a),
    ]
    assert len({float(number) for number in numbers}) == len(numbers)


def test_a_number_depends_on_its_own_counters_only() -> None:
    whole = uniform(3, "x", torch.arange(4)[:, None], torch.arange(100))
    assert torch.equal(whole[2, 50:60], uniform(3, "x", torch.tensor(2), torch.arange(50, 60)))


def test_distributions() -> None:
    count = 200_000
    numbers = uniform(0, "x", torch.arange(count // 100)[:, None], torch.arange(100)).flatten()
    buckets = torch.histc(numbers, 50, 0, 1)
    assert float(((buckets - count / 50) ** 2 / (count / 50)).sum()) < 100  # 49 degrees of freedom: mean 49, std 10
    pairs = numbers.view(-1, 2) - 0.5
    assert abs(float(pairs.prod(1).mean() * 12)) < 0.02
    normal = truncated_normal(0, "x", torch.arange(count))
    assert float(normal.abs().max()) < 3
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 0.98658) < 0.01  # a standard normal cut at three
    noise = gumbel(0, "x", torch.arange(count))
    assert abs(float(noise.mean()) - 0.57722) < 0.01
    assert abs(float(noise.std()) - math.pi / 6**0.5) < 0.01


def test_no_counter_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one counter"):
        uniform(0, "x")
