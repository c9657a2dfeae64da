import math

import pytest

from loopwise.errors import ConfigError
from loopwise.train.schedule import ScheduleConfig, multiplier


def curve(config: ScheduleConfig, steps: int) -> list[float]:
    return [multiplier(config, step, steps) for step in range(steps + 1)]


def test_warmup_stable_decay_by_hand():
    config = ScheduleConfig(warmup=4, decay=5)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert curve(config, 10) == pytest.approx(expected, abs=1e-12)


def test_one_minus_square_root_reaches_the_final_fraction():
    config = ScheduleConfig(decay=4, shape="1-sqrt", final=0.1)
    expected = [1.0, 1.0] + [0.1 + 0.9 * (1 - math.sqrt(x)) for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert curve(config, 6) == pytest.approx(expected, abs=1e-12)


def test_cosine_is_half_way_down_in_the_middle():
    config = ScheduleConfig(kind="cosine", warmup=2, final=0.2)
    values = curve(config, 12)
    assert values[:3] == [0.5, 1.0, 1.0]
    assert values[7] == pytest.approx(0.6)
    assert values[12] == pytest.approx(0.2)
    assert values[2:] == sorted(values[2:], reverse=True)


def test_constant_after_warmup():
    assert curve(ScheduleConfig(kind="constant", warmup=2), 4) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_a_cosine_that_is_all_warmup():
    assert curve(ScheduleConfig(kind="cosine", warmup=2), 2)[:2] == [0.5, 1.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "linear"},
        {"shape": "exp"},
        {"warmup": -1},
        {"final": 1.5},
        {"kind": "cosine", "decay": 3},
        {"kind": "constant", "final": 0.1},
        {"final": 0.1},
    ],
)
def test_wrong_settings_are_refused_in_one_line(wrong):
    with pytest.raises(ConfigError) as error:
        ScheduleConfig(**wrong)
    assert "\n" not in str(error.value)
    assert "schedule." in str(error.value)


def test_a_schedule_longer_than_the_stage_is_refused():
    with pytest.raises(ConfigError, match="do not fit into 10 steps"):
        multiplier(ScheduleConfig(warmup=6, decay=6), 0, 10)
