"""Exits, calibration and adaptivity, on a model of which everything is known and beside brute force."""

import itertools
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from loopwise.errors import ConfigError
from loopwise.study.adaptivity import adaptivity, loops_needed
from loopwise.study.calibration import calibration
from loopwise.study.examples import of_task
from loopwise.study.exit_curves import exits, oracle, saving
from loopwise.study.record import Record, pick, record
from loopwise.study.rules import families, family_of
from loopwise.study.statistics import reliability

minds = runpy.run_path(str(Path(__file__).parent / "minds.py"))
of_tokens = runpy.run_path(str(Path(__file__).parent / "test_record.py"))["of_tokens"]
NUMBERS = minds["Numbers"](most=4)


def counted(**changes: float) -> Record:
    return record(minds["Countdown"](most=4, **changes), of_task(NUMBERS, seed=1, count=80), max_loops=5)


@pytest.mark.parametrize("kind", ["right", "loss"])
def test_the_oracle_is_the_best_of_all_choices(kind: str) -> None:
    """Every way to give 4 units one of 3 loops, tried out."""
    drawn = np.random.default_rng(7)
    worth = drawn.integers(0, 2, (3, 4)).astype(float) if kind == "right" else drawn.random((3, 4))
    best: dict[float, float] = {}
    for choice in itertools.product(range(3), repeat=4):
        mean = 1 + float(np.mean(choice))
        value = float(np.mean([worth[loop, unit] for unit, loop in enumerate(choice)]))
        best[mean] = max(best.get(mean, -math.inf), value)
    means, values = oracle(worth)
    assert means[0] == 1.0
    assert values[-1] == pytest.approx(worth.max(0).mean())
    for mean, value in zip(means, values, strict=True):
        assert value == pytest.approx(best[mean])
    for mean, value in best.items():
        # No choice lies above the chords between the oracle's points.
        assert value <= np.interp(mean, means, values) + 1e-12


def test_the_oracle_of_the_countdown_runs_just_as_many_loops_as_the_number() -> None:
    taken = counted()
    found = exits(taken)
    assert taken.difficulty is not None
    assert found.oracle_loops[-1] == pytest.approx(taken.difficulty.mean())
    assert found.oracle_accuracy[-1] == 1.0
    assert found.loops.tolist() == [1, 2, 3, 4]


def test_curves_are_the_rule_at_each_threshold() -> None:
    _, _, taken = of_tokens(loops=8)
    found = exits(taken, points=10, max_loops=6)
    units = np.arange(taken.units)
    for curve in found.curves:
        assert curve.rules[-1] == "fixed:6" or "fixed:6" in curve.rules
        for index, rule in enumerate(curve.rules):
            if rule == "fixed:6":
                used = np.full(taken.units, 6)
            else:
                family, threshold = family_of(taken, rule)
                used = np.minimum(family.exits(threshold), 6)
            assert curve.mean_loops[index] == pytest.approx(used.mean())
            assert curve.loss[index] == pytest.approx(taken.losses[used - 1, units].mean())
            assert curve.accuracy[index] == pytest.approx(taken.right[used - 1, units].mean())
            saved = curve.saved_right[index] - curve.saved_wrong[index]
            assert saved == pytest.approx(curve.accuracy[index] - taken.right[5].mean())
            reads = taken.costs.readout * (used.mean() if curve.reads else 1)
            assert curve.flops[index] == pytest.approx(used.mean() * taken.costs.per_loop + reads)
            assert curve.gain[index] == pytest.approx(found.mixed_loss(used.mean()) - curve.loss[index])
        assert (np.diff(curve.mean_loops) >= 0).all()


def test_no_rule_beats_the_oracle() -> None:
    _, _, taken = of_tokens(loops=8)
    found = exits(taken, max_loops=8)
    for curve in found.curves:
        assert (curve.accuracy <= np.interp(curve.mean_loops, found.oracle_loops, found.oracle_accuracy) + 1e-12).all()
        assert (curve.loss >= np.interp(curve.mean_loops, found.oracle_loss_loops, found.oracle_loss) - 1e-12).all()


