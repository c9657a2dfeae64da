"""Where do the states go? Steps, angles, distance to the end; fixed point, cycle or drift; what a push undoes.

All measures are of whole states, never of a projection. Huginn's paper (arXiv 2502.05171, section 7) names orbits and
fixed points by eye; here a unit is told by its distances at the end of the run:

    D_k = ||s_R - s_{R-k}|| / ||s_R||        fixed   D_1 < tolerance
                                             cycle   else, if D_k < tolerance for some k >= 2; its period is the least
                                             moving  else
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.errors import ConfigError, InputError, LoopRangeWarning
from loopwise.loops.hazard import widen
from loopwise.loops.protocol import LoopModel, first_tensor, flat_state, tree_map
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.examples import Examples
from loopwise.study.record import Record
from loopwise.tasks.problems import IGNORED

KINDS = ("fixed", "cycle", "moving")
QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """R loops, N units; quartiles are over units."""

    model: str
    units: int
    trained_loops: tuple[int, int]
    loops: Int[np.ndarray, " loops"]
    change: Float[np.ndarray, "quartiles loops"]
    """||s_i - s_{i-1}|| / ||s_i||."""
    cosine: Float[np.ndarray, "quartiles loops"]
    """Cosine between successive steps; NaN at loop 1."""
    norm: Float[np.ndarray, "quartiles loops"]
    distance: Float[np.ndarray, "quartiles loops"]
    """||s_i - s_R|| / ||s_R||."""
    tolerance: float
    kind: Int[np.ndarray, " units"]
    """0 fixed, 1 cycle, 2 moving."""
    period: Int[np.ndarray, " units"]
    """1 at a fixed point, the period of a cycle, 0 while moving."""
    shares: dict[str, float]
    """Share of units of each kind."""
    factor: float
    """Median over units of the mean factor by which steps change from loop to loop over the last half: below 1 they
    shrink."""


def convergence(taken: Record, *, tolerance: float = 0.01) -> Convergence:
    """Needs the states: record with keep_states=True, and with many loops to tell where they end."""
    if not tolerance > 0:
        raise ConfigError(f"tolerance={tolerance}: allowed is a number above 0")
    if taken.loops < 2:
        raise InputError("one loop goes nowhere; record 2 loops or more")
    states = taken.need_states()
    kind, period = end_of(states, tolerance=tolerance)
    last = states[-1]
    size = np.linalg.norm(last, axis=-1)
    away = np.stack([np.linalg.norm(state - last, axis=-1) / size for state in states[1:]])
    moved = np.linalg.norm(np.diff(states, axis=0), axis=-1)
    half = moved[taken.loops // 2 :] if taken.loops > 3 else moved
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = (half[-1] / half[0]) ** (1 / max(len(half) - 1, 1))
    return Convergence(
        model=taken.model,
        units=taken.units,
        trained_loops=taken.trained_loops,
        loops=taken.depths,
        change=_quartiles(taken.change),
        cosine=_quartiles(taken.cosine),
        norm=_quartiles(taken.norms),
        distance=_quartiles(away),
        tolerance=tolerance,
        kind=kind,
        period=period,
        shares={name: float((kind == index).mean()) for index, name in enumerate(KINDS)},
        factor=float(np.median(factors[np.isfinite(factors)])) if np.isfinite(factors).any() else float("nan"),
    )


def end_of(
    states: Float[np.ndarray, "depths units features"], *, tolerance: float
) -> tuple[Int[np.ndarray, " units"], Int[np.ndarray, " units"]]:
    """How each unit's run ends: the kind (0 fixed, 1 cycle, 2 moving) and the period.

    Periods up to a third of the run are looked for, so that a cycle is seen at least twice.
    """
    last = states[-1]
    size = np.linalg.norm(last, axis=-1)
    longest = max(1, (len(states) - 1) // 3)
    back = np.stack([np.linalg.norm(last - states[-1 - k], axis=-1) for k in range(1, longest + 1)])
    near = back < tolerance * np.where(size > 0, size, 1.0)
    period = np.where(near.any(axis=0), near.argmax(axis=0) + 1, 0)
    return np.select([period == 1, period > 1], [0, 1], default=2), period


def _quartiles(values: Float[np.ndarray, "loops units"]) -> Float[np.ndarray, "quartiles loops"]:
    known = ~np.isnan(values).all(axis=1)
    found = np.full((len(QUARTILES), len(values)), np.nan)
    if known.any():
        found[:, known] = np.nanquantile(values[known], QUARTILES, axis=1)
    return found


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a push leaves behind. L loops from the pushed one to the last; quartiles are over units."""

    at: int
    """The loop after which the state was pushed."""
    size: float
    """Length of the push as a share of the state's norm; its direction is random."""
    loops: Int[np.ndarray, " loops"]
    distance: Float[np.ndarray, "quartiles loops"]
    """Distance between the pushed and the untouched run, as a share of the untouched state's norm."""
    same_answer: Float[np.ndarray, " loops"]
    """Share of units whose answer is the same in both."""
    recovered: float
    """Share of units that end nearer to the untouched run than the push had put them."""


