"""Exits on held-out tokens: the chord, the threshold that has a mean, the two semantics, ranks."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from loopwise.study.exits import Depths, hazard_for, measure_depths, measure_exit
from loopwise.train.batches import Batch

tiny = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))["tiny"]


def batches(vocab: int) -> list[Batch]:
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (3, 9), generator=drawn)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, :3] = False
    return [
        Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=torch.zeros(3, 8, dtype=torch.long), mask=mask)
    ]


def test_depths_are_those_of_a_full_unroll() -> None:
    model = tiny("ouro", seed=2)
    data = batches(model.config.vocab_size)
    found = measure_depths(model, data)
    with torch.no_grad():
        out = model(data[0].tokens, collect=("logits", "signals"))
    mask = data[0].mask
    chances = out.loop_logits[:, mask].float().log_softmax(-1)
    expected = -chances.gather(-1, data[0].targets[mask].expand(len(chances), -1)[..., None])[..., 0]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    np.testing.assert_allclose(found.hazards, out.loop_signals[:, mask], rtol=1e-6)
    assert found.losses.shape == (model.config.loops, 21)


def test_mixing_is_the_chord_between_the_neighbours() -> None:
    depths = Depths(losses=np.array([[4.0], [3.0], [2.5]]), right=np.zeros((3, 1), dtype=bool), hazards=None)
    assert [depths.mixed(mean) for mean in (1.0, 1.5, 2.0, 2.75)] == [4.0, 3.5, 3.0, 2.625]
    with pytest.raises(ValueError, match="no gate"):
        hazard_for(depths, 2.0)


@pytest.mark.parametrize("policy", ["per_loop", "last_exited"])
def test_a_fixed_exit_is_that_depth_under_both_semantics(policy: str) -> None:
    model = tiny("ouro", seed=2)
    data = batches(model.config.vocab_size)
    depths = measure_depths(model, data)
    point = measure_exit(model, data, "fixed:2", depths, policy=policy)
    assert point.mean_loops == 2.0
    assert point.loss == pytest.approx(depths.mean_losses[1], rel=1e-6)
    assert point.gain == pytest.approx(0.0, abs=1e-6)


def test_the_threshold_has_the_mean_that_was_asked_for() -> None:
    model = tiny("ouro", seed=2)
    data = batches(model.config.vocab_size)
    depths = measure_depths(model, data)
    point = measure_exit(model, data, hazard_for(depths, 2.5), depths, policy="per_loop")
    assert point.mean_loops == pytest.approx(2.5, abs=1 / len(point.loops))
    chosen = depths.losses[point.loops - 1, np.arange(len(point.loops))]
    assert point.loss == pytest.approx(chosen.mean(), rel=1e-6)
