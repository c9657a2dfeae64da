"""Filters against plain Python, and the choice by addressed noise against the distribution it stands for."""

import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopwise.engine.sampling import Sampling, candidates, choose, log_probability
from loopwise.errors import ConfigError

naive = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12, unique=True)
FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 2.5]),
        "top_k": st.none() | st.integers(1, 15),
        "top_p": st.none() | st.floats(0.05, 1.0),
        "min_p": st.none() | st.floats(0.0, 1.0),
    }
)


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def survivors(logits: list[float], sampling: Sampling) -> list[int]:
    """Top-k, then the fewest of those that reach top-p of their own sum, then min-p."""
    chance = softmax(logits, sampling.temperature)
    kept = sorted(range(len(logits)), key=lambda token: -chance[token])[: sampling.top_k]
    if sampling.top_p is not None:
        needed, found = sampling.top_p * sum(chance[token] for token in kept), []
        for token in kept:
            if sum(chance[other] for other in found) >= needed - 1e-12:
                break
            found.append(token)
        kept = found
    if sampling.min_p is not None:
        kept = [token for token in kept if chance[token] >= sampling.min_p * max(chance) - 1e-15]
    return kept


@given(LOGITS, FILTERS)
def test_filters_equal_plain_python(logits: list[float], filters: dict[str, object]) -> None:
    sampling = Sampling(**filters)
    found = candidates(torch.tensor(logits, dtype=torch.float64), sampling).tolist()
    expected = survivors(logits, sampling)
    # A sum that meets its bound to the last bit may fall on either side.
    assert found == expected or (
        sampling.top_p
        and found[: len(expected)] == expected[: len(found)]
        and abs(len(found) - len(expected)) == 1
        and near_bound(logits, sampling, found)
    )


def near_bound(logits: list[float], sampling: Sampling, found: list[int]) -> bool:
    chance = softmax(logits, sampling.temperature)
    sums = [sum(chance[token] for token in found[:count]) for count in (len(found) - 1, len(found))]
    return min(abs(total - sampling.top_p) for total in sums) < 1e-9


@given(LOGITS, FILTERS, st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 5))
def test_choice_is_the_largest_noisy_logit(
    logits: list[float], filters: dict[str, object], seed: int, position: int, sample: int
) -> None:
    sampling = Sampling(**filters, seed=seed)

    def noisy(token: int) -> float:
        noise = naive["naive_uniform"](seed, "sampling", sample, position, token)
        return logits[token] / sampling.temperature - math.log(-math.log(noise))

    tensor = torch.tensor(logits, dtype=torch.float64)
    allowed = candidates(tensor, sampling).tolist()
    assert choose(tensor, sampling, position=position, sample=sample) == max(allowed, key=noisy)


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -2.0], dtype=torch.float64)
    for sampling in (Sampling(temperature=1.3, seed=7), Sampling(temperature=0.8, top_k=4, top_p=0.95, seed=8)):
        kept = survivors(logits.tolist(), sampling)
        chance = softmax([float(logits[token]) for token in kept], sampling.temperature)
        draws = [choose(logits, sampling, position=position) for position in range(1200)]
        assert set(draws) <= set(kept)
        expected = [1200 * part for part in chance]
        square = sum((draws.count(token) - mean) ** 2 / mean for token, mean in zip(kept, expected, strict=True))
        assert square < 30  # five degrees of freedom at most: mean 5, beyond 30 once in 80,000


def test_noise_hangs_on_seed_sample_position_and_id_alone() -> None:
    logits = torch.zeros(50)
    sampling = Sampling(temperature=1.0, seed=3)
    first = [choose(logits, sampling, position=position) for position in range(40)]
    again = [choose(logits, sampling, position=position) for position in reversed(range(40))]
    assert first == again[::-1]
    assert first != [choose(logits, replace(sampling, seed=4), position=position) for position in range(40)]
    assert first != [choose(logits, sampling, position=position, sample=1) for position in range(40)]
    assert len(set(first)) > 10
    # Tokens that lose their chance do not disturb the noise of the others.
    for position, token in enumerate(first):
        fewer = logits.clone()
        fewer[[other for other in range(50) if other != token and other % 2]] = -1e9
        assert choose(fewer, sampling, position=position) == token


def test_greedy_takes_the_likeliest_whatever_the_filters() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0])
    assert choose(logits, Sampling(top_k=1, seed=9), position=5) == 1


def test_log_probability_is_raw() -> None:
    logits = torch.tensor([1.0, 2.0, 4.0])
    exact = 2.0 - math.log(sum(map(math.exp, (1.0, 2.0, 4.0))))
    assert log_probability(logits.double(), 1) == pytest.approx(exact, rel=1e-12)
    assert log_probability(logits.bfloat16(), 1) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.1},
        {"max_loops": 0},
        {"min_loops": 0},
        {"stop": ("",)},
    ],
)
def test_refusals(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))}=.*allowed is"):
        Sampling(**change)
