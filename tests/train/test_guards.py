import json
import math

import pytest
import torch

from loopwise.errors import ConfigError
from loopwise.train.guards import (
    GuardConfig,
    GuardMemory,
    Vitals,
    gate_collapse,
    harmful_loops,
    ignored_loops,
    inspect,
    norm_blow_up,
    skipped_steps,
    state_collapse,
    state_norms,
    token_correlation,
)

CONFIG = GuardConfig()


def naive_correlation(states, mask):
    means = []
    for row, real in zip(states.double(), mask, strict=True):
        kept = row[real]
        cosines = [
            float(torch.dot(kept[i], kept[j]) / (kept[i].norm() * kept[j].norm()))
            for i in range(len(kept))
            for j in range(len(kept))
            if i != j
        ]
        if cosines:
            means.append(sum(cosines) / len(cosines))
    return sum(means) / len(means)


def test_token_correlation_against_all_pairs():
    torch.manual_seed(0)
    states = torch.randn(4, 7, 5) + torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0])
    mask = torch.rand(4, 7) > 0.4
    mask[3] = False
    mask[3, 2] = True
    assert token_correlation(states, mask) == pytest.approx(naive_correlation(states, mask), abs=1e-6)
    everything = torch.ones(4, 7, dtype=torch.bool)
    assert token_correlation(states) == pytest.approx(naive_correlation(states, everything), abs=1e-6)


def test_token_correlation_at_its_ends():
    one = torch.ones(2, 6, 3)
    assert token_correlation(one * torch.rand(2, 6, 1).add(0.5)) == pytest.approx(1.0, abs=1e-6)
    assert token_correlation(torch.eye(4)[None]) == pytest.approx(0.0, abs=1e-6)
    assert token_correlation(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])) == pytest.approx(-1.0, abs=1e-6)
    assert math.isnan(token_correlation(torch.ones(1, 1, 3)))


def test_state_norms_are_per_loop():
    states = torch.stack([torch.full((2, 3, 4), float(size)) for size in (1, 10)])
    assert state_norms(states) == [1.0, 10.0]


def test_each_guard_speaks_only_when_it_should():
    assert state_collapse(0.97, CONFIG) is not None
    assert state_collapse(0.90, CONFIG) is None
    assert state_collapse(math.nan, CONFIG) is None

    assert ignored_loops([3.0, 2.9, 3.001], CONFIG) is not None
    assert ignored_loops([3.0, 2.9, 2.8], CONFIG) is None
    assert ignored_loops([3.0], CONFIG) is None

    message = harmful_loops([3.0, 2.8, 2.9], CONFIG)
    assert message is not None
    assert "loop 3 is worse than loop 2" in message
    assert harmful_loops([3.0, 2.8, 2.81], CONFIG) is None

    assert norm_blow_up([1.0, 3.0, 11.0], CONFIG) is not None
    assert norm_blow_up([1.0, 20.0, 9.0], CONFIG) is None
    assert norm_blow_up([1.0, math.nan], CONFIG) is None

    assert gate_collapse([0.7, 0.2, 0.1], CONFIG) is not None
    assert gate_collapse([0.5, 0.5], CONFIG) is None
    assert gate_collapse([1.0], CONFIG) is None

    assert skipped_steps(Vitals(steps=10, skipped=1), CONFIG) is not None
    assert skipped_steps(Vitals(steps=100, skipped=1), CONFIG) is None
    assert skipped_steps(Vitals(), CONFIG) is None


BAD = Vitals(
    correlation=0.99, losses=[2.0, 1.9, 2.0], norms=[1.0, 1.0, 50.0], exits=[0.9, 0.05, 0.05], steps=10, skipped=9
)


def test_every_warning_is_one_line_with_a_way_out():
    warnings = inspect(BAD, step=1000, config=CONFIG, memory=GuardMemory()).warnings
    assert warnings.keys() == {"correlation", "loop_gain", "loop_loss", "norm_growth", "first_exit", "skipped"}
    for message in warnings.values():
        assert "\n" not in message
        assert " use " in message or " (loop_norm=true)" in message


def test_a_young_model_is_only_warned_of_skipped_steps():
    warnings = inspect(BAD, step=199, config=CONFIG, memory=GuardMemory()).warnings
    assert warnings.keys() == {"skipped"}


def test_what_was_not_measured_is_silent():
    assert not inspect(Vitals(), step=1000, config=CONFIG, memory=GuardMemory()).warnings


def test_each_guard_has_its_own_cool_down_and_its_memory_survives_json():
    only_gate = Vitals(exits=[0.9, 0.1])
    first = inspect(only_gate, step=1000, config=CONFIG, memory=GuardMemory())
    assert first.warnings.keys() == {"first_exit"}
    memory = GuardMemory(spoken=json.loads(json.dumps(dict(first.memory.spoken))))
    second = inspect(BAD, step=1999, config=CONFIG, memory=memory)
    assert "first_exit" not in second.warnings
    assert "correlation" in second.warnings
    third = inspect(BAD, step=2000, config=CONFIG, memory=second.memory)
    assert third.warnings.keys() == {"first_exit"}
    assert memory.spoken == {"first_exit": 1000}


@pytest.mark.parametrize(
    "wrong", [{"after": -1}, {"correlation": 0.0}, {"first_exit": 1.5}, {"norm_growth": 1.0}, {"loop_gain": math.nan}]
)
def test_wrong_thresholds_are_refused(wrong):
    with pytest.raises(ConfigError, match=rf"guards\.{next(iter(wrong))}="):
        GuardConfig(**wrong)