def test_saving_stays_within_its_tolerance() -> None:
    taken = counted()
    certainty = next(family for family in families(taken) if family.name == "certainty")
    # The certainty is loop / 4 for everybody: it knows nothing of the number, and every loop is needed.
    assert saving(taken, certainty).rule == "fixed:4"
    wide = saving(taken, certainty, tolerance=1.0)
    assert (wide.mean_loops, wide.rule) == (1.0, "certainty:0.25")
    assert wide.drop.value == pytest.approx(1 - taken.right[0].mean())
    assert wide.drop.low < wide.drop.value < wide.drop.high


def test_calibration_by_loop_and_at_the_exit() -> None:
    taken = counted(sharp=3.0)
    # Equal but for the order in which a softmax adds up.
    taken = Record(**{**vars(taken), "confidence": taken.confidence.round(9)})
    found = calibration(taken, rule="certainty:0.5")
    sure = math.exp(3) / (math.exp(3) + 4)
    assert found.mean_exit == 2.0
    np.testing.assert_allclose(found.ece, np.abs(taken.right.mean(1) - sure), rtol=1e-6)
    masses = [reliability(taken.confidence[loop], taken.right[loop], equal="mass").ece for loop in range(5)]
    assert found.ece_mass.tolist() == masses
    np.testing.assert_allclose(found.brier, (taken.right * (1 - sure) ** 2 + ~taken.right * sure**2).mean(1), rtol=1e-6)
    assert found.at_exit.ece == pytest.approx(found.ece[1])
    # Confidence is the same for everybody, so it foretells nothing; at loop 4 nobody is wrong.
    row = found.signals.index("1 - confidence")
    assert found.auroc[row, :3].tolist() == [0.5, 0.5, 0.5]
    assert math.isnan(found.auroc[row, 3])
    assert found.auroc_exit[row] == 0.5


def test_signals_that_foretell_failure_are_found() -> None:
    _, _, taken = of_tokens(loops=4)
    some = np.random.default_rng(0).random((4, taken.units)) < 0.5
    taken = Record(**{**vars(taken), "right": some})
    found = calibration(taken)
    assert found.signals[0] == "1 - hazard"
    wrong = ~taken.right[2]
    assert taken.signals is not None
    pairs = [(bad, good) for bad in taken.signals[2][wrong] for good in taken.signals[2][~wrong]]
    expected = np.mean([1.0 if bad < good else 0.5 if bad == good else 0.0 for bad, good in pairs])
    assert found.auroc[0, 2] == pytest.approx(expected)


def test_a_rule_that_follows_the_number_has_rank_correlation_one() -> None:
    taken = counted()
    found = adaptivity(taken, rule="stable:1", samples=50)
    # The answer changes when the number is reached, then stays: stable:1 fires at 2, or one loop after that.
    hard = taken.difficulty
    assert hard is not None
    expected = np.where(hard <= 2, np.where(hard == 1, 2, 3), np.where(hard == 3, 2, 2))
    np.testing.assert_array_equal(found.used, np.minimum(expected, 4))
    assert found.correlation_needed.value == pytest.approx(1.0)
    assert found.correlation_needed.low == pytest.approx(1.0)
    assert found.difficulty.tolist() == [1, 2, 3, 4]
    assert found.needed.tolist() == [1, 2, 3, 4]
    assert found.mean_loops.tolist() == [2, 3, 2, 2]
    assert found.correlation.low <= found.correlation.value <= found.correlation.high


def test_loops_needed_stay_right() -> None:
    taken = counted()
    unsteady = np.array([[True, True], [False, True], [True, True], [True, True], [True, False]])
    changed = Record(**{**vars(pick(taken, np.arange(2))), "right": unsteady})
    assert loops_needed(changed).tolist() == [3, 5]


def test_many_difficulties_are_binned() -> None:
    taken = counted()
    spread = Record(**{**vars(taken), "difficulty": np.arange(80.0)})
    found = adaptivity(spread, samples=20)
    assert len(found.difficulty) == 10
    assert found.count.tolist() == [8] * 10
    assert found.rule == "certainty:0.9"


def test_a_rule_that_cannot_be_replayed_lists_those_that_can() -> None:
    with pytest.raises(ConfigError, match="allowed are certainty, delta"):
        calibration(counted(), rule="patience:2:delta:0.1")
    with pytest.raises(ConfigError, match="reads a hazard"):
        calibration(counted(), rule="hazard:0.5")
