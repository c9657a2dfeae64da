"""Does the model know when it is right? Reliability by loop and at the exit, and what foretells a failure."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from loopwise.study.record import Record
from loopwise.study.rules import default_rule, family_of
from loopwise.study.statistics import Reliability, auroc, reliability


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """R loops, B bins, Q signals."""

    model: str
    units: int
    loops: Int[np.ndarray, " loops"]
    accuracy: Float[np.ndarray, " loops"]
    confidence: Float[np.ndarray, " loops"]
    """Mean probability of the answer."""
    ece: Float[np.ndarray, " loops"]
    """With bins of equal width."""
    ece_mass: Float[np.ndarray, " loops"]
    """With bins of equal mass."""
    brier: Float[np.ndarray, " loops"]
    by_loop: tuple[Reliability, ...]
    rule: str
    """The rule of the exit."""
    mean_exit: float
    at_exit: Reliability
    """Of every unit at the loop where the rule stops it, by replay."""
    signals: tuple[str, ...]
    """What may foretell that the answer of the same loop is wrong; each is turned so that more means failure."""
    auroc: Float[np.ndarray, "signals loops"]
    """Chance that a wrong unit shows more of it than a right one; 0.5 knows nothing. NaN where all are alike."""
    auroc_exit: Float[np.ndarray, " signals"]
    """The same at the exit."""


def calibration(taken: Record, *, rule: str | None = None, bins: int = 10) -> Calibration:
    """Calibration at every loop, and at the exit of `rule` (default: the model's own signal at its default).

    No unit exits after more loops than were trained, however many were recorded.
    """
    rule = rule or default_rule(taken)
    family, threshold = family_of(taken, rule)
    used = np.minimum(family.exits(threshold), taken.trained_loops[1])
    units = np.arange(taken.units)
    found = [reliability(taken.confidence[loop], taken.right[loop], bins=bins) for loop in range(taken.loops)]
    mass = [
        reliability(taken.confidence[loop], taken.right[loop], bins=bins, equal="mass") for loop in range(taken.loops)
    ]
    warnings = failure_signals(taken)
    wrong = ~taken.right
    return Calibration(
        model=taken.model,
        units=taken.units,
        loops=taken.depths,
        accuracy=taken.right.mean(axis=1),
        confidence=taken.confidence.mean(axis=1),
        ece=np.array([each.ece for each in found]),
        ece_mass=np.array([each.ece for each in mass]),
        brier=np.array([each.brier for each in found]),
        by_loop=tuple(found),
        rule=family.rule(threshold),
        mean_exit=float(used.mean()),
        at_exit=reliability(taken.confidence[used - 1, units], taken.right[used - 1, units], bins=bins),
        signals=tuple(warnings),
        auroc=np.array([[auroc(row, bad) for row, bad in zip(rows, wrong, strict=True)] for rows in warnings.values()]),
        auroc_exit=np.array([auroc(rows[used - 1, units], wrong[used - 1, units]) for rows in warnings.values()]),
    )


def failure_signals(taken: Record) -> dict[str, Float[np.ndarray, "loops units"]]:
    """What can be measured at a loop without the answer, turned so that more should mean failure."""
    found = {
        "1 - confidence": 1 - taken.confidence,
        "1 - certainty": 1 - taken.certainty,
        "change of state": taken.change,
        "KL to previous": taken.kl,
        "not yet stable": -taken.streak.astype(np.float64),
    }
    if taken.signals is not None and taken.signal_kind is not None:
        name = taken.signal_kind.replace("_", " ")
        found = {f"1 - {name}" if taken.signal_kind != "halt_logit" else f"-{name}": -taken.signals} | found
    return found
