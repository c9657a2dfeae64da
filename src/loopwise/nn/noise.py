"""Addressed randomness: a number is a function of (seed, domain, counters), never of what was drawn before.

One integer hash (the finaliser of splitmix64, Steele et al. 2014) serves start states and sampling noise, so that
a result does not depend on batch mix, chunk size or device. Everything is int64 and float64.
"""

import hashlib
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from jaxtyping import Float64, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask makes it the logical shift that the hash needs.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


@lru_cache(maxsize=4096)
def seed_key(seed: int, domain: str) -> int:
    """What a seed becomes before it meets the counters."""
    digest = hashlib.sha256(f"{domain}:{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniform(seed: int, domain: str, *counters: Int[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Uniform numbers in the open interval (0, 1), one for each broadcast combination of counters.

    Args:
        seed: any integer.
        domain: what the noise is for; different domains never share numbers.
        counters: integer tensors that broadcast together (position, token id, ...). Their order matters.
    """
    return _uniform(seed_key(seed, domain), counters)


def _uniform(key: int | Tensor, counters: Sequence[Tensor]) -> Tensor:
    mixed: Tensor | None = None
    for counter in counters:
        mixed = _mix(counter.long() * _GOLDEN + (key if mixed is None else mixed))
    if mixed is None:
        raise ValueError("uniform needs at least one counter")
    # 52 bits and a half are exact in float64; with 53 the largest would round to 1.
    return (_shift_right(_mix(mixed + _GOLDEN), 12).double() + 0.5) * 2.0**-52


def truncated_normal(seed: int, domain: str, *counters: Int[Tensor, "..."], cut: float = 3.0) -> Float64[Tensor, "..."]:
    """Standard normal numbers cut at `cut` standard deviations, addressed like `uniform`."""
    low = _chance_below(-cut)
    chance = low + (1.0 - 2.0 * low) * uniform(seed, domain, *counters)
    return torch.erfinv(2.0 * chance - 1.0) * 2**0.5


@cache
def _chance_below(number: float) -> float:
    """Of a standard normal number."""
    return 0.5 * (1.0 + torch.erf(torch.tensor(number / 2**0.5, dtype=torch.float64)).item())


def gumbel(seed: int, domain: str, *counters: Int[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Standard Gumbel noise, -log(-log(u)), addressed like `uniform`."""
    return -torch.log(-torch.log(uniform(seed, domain, *counters)))


def gumbel_by_key(keys: Int[Tensor, "..."], *counters: Int[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """`gumbel` with a seed for each number: `keys`, of `seed_key`, broadcasts together with the counters."""
    return -torch.log(-torch.log(_uniform(keys, counters)))


def integer(seed: int, domain: str) -> int:
    """A non-negative 63-bit number for this (seed, domain): a seed for something else."""
    return seed_key(seed, domain) & (2**63 - 1)
