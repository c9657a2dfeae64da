"""Comparing speeds: which rule is compared, what is reported. How long anything takes is not asked here."""

import runpy
from pathlib import Path

import pytest

from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.study.speed import Speed, SpeedUp, compare_speed, measure_speed

tiny = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]
PROMPTS = [(3, 1, 22), (7, 0, 5)]
SAMPLING = Sampling(max_tokens=5, temperature=0.8)


def mean_loops(rule: str) -> float:
    done = generate(
        tiny("ouro", seed=2), PROMPTS, Sampling(max_tokens=5, temperature=0.8, exit=rule), policy="last_exited"
    )
    return sum(sum(answer.loops) for answer in done) / sum(len(answer.loops) for answer in done)


def test_sides_take_turns_and_each_reports_its_loops() -> None:
    sides = {"two": Sampling(max_tokens=4, exit="fixed:2"), "all": Sampling(max_tokens=4)}
    found = compare_speed(tiny("ouro", seed=2), PROMPTS, sides, rounds=3)
    assert {name: len(side.rates) for name, side in found.items()} == {"two": 3, "all": 3}
    loops = tiny("ouro").config.loops
    # The first token of an answer comes from the prompt, which runs every loop.
    assert found["two"].mean_loops == (loops + 3 * 2) / 4
    assert found["all"].mean_loops == loops


def test_the_rule_is_the_one_whose_mean_is_asked_for() -> None:
    model = tiny("ouro", seed=2)
    found = measure_speed(model, PROMPTS, SAMPLING, mean_loops=2.5, rounds=1)
    assert found.exit.mean_loops == mean_loops(found.rule)
    assert found.full.mean_loops == model.config.loops
    apart = abs(found.exit.mean_loops - 2.5)
    assert all(apart <= abs(mean_loops(f"hazard:{threshold}") - 2.5) for threshold in (0.5, 0.8))


def test_ratios_are_round_by_round() -> None:
    full, fast = (Speed(rates=rates, mean_loops=4.0) for rates in ((10.0, 20.0, 10.0), (15.0, 40.0, 12.0)))
    found = SpeedUp(rule="hazard:0.5", full=full, exit=fast)
    assert found.ratios == pytest.approx([1.2, 1.5, 2.0])
    assert (found.ratio, full.tokens_per_second) == (1.5, 10.0)
