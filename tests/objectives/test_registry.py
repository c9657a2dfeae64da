"""Objectives by short text."""

import pytest

from loopwise.errors import ConfigError
from loopwise.objectives import (
    OBJECTIVES,
    Calibration,
    EveryLoop,
    ExpectedLoss,
    LastLoop,
    Objective,
    RandomDepth,
    build_objective,
)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_name_builds_and_its_text_builds_it_again(name: str) -> None:
    objective = build_objective(name)
    assert objective.name == name
    assert build_objective(str(objective)) == objective


@pytest.mark.parametrize(
    ("text", "objective"),
    [
        ("last", LastLoop()),
        ("every:loops=6,backprop=none", EveryLoop(loops=6)),
        ("expected:beta=1e-1,beta_end=0.05, uniform_until=0.5", ExpectedLoss(beta_end=0.05, uniform_until=0.5)),
        ("expected:prior=0.3", ExpectedLoss(prior=0.3)),
        ("expected:prior=none", ExpectedLoss()),
        ("calibrate:rule=best-later,sharpness=10", Calibration(rule="best-later", sharpness=10.0)),
        ("random-depth:sampler=uniform,loops=4,backprop=2", RandomDepth(sampler="uniform", loops=4, backprop=2)),
    ],
)
def test_text_with_settings(text: str, objective: Objective) -> None:
    assert build_objective(text) == objective
    assert build_objective(str(objective)) == objective


def test_settings_win_over_text_and_change_an_objective() -> None:
    assert build_objective("last:loops=3", loops=5) == LastLoop(loops=5)
    assert build_objective(ExpectedLoss(beta=0.2), loops="8", beta_end=0.1) == ExpectedLoss(
        beta=0.2, loops=8, beta_end=0.1
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expcted", "did you mean 'expected'"),
        ("last:lops=3", "did you mean 'loops'"),
        ("last:3", "not key=value"),
        ("last:loops=three", "loops='three' is not a whole number"),
        ("last:loops=2.5", "not a whole number"),
        ("last:loops=none", "not a whole number"),
        ("last:backprop=x", "not a whole number or none; the default is backprop=none"),
        ("expected:beta=nan", "not a number"),
        ("last:loops=0", "at least one loop"),
        ("calibrate:rule=next", "label rules are"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_objective(text)
    assert "\n" not in str(caught.value)


def test_a_boolean_is_no_number() -> None:
    with pytest.raises(ConfigError, match="whole number"):
        build_objective("last", loops=True)
