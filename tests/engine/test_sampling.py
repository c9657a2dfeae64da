"""Filters against plain Python, and the choice by addressed noise against the distribution it stands for."""

import itertools
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import loopwise.engine.choosing as choosing_module
from loopwise.engine.choosing import Draw, choose_batch
from loopwise.engine.sampling import (
    Sampling,
    adjusted,
    candidates,
    check_vocabulary,
    choose,
    log_probability,
)
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


def survivors(logits: list[float], sampling: Sampling, *, slack: float) -> list[int]:
    """Top-k, then the fewest of those that reach top-p of their own sum, less `slack`, then min-p."""
    chance = softmax(logits, sampling.temperature)
    kept = sorted(range(len(logits)), key=lambda token: -chance[token])[: sampling.top_k]
    if sampling.top_p is not None:
        needed, found = sampling.top_p * sum(chance[token] for token in kept), []
        for token in kept:
            if sum(chance[other] for other in found) >= needed - slack:
                break
            found.append(token)
        kept = found
    if sampling.min_p is not None:
        kept = [token for token in kept if chance[token] >= sampling.min_p * max(chance) - 1e-15]
    return kept


@given(LOGITS, FILTERS)
@example([7.0, -2.0, -3.0], {"temperature": 0.3, "top_p": 1.0})
def test_filters_equal_plain_python(logits: list[float], filters: dict[str, object]) -> None:
    sampling = Sampling(**filters)
    found = candidates(torch.tensor(logits, dtype=torch.float64), sampling).tolist()
    # A sum that meets its bound up to rounding may fall on either side.
    least, most = (survivors(logits, sampling, slack=slack) for slack in (1e-12, -1e-12))
    assert len(least) <= len(found)
    assert found == most[: len(found)]


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
        kept = survivors(logits.tolist(), sampling, slack=1e-12)
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


def test_penalty_and_bias_by_hand() -> None:
    logits = torch.tensor([3.0, -2.0, 1.0, 0.5])
    sampling = Sampling(repetition_penalty=2.0, logit_bias=((3, 1.25), (1, 4.0)))
    # Token 0 is seen twice, token 1 once; the bias comes after the penalty.
    assert adjusted(logits, sampling, seen=(0, 1, 0)).tolist() == [1.5, 0.0, 1.0, 1.75]
    assert choose(logits, sampling, position=3, seen=(0, 1, 0)) == 3
    assert choose(logits, sampling, position=3) == 0
    assert logits.tolist() == [3.0, -2.0, 1.0, 0.5]
    assert hash(sampling) == hash(replace(sampling))


def test_penalty_equals_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = (3, 17, 3, 39)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits[None].clone())[0]
    torch.testing.assert_close(adjusted(logits, Sampling(repetition_penalty=1.3), seen), expected, rtol=1e-15, atol=0)


VOCAB = 9
SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 1e-9, 0.5, 1.0, 3.0]),
        "top_k": st.none() | st.integers(1, VOCAB + 2),
        "top_p": st.none() | st.sampled_from([0.25, 0.5, 0.75, 0.9, 1.0]),
        "min_p": st.none() | st.sampled_from([0.0, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 0.5, 2.0]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-1.0, 0.5, 30.0]), max_size=3).map(
            lambda bias: tuple(bias.items())
        ),
        "logprobs": st.integers(0, 3),
        "seed": st.integers(-(2**40), 2**70),
    }
)
ADDRESSES = st.fixed_dictionaries(
    {
        "position": st.integers(0, 10_000),
        "sample": st.integers(0, 3),
        "seen": st.lists(st.integers(0, VOCAB - 1), max_size=5),
    }
)
# Few different values, so that ties are everywhere.
ROWS = st.lists(
    st.tuples(SETTINGS, ADDRESSES, st.lists(st.sampled_from([-2.0, -0.5, 0.0, 1.0]), min_size=VOCAB, max_size=VOCAB)),
    min_size=1,
)


