"""Random depths as a pure function of (seed, step, micro-batch): nothing to save, the same on every rank."""

import hashlib
import math
from statistics import NormalDist


def draw_pair(seed: int, step: int, micro: int) -> tuple[float, float]:
    """Two independent uniform numbers strictly inside (0, 1), of 52 bits each, addressed by the three integers."""
    digest = hashlib.blake2b(f"depth {seed} {step} {micro}".encode(), digest_size=16).digest()
    first, second = (int.from_bytes(half, "little") >> 12 for half in (digest[:8], digest[8:]))
    return (first + 0.5) / 2**52, (second + 0.5) / 2**52


def uniform_depth(chance: float, *, least: int, most: int) -> int:
    """The depth from `least` to `most`, all alike, at the quantile `chance` in (0, 1)."""
    return least + math.floor(chance * (most - least + 1))


def log_normal_poisson_depth(
    rate_chance: float, count_chance: float, *, mean: float, sigma: float, least: int, most: int
) -> int:
    """tau ~ N(log mean - sigma^2 / 2, sigma), r = Poisson(exp tau) + 1, held between `least` and `most`.

    The mean of r is `mean` + 1, before it is held. Source: Huginn, arXiv 2502.05171, section 3.3 (sigma 0.5).
    """
    rate = math.exp(NormalDist(math.log(mean) - sigma**2 / 2, sigma).inv_cdf(rate_chance) if sigma else math.log(mean))
    below = 0.0
    for count in range(most - 1):
        below += math.exp(count * math.log(rate) - rate - math.lgamma(count + 1))
        if below > count_chance:
            return max(least, count + 1)
    return most
