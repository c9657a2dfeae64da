"""Do later loops decide anything? Agreement of answers between loops, and what can be read of them beforehand.

If every loop only repeats the first one's answer, the others are for show. Ouro (arXiv 2510.25741, section 6) compares
answers between loops and asks linear probes on the states of one loop for the answers of another.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from loopwise.errors import InputError
from loopwise.study.record import Record


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """R loops, P depths from the start state on."""

    model: str
    units: int
    loops: Int[np.ndarray, " loops"]
    agreement: Float[np.ndarray, "loops loops_again"]
    """Share of units with the same answer at both loops."""
    changed: Float[np.ndarray, " loops"]
    """Share whose answer differs from the loop before; NaN at loop 1."""
    mended: Float[np.ndarray, " loops"]
    """Share that was wrong the loop before and is right; NaN at loop 1."""
    spoiled: Float[np.ndarray, " loops"]
    """Share that was right the loop before and is wrong."""
    depths: Int[np.ndarray, " depths"]
    probe: Float[np.ndarray, "depths loops"]
    """Held-out accuracy of a linear probe on the state at a depth for the answer at a loop."""
    baseline: Float[np.ndarray, " loops"]
    """Held-out accuracy of always guessing the commonest answer of the training half."""
    probe_truth: Float[np.ndarray, " depths"]
    """The same probe asked for the right answer; NaN where units have several places."""
    trained_on: int
    """Units that probes were fitted to; the others, of other problems, are held out."""
    held_out: int


def faithfulness(taken: Record, *, ridge: float = 1e-2, seed: int = 0) -> Faithfulness:
    """Needs the states: record with keep_states=True.

    Args:
        ridge: penalty of the probes, as a share of the number of units they are fitted to, on standardised features.

    Raises:
        InputError: no states, or fewer than two problems to split.
    """
    states = taken.need_states()
    fitted = split(taken.problem, seed=seed)
    agreement = np.array([[(one == two).mean() for two in taken.answers] for one in taken.answers])
    unknown = np.array([np.nan])
    was, now = taken.right[:-1], taken.right[1:]
    asked = [*taken.answers, *([] if taken.targets is None else [taken.targets])]
    found = np.array([probe_accuracy(state, asked, fitted, ridge=ridge) for state in states])
    return Faithfulness(
        model=taken.model,
        units=taken.units,
        loops=taken.depths,
        agreement=agreement,
        changed=np.concatenate([unknown, (taken.answers[1:] != taken.answers[:-1]).mean(axis=1)]),
        mended=np.concatenate([unknown, (~was & now).mean(axis=1)]),
        spoiled=np.concatenate([unknown, (was & ~now).mean(axis=1)]),
        depths=np.arange(len(states)),
        probe=found[:, : taken.loops],
        baseline=np.array([_commonest(answers, fitted) for answers in taken.answers]),
        probe_truth=found[:, taken.loops] if taken.targets is not None else np.full(len(states), np.nan),
        trained_on=int(fitted.sum()),
        held_out=int((~fitted).sum()),
    )


def split(problem: Int[np.ndarray, " units"], *, seed: int) -> Bool[np.ndarray, " units"]:
    """True for the units of a random half of the problems. Raises InputError with fewer than two problems."""
    kinds, place = np.unique(problem, return_inverse=True)
    if len(kinds) < 2:
        raise InputError("probes are fitted to some problems and tried on others; give at least 2")
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(kinds))
    chosen = np.zeros(len(kinds), dtype=bool)
    chosen[order[: (len(kinds) + 1) // 2]] = True
    return np.asarray(chosen[place])


def probe_accuracy(
    features: Float[np.ndarray, "units features"],
    asked: list[Int[np.ndarray, " units"]],
    fitted: Bool[np.ndarray, " units"],
    *,
    ridge: float,
) -> list[float]:
    """Accuracy on units not fitted of a linear classifier for each of several labels.

    The classifier is ridge regression to one-hot labels, solved exactly; a label that was never fitted counts as
    missed.
    """
    x = features.astype(np.float64)
    mean, spread = x[fitted].mean(axis=0), x[fitted].std(axis=0)
    x = np.concatenate([(x - mean) / np.where(spread > 0, spread, 1.0), np.ones((len(x), 1))], axis=1)
    left = x[fitted].T @ x[fitted] + ridge * fitted.sum() * np.eye(x.shape[1])
    found = []
    for labels in asked:
        kinds, place = np.unique(labels[fitted], return_inverse=True)
        right = np.zeros((x.shape[1], len(kinds)))
        np.add.at(right.T, place, x[fitted])
        guess = kinds[(x[~fitted] @ np.linalg.solve(left, right)).argmax(axis=1)]
        found.append(float((guess == labels[~fitted]).mean()))
    return found


def _commonest(answers: Int[np.ndarray, " units"], fitted: Bool[np.ndarray, " units"]) -> float:
    kinds, counts = np.unique(answers[fitted], return_counts=True)
    return float((answers[~fitted] == kinds[counts.argmax()]).mean())