@settings(max_examples=settings().max_examples * 3)
@given(
    rows=ROWS,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    prefix=st.integers(1, VOCAB + 1),
    numbers=st.sampled_from([1, 2 * VOCAB, 1000]),
)
def test_a_batch_equals_row_by_row(
    rows: list[tuple[dict[str, object], dict[str, object], list[float]]], dtype: torch.dtype, prefix: int, numbers: int
) -> None:
    draws = [Draw(sampling=Sampling(**settings), **address) for settings, address, _ in rows]
    logits = torch.tensor([row for _, _, row in rows], dtype=dtype)
    before = logits.clone()
    # Narrow beginnings and chunks of one row reach every path at a vocabulary that is quick to test.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing_module, "_PREFIX", prefix)
        patch.setattr(choosing_module, "_CPU_NUMBERS", numbers)
        chosen = choose_batch(logits, draws)
    expected = [
        choose(row, draw.sampling, position=draw.position, sample=draw.sample, seen=draw.seen)
        for row, draw in zip(logits, draws, strict=True)
    ]
    assert chosen.tokens.tolist() == expected
    assert chosen.logprobs.tolist() == [
        log_probability(row, token) for row, token in zip(logits, expected, strict=True)
    ]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("spread", [0.3, 3.0, 8.0])
def test_a_batch_equals_row_by_row_at_a_real_vocabulary(spread: float) -> None:
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(1)) * spread
    choices = [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        for seed, (temperature, top_k, top_p, min_p) in enumerate(
            itertools.product((0.8, 1.2), (None, 40, 900), (None, 0.95), (None, 0.05))
        )
    ]
    draws = [Draw(sampling=choices[i % len(choices)], position=100 + i, sample=i % 3) for i in range(40)]
    expected = [
        choose(row, draw.sampling, position=draw.position, sample=draw.sample)
        for row, draw in zip(logits, draws, strict=True)
    ]
    assert choose_batch(logits, draws).tokens.tolist() == expected


def test_the_likeliest_tokens_are_reported_raw() -> None:
    logits = torch.tensor([[0.0, 4.0, 1.0, 4.0], [3.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    asked = (
        Sampling(logprobs=3, logit_bias=((2, 50.0),), temperature=0.5),
        Sampling(),
        Sampling(logprobs=1, repetition_penalty=9.0),
    )
    chosen = choose_batch(logits, [Draw(sampling=sampling, position=4, seen=(3,)) for sampling in asked])
    raw = logits.log_softmax(-1)
    assert chosen.tokens.tolist() == [2, 0, 3]
    assert chosen.logprobs.tolist() == [float(raw[0, 2]), float(raw[1, 0]), float(raw[2, 3])]
    assert chosen.top_ids is not None
    assert chosen.top_logprobs is not None
    assert chosen.top_ids.tolist() == [[1, 3, 2], [-1, -1, -1], [3, -1, -1]]
    nothing = -math.inf
    assert chosen.top_logprobs.tolist() == [
        raw[0, [1, 3, 2]].tolist(),
        [nothing] * 3,
        [float(raw[2, 3]), nothing, nothing],
    ]
    assert choose_batch(logits, [Draw(sampling=Sampling(), position=4)] * 3).top_ids is None


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(logit_bias=((3, 1.0), (10, 1.0))), "logit_bias of token 10: allowed are ids from 0 to 9"),
        (Sampling(logprobs=11), "logprobs=11: allowed is 0 to 10, the size of the vocabulary"),
    ],
)
def test_settings_that_a_vocabulary_refuses(sampling: Sampling, message: str) -> None:
    check_vocabulary(sampling, 11)
    with pytest.raises(ConfigError) as error:
        check_vocabulary(sampling, 10)
    assert str(error.value) == message


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
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"logit_bias": ((-1, 2.0),)},
        {"logit_bias": ((1, 2.0), (1, 3.0))},
        {"logit_bias": ((1, math.nan),)},
        {"logprobs": -1},
        {"n": 0},
    ],
)
def test_refusals(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))}=.*allowed is"):
        Sampling(**change)
