"""Statistics that the questions share, each from its textbook definition. N units, G groups of units."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from loopwise.errors import InputError

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 0.975 for 1 to 9 degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95% interval; NaN ends where there is none, all NaN where there is no estimate."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined (one side never varies)"
        return f"{self.value:.3f}" + ("" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


def t_quantile(freedom: int) -> float:
    """Student's t at 0.975: a table below 10 degrees of freedom, from there the expansion around the normal."""
    if freedom < 1:
        raise InputError(f"{freedom} degrees of freedom; at least 2 values are needed for an interval")
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values (seeds) with Student's interval; one value has none."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(value=mean, low=math.nan, high=math.nan)
    half = t_quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Interval(value=mean, low=mean - half, high=mean + half)


def clustered_error(
    values: Float[np.ndarray, "*rows units"], groups: Int[np.ndarray, " units"]
) -> Float[np.ndarray, "*rows"]:
    """Standard error of the mean over units when units of one group depend on each other.

    sqrt(G / (G-1) sum_g (sum_{i in g} (x_i - mean))^2) / N (Liang and Zeger 1986, for a mean); NaN with one group.
    """
    _, inverse = np.unique(groups, return_inverse=True)
    count = int(inverse.max()) + 1
    if count < 2:
        return np.full(values.shape[:-1], np.nan)
    off = values - values.mean(axis=-1, keepdims=True)
    sums = np.zeros((*values.shape[:-1], count))
    np.add.at(np.moveaxis(sums, -1, 0), inverse, np.moveaxis(off, -1, 0))
    return np.asarray(np.sqrt(count / (count - 1) * (sums**2).sum(-1)) / values.shape[-1])


def bootstrap(
    statistic: Callable[[Int[np.ndarray, " drawn"]], float],
    groups: Int[np.ndarray, " units"],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Interval:
    """A statistic of units with its percentile interval, whole groups drawn with replacement (Efron 1979).

    Args:
        statistic: of the units with these indices, which may repeat.
    """
    _, inverse = np.unique(groups, return_inverse=True)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    drawn = np.random.Generator(np.random.Philox(seed))
    found = np.array(
        [
            statistic(np.concatenate([members[group] for group in drawn.integers(len(members), size=len(members))]))
            for _ in range(samples)
        ]
    )
    value = statistic(np.arange(len(groups)))
    found = found[~np.isnan(found)]
    if len(members) < 2 or not found.size:
        return Interval(value=value, low=math.nan, high=math.nan)
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(value=value, low=float(low), high=float(high))


def ranks(values: Real[np.ndarray, " units"]) -> Float[np.ndarray, " units"]:
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    after = counts.cumsum()
    shared: Float[np.ndarray, " units"] = (after - (counts - 1) / 2)[inverse]
    return shared


def rank_correlation(first: Real[np.ndarray, " units"], second: Real[np.ndarray, " units"]) -> float:
    """Spearman's rank correlation; NaN when either side never varies."""
    both = [ranks(np.asarray(values, dtype=float)) for values in (first, second)]
    if any(rank.std() == 0 for rank in both):
        return float("nan")
    return float(np.corrcoef(both[0], both[1])[0, 1])


def auroc(scores: Real[np.ndarray, " units"], positive: Bool[np.ndarray, " units"]) -> float:
    """Chance that a positive unit scores above a negative one, ties counting half (Mann and Whitney 1947).

    NaN when all are alike, or when a score is NaN.
    """
    count = int(positive.sum())
    others = len(positive) - count
    if count == 0 or others == 0 or np.isnan(scores).any():
        return math.nan
    above = float(ranks(np.asarray(scores, dtype=float))[positive].sum()) - count * (count + 1) / 2
    return above / (count * others)


def bin_edges(confidence: Float[np.ndarray, " units"], bins: int, *, equal: str) -> Float[np.ndarray, " edges"]:
    """Edges of bins of equal `width` over [0, 1], or of about equal `mass`."""
    if equal == "width":
        return np.linspace(0.0, 1.0, bins + 1)
    if equal != "mass":
        raise InputError(f"equal={equal!r}: allowed are width and mass")
    edges: Float[np.ndarray, " edges"] = np.quantile(confidence, np.linspace(0, 1, bins + 1))
    edges[0], edges[-1] = 0.0, 1.0
    return np.unique(edges)


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Confidence beside accuracy, bin by bin. Empty bins are NaN."""

    low: Float[np.ndarray, " bins"]
    """Lower edge of each bin; the upper one belongs to the next, but for 1."""
    count: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    """Mean confidence of the bin's units."""
    accuracy: Float[np.ndarray, " bins"]
    """Share of them that are right."""
    ece: float
    """Expected calibration error: sum over bins of count / N times |accuracy - confidence| (Naeini et al. 2015)."""
    brier: float
    """Mean of (confidence - right)^2 (Brier 1950)."""


def reliability(
    confidence: Float[np.ndarray, " units"],
    right: Bool[np.ndarray, " units"],
    *,
    bins: int = 10,
    equal: str = "width",
) -> Reliability:
    """How well confidence says how often one is right."""
    edges = bin_edges(confidence, bins, equal=equal)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, len(edges) - 2)
    count = np.bincount(place, minlength=len(edges) - 1)
    with np.errstate(invalid="ignore"):
        sure = np.bincount(place, confidence, minlength=len(count)) / count
        hit = np.bincount(place, right.astype(np.float64), minlength=len(count)) / count
    gaps = np.where(count > 0, np.abs(hit - sure), 0.0)
    return Reliability(
        low=edges[:-1],
        count=count,
        confidence=sure,
        accuracy=hit,
        ece=float((count * gaps).sum() / count.sum()),
        brier=float(((confidence - right) ** 2).mean()),
    )


def principal_components(
    points: Float[np.ndarray, "points features"], count: int
) -> tuple[Float[np.ndarray, "points components"], Float[np.ndarray, " components"]]:
    """Points on their first principal components, about their mean, and the share of the variance along each.

    There are as many components as points or features allow, `count` at most; shares of points that are all one are 0.
    """
    centred = points - points.mean(axis=0)
    # Components are eigenvectors of the smaller of the two products.
    small = centred.T @ centred if len(centred) >= centred.shape[1] else centred @ centred.T
    values, vectors = np.linalg.eigh(small)
    order = np.argsort(values)[::-1][:count]
    found = np.clip(values[order], 0, None)
    placed = centred @ vectors[:, order] if len(centred) >= centred.shape[1] else vectors[:, order] * np.sqrt(found)
    return placed, found / max(float(values.sum()), np.finfo(np.float64).tiny)