@torch.no_grad()
def perturb(
    model: LoopModel,
    data: Sequence[Examples],
    *,
    at: int,
    size: float = 0.1,
    max_loops: int | None = None,
    start: Any = None,
    seed: int = 0,
) -> Recovery:
    """Push every unit's state once, in a random direction, and run on beside the untouched run.

    All units of a batch are pushed together, so what a token reads of others is pushed too.

    Raises:
        ConfigError: for a loop that leaves nothing to run, or a push of no length.
    """
    most = max_loops or 2 * model.facts.trained_loops[1]
    if not 1 <= at < most:
        raise ConfigError(f"at={at}: allowed is 1 to {most - 1}, so that loops are left to recover in")
    if not size > 0:
        raise ConfigError(f"size={size}: allowed is a number above 0")
    away, same = [], []
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopRangeWarning)
        for examples in data:
            context = model.encode(examples.inputs, **examples.options)
            state = model.initial_state(context, start)
            for loop in range(1, at + 1):
                state = model.step(state, context, loop)
            pushed = _push(model, state, context, size, generator)
            rows = []
            for loop in range(at, most + 1):
                if loop > at:
                    state, pushed = model.step(state, context, loop), model.step(pushed, context, loop)
                one, two = (_units(model, each, context, examples) for each in (state, pushed))
                rows.append(((two - one).norm(dim=1) / one.norm(dim=1), _same(model, state, pushed, context, examples)))
            away.append(torch.stack([row[0] for row in rows]))
            same.append(torch.stack([row[1] for row in rows]))
    distance = torch.cat(away, dim=1).double().cpu().numpy()
    return Recovery(
        at=at,
        size=size,
        loops=np.arange(at, most + 1),
        distance=_quartiles(distance),
        same_answer=torch.cat(same, dim=1).double().mean(1).cpu().numpy(),
        recovered=float((distance[-1] < distance[0]).mean()),
    )


def _push(model: LoopModel, state: Any, context: Any, size: float, generator: torch.Generator) -> Any:
    """Every unit moved by `size` times its norm; whole numbers of a state stay as they are."""

    def noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros_like(tensor)
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    drawn = tree_map(noise, state)
    if model.facts.unit == "sample":
        axes = 1
        scale = size * flat_state(state).norm(dim=1) / flat_state(drawn).norm(dim=1)
    else:
        axes = first_tensor(state).dim() - 1
        scale = size * first_tensor(state).norm(dim=-1) / first_tensor(drawn).norm(dim=-1)
    pairs = iter(_leaves(drawn))

    def moved(tensor: Tensor) -> Tensor:
        step = next(pairs)
        sized: Tensor = tensor + step * scale.reshape(*scale.shape, *[1] * (tensor.dim() - axes))
        return sized.to(tensor.dtype)

    return tree_map(moved, state)


def _leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda tensor: found.append(tensor) or tensor, tree)  # type: ignore[func-returns-value]
    return found


def _units(model: LoopModel, state: Any, context: Any, examples: Examples) -> Tensor:
    if model.facts.unit == "sample":
        return widen(flat_state(state))
    asked = (examples.targets != IGNORED).to(first_tensor(state).device)
    if isinstance(model, LoopedLM):
        return widen(state[asked])
    return widen(flat_state(model.open_rows(state, context)[0])[asked.flatten()])


def _same(model: LoopModel, state: Any, pushed: Any, context: Any, examples: Examples) -> Tensor:
    both = [model.readout(each, context) for each in (state, pushed)]
    if examples.read is not None:
        both = [examples.read(each) for each in both]
    equal: Tensor = both[0].argmax(-1) == both[1].argmax(-1)
    asked = (examples.targets != IGNORED).to(equal.device)
    if model.facts.unit != "sample":
        return equal[asked]
    whole: Tensor = (equal | ~asked).reshape(len(equal), -1).all(1)
    return whole


@dataclass(frozen=True, kw_only=True)
class ConvergenceMap:
    """Distance to the end, token by token and loop by loop (Huginn, figure of convergence)."""

    tokens: tuple[str, ...]
    """Text of each unit."""
    depths: Int[np.ndarray, " depths"]
    """0 is the start state."""
    distance: Float[np.ndarray, "units depths"]
    """||s_i - s_R||, in the units of the state; 0 at R."""


def convergence_map(taken: Record, texts: Sequence[str], *, problem: int = 0) -> ConvergenceMap:
    """The units of one problem.

    Args:
        texts: of these units, in their order.

    Raises:
        InputError: there is no such problem, or the texts are not as many as its units.
    """
    states = taken.need_states()
    units = np.flatnonzero(taken.problem == problem)
    if not len(units) or len(texts) != len(units):
        raise InputError(
            f"problem {problem} has {len(units)} units and {len(texts)} texts; give one text for each unit"
        )
    away = np.linalg.norm(states[:, units] - states[-1, units], axis=-1)
    return ConvergenceMap(tokens=tuple(texts), depths=np.arange(len(states)), distance=away.T.astype(np.float64))
