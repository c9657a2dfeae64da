"""How far to run ahead: the arithmetic of drafts, on costs that are given."""

import math
from pathlib import Path

import pytest

from loopwise.engine.costs import CostCurve, measure_costs
from loopwise.engine.speculation import (
    MOST,
    Pace,
    Speculation,
    Speculator,
    parse_speculation,
    saved_speculation,
)
from loopwise.errors import CheckpointError, ConfigError

FREE = CostCurve(rows=(1, 64), seconds=(1.0, 1.0))
DEAR = CostCurve(rows=(1, 64), seconds=(1.0, 64.0))


def speculator(costs: CostCurve, *, loops: int, settles: float) -> Speculator:
    """One that has seen drafts settle after `settles` of `loops` loops for a long time."""
    made = Speculator(Speculation(), lambda: costs, loops)
    for turn in range(400):
        settled = math.floor(settles) if (turn % 10) / 10 >= settles % 1 else math.ceil(settles)
        made.learn(loops=loops, settled=settled, asked=True)
    return made


def test_costs_between_measurements_lie_on_a_line() -> None:
    curve = CostCurve(rows=(1, 2, 4), seconds=(1.0, 1.5, 2.5))
    assert [curve(rows) for rows in (0.5, 1, 1.5, 2, 3, 4, 8)] == pytest.approx([1.0, 1.0, 1.25, 1.5, 2.0, 2.5, 5.0])


def test_no_number_of_rows_costs_more_than_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    # Two rows are held up by something else in every round but the warm-up.
    takes = {1: [1.0] * 4, 2: [1.0, 9.0, 8.0, 9.0], 3: [1.5] * 4}
    turns = {1: 0, 2: 0, 3: 0}

    def run(count: int) -> None:
        nonlocal now
        now += takes[count][turns[count]]
        turns[count] += 1

    monkeypatch.setattr("loopwise.engine.costs.time.perf_counter", lambda: now)
    curve = measure_costs(run, rows=(1, 2, 3), rounds=3)
    assert curve.seconds == (1.0, 1.5, 1.5)


@pytest.mark.parametrize(("loops", "settles", "window"), [(4, 1, 3), (4, 2, 3), (8, 1, MOST), (8, 2, MOST), (4, 4, 0)])
def test_free_rows_are_used_where_drafts_settle_before_the_end(loops: int, settles: float, window: int) -> None:
    assert speculator(FREE, loops=loops, settles=settles).window(1) == window


def test_dear_rows_are_not_used() -> None:
    assert speculator(DEAR, loops=8, settles=1).window(1) == 0
    assert speculator(DEAR, loops=8, settles=1).window(32) == 0


def test_drafts_have_places_only_while_these_are_nearly_free() -> None:
    # Up to 8 rows cost nothing, from there on each costs its share: a small crowd leaves few places.
    curve = CostCurve(rows=(1, 8, 64), seconds=(1.0, 1.0, 8.0))
    ahead = [speculator(curve, loops=4, settles=1).window(rows) for rows in (1, 2, 4, 8, 32)]
    assert ahead == [3, 3, 1, 0, 0]
    assert speculator(curve, loops=4, settles=1).window(0) == 0


def run_alone(made: Speculator, tokens: int, *, drafted: float, plain: float) -> int:
    """Tokens that were made with drafts, each taking `drafted` seconds, of this many; the others took `plain`."""
    count = 0
    for _ in range(tokens):
        drafting = made.window(1) > 0
        count += drafting
        made.pace.took(drafted if drafting else plain, 1)
    return count


def test_drafts_that_are_slower_by_the_clock_rest_and_are_tried_again() -> None:
    made = speculator(FREE, loops=4, settles=2)
    assert run_alone(made, 60, drafted=1.1, plain=1.0) == Pace.TRIAL
    tried = run_alone(made, 3000, drafted=1.1, plain=1.0)
    assert 0 < tried < 600
    assert run_alone(made, 3000, drafted=0.5, plain=1.0) > 2500


def test_drafts_that_are_faster_run_nearly_always() -> None:
    made = speculator(FREE, loops=4, settles=2)
    assert run_alone(made, 5000, drafted=0.5, plain=1.0) > 4950


def test_a_tick_that_was_held_up_is_no_sign_of_slow_drafts() -> None:
    made = speculator(FREE, loops=4, settles=1)
    run_alone(made, 500, drafted=0.5, plain=1.0)
    made.pace.took(1000.0, 1)
    assert run_alone(made, 1000, drafted=0.5, plain=1.0) > 950


def test_acceptance_is_the_share_of_tokens_that_were_running_in_time() -> None:
    made = Speculator(Speculation(), lambda: FREE, 4)
    assert math.isnan(made.acceptance)
    for settled in (1, 4, 2, 4):
        made.learn(loops=4, settled=settled, asked=True)
    assert made.acceptance == 0.5


def test_rows_that_the_window_held_back_teach_nothing_of_when_drafts_settle() -> None:
    made = speculator(FREE, loops=4, settles=1)
    before = made.settles
    for _ in range(100):
        made.learn(loops=4, settled=4, asked=False)
    assert made.settles == before
    assert made.window(1) == 3


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (None, None),
        ("off", None),
        ("auto", Speculation()),
        ("2", Speculation(draft_loop=2)),
        ("3:once", Speculation(draft_loop=3, redraft=False)),
    ],
)
def test_texts(text: str | None, parsed: Speculation | None) -> None:
    assert parse_speculation(text) == parsed
    if parsed is not None:
        assert parse_speculation(str(parsed)) == parsed


@pytest.mark.parametrize("text", ["on", "0", "2:twice", "", "-1"])
def test_wrong_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="speculat"):
        parse_speculation(text)


def test_a_broken_generation_config_is_told(tmp_path: Path) -> None:
    assert saved_speculation(tmp_path) is None
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config"):
        saved_speculation(tmp_path)
