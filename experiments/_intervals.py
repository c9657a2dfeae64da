"""Intervals: over seeds (Student's t), of a share (Wilson), of anything else (bootstrap)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np
from jaxtyping import Shaped

# The 97.5% quantile of Student's t by degrees of freedom; beyond the table it is within 1.5% of the expansion below.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z_975 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the 95% interval around it."""

    mean: float
    low: float
    high: float
    count: int
    """How many values it is made of."""

    def text(self, digits: int = 1, scale: float = 1.0, unit: str = "", sign: bool = False) -> str:
        """`47.1 (40.2 to 54.0)`; `scale=100` for points."""
        kind = f"{'+' if sign else ''}.{digits}f"
        mean, low, high = (format(scale * value, kind) for value in (self.mean, self.low, self.high))
        return f"{mean}{unit} ({low} to {high})"

    def __str__(self) -> str:
        return self.text(3)


def t_interval(values: Sequence[float]) -> Interval:
    """The mean's 95% interval under Student's t; of a single value it is infinitely wide."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean=mean, low=-math.inf, high=math.inf, count=len(values))
    half = _t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half, count=len(values))


def _t_quantile(freedom: int) -> float:
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    return _Z_975 + (_Z_975**3 + _Z_975) / (4 * freedom)


def share_interval(right: int, count: int) -> Interval:
    """Wilson's 95% interval of a share: `right` of `count` independent trials."""
    z2 = _Z_975**2
    share = right / count
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z_975 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Interval(mean=share, low=centre - half, high=centre + half, count=count)


def bootstrap(
    statistic: Callable[..., float], *samples: Shaped[np.ndarray, "n ..."], draws: int = 1000, seed: int = 0
) -> Interval:
    """Percentiles of a statistic of rows drawn anew, the same rows of every array, with the statistic itself."""
    count = len(samples[0])
    rng = np.random.Generator(np.random.Philox(seed))
    values = []
    for _ in range(draws):
        rows = rng.integers(0, count, count)
        values.append(statistic(*(sample[rows] for sample in samples)))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Interval(mean=float(statistic(*samples)), low=float(low), high=float(high), count=count)
