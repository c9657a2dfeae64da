"""How do states travel? The principal components with what they explain, beside what no projection can invent.

A path in two components may show loops and spirals that the full state does not have; so the share of variance that the
components hold and diagnostics of the whole state stand beside every picture.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from loopwise.errors import InputError
from loopwise.study.record import Record
from loopwise.study.statistics import principal_components


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """P depths from the start state on, N units, C components, R loops."""

    model: str
    units: int
    depths: Int[np.ndarray, " depths"]
    paths: Float[np.ndarray, "depths units components"]
    """Projection of every state on the components of all states of all units, centred on their mean."""
    explained: Float[np.ndarray, " components"]
    """Share of the variance along each component."""
    change: Float[np.ndarray, " loops"]
    """Median over units of ||s_i - s_{i-1}|| / ||s_i||, of whole states."""
    cosine: Float[np.ndarray, " loops"]
    """Median cosine between successive steps, of whole states; NaN at loop 1."""
    straightness: Float[np.ndarray, " units"]
    """||s_R - s_0|| / sum_i ||s_i - s_{i-1}||: 1 is a straight line."""
    kinds: Float[np.ndarray, " units"]
    """Type of each unit: its difficulty, else its right class."""
    kind: str
    """Which of the two."""
    within: Float[np.ndarray, " loops"]
    """Mean cosine between states of different units of one type, about the mean of all units."""
    between: Float[np.ndarray, " loops"]
    """The same of units of different types."""
    chance: float
    """Share of shuffles of the types in which within less between at the last loop is as large as it is."""


def trajectory(taken: Record, *, components: int = 6, shuffles: int = 200, seed: int = 0) -> Trajectory:
    """Needs the states: record with keep_states=True.

    Raises:
        InputError: no states, or nothing to tell types of units by.
    """
    states = taken.need_states().astype(np.float64)
    paths, explained = principal_components(states.reshape(-1, states.shape[-1]), components)
    moved = np.linalg.norm(np.diff(states, axis=0), axis=-1)
    kind, kinds = _kinds(taken)
    pairs = [similarity(state, kinds) for state in states[1:]]
    drawn = np.random.Generator(np.random.Philox(seed))
    gap = pairs[-1][0] - pairs[-1][1]
    beaten = [
        (lambda found: found[0] - found[1] >= gap)(similarity(states[-1], drawn.permutation(kinds)))
        for _ in range(shuffles)
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        straight = np.linalg.norm(states[-1] - states[0], axis=-1) / moved.sum(axis=0)
    return Trajectory(
        model=taken.model,
        units=taken.units,
        depths=np.arange(len(states)),
        paths=paths.reshape(*states.shape[:2], -1),
        explained=explained,
        change=np.median(taken.change, axis=1),
        cosine=np.median(taken.cosine, axis=1),
        straightness=straight,
        kinds=kinds,
        kind=kind,
        within=np.array([pair[0] for pair in pairs]),
        between=np.array([pair[1] for pair in pairs]),
        # The order as it is counts as one of the shuffles, so that chance is never 0.
        chance=(1 + sum(beaten)) / (1 + shuffles) if not np.isnan(gap) else float("nan"),
    )


def similarity(states: Float[np.ndarray, "units features"], kinds: Float[np.ndarray, " units"]) -> tuple[float, float]:
    """Mean cosine between different units of one type, and of different types; NaN where there are no such pairs.

    Cosines are about the mean of all units, which would otherwise make everything alike.
    """
    off = states - states.mean(axis=0)
    length = np.linalg.norm(off, axis=-1, keepdims=True)
    unit = np.divide(off, length, out=np.zeros_like(off), where=length > 0)
    own = float((unit**2).sum())
    _, place, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), unit.shape[1]))
    np.add.at(sums, place, unit)
    inside = float((sums**2).sum()) - own
    outside = float((unit.sum(axis=0) ** 2).sum()) - own - inside
    pairs_inside = float((counts * (counts - 1)).sum())
    pairs_outside = float(len(kinds) * (len(kinds) - 1)) - pairs_inside
    return (
        inside / pairs_inside if pairs_inside else float("nan"),
        outside / pairs_outside if pairs_outside else float("nan"),
    )


def _kinds(taken: Record) -> tuple[str, Float[np.ndarray, " units"]]:
    if taken.difficulty is not None:
        return "difficulty", taken.difficulty
    if taken.targets is not None:
        return "right class", taken.targets.astype(np.float64)
    raise InputError("nothing tells types of these units: they state no difficulty and have several places")
