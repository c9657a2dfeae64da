"""A fit learns, and one that was stopped goes on to the same bits."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from loopwise.errors import CheckpointError, ConfigError
from loopwise.nn.noise import uniform
from loopwise.train import checkpoint
from loopwise.train.ema import EmaConfig
from loopwise.train.fit import FitConfig, fit

SLOPES = torch.tensor([1.0, -2.0, 0.5])


def batch(step):
    drawn = uniform(0, "points", torch.tensor([[step]]), torch.arange(24)).reshape(8, 3).float() - 0.5
    return drawn, drawn @ SLOPES


def learn(folder=None, *, steps=60, ema=None, log=None, stop_at=None):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss(points, step):
        if step == stop_at:
            raise KeyboardInterrupt
        inputs, targets = points
        return mse_loss(model(inputs)[:, 0], targets)

    config = FitConfig(steps=steps, learning_rate=0.1, ema=ema, log_every=20, checkpoint_every=10)
    return model, fit(model, loss, batch, config, checkpoints=folder, log=log)


def test_it_learns():
    lines = []
    model, fitted = learn(steps=300, log=lambda step, values: lines.append((step, values["loss"])))
    assert torch.allclose(model.weight.detach()[0], SLOPES, atol=0.02)
    assert len(fitted.losses) == 300
    assert lines[-1][0] == 300
    assert lines[-1][1] < lines[0][1] / 20
    assert not model.training


def test_the_average_is_what_leaves():
    plain, _ = learn()
    averaged, _ = learn(ema=EmaConfig(decay=0.9))
    assert not torch.equal(plain.weight, averaged.weight)


@pytest.mark.parametrize("ema", [None, EmaConfig(decay=0.9)])
def test_a_stopped_fit_goes_on_to_the_same_bits(tmp_path, ema):
    whole, _ = learn(ema=ema)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path, ema=ema, stop_at=37)
    resumed, fitted = learn(tmp_path, ema=ema)
    assert len(fitted.losses) == 30
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


def test_old_checkpoints_go(tmp_path):
    learn(tmp_path)
    assert checkpoint.steps(tmp_path) == [50, 60]


def test_checkpoints_of_another_model_are_refused(tmp_path):
    learn(tmp_path)
    other = nn.Linear(4, 1)
    with pytest.raises(CheckpointError, match="another model"):
        fit(other, lambda points, step: other.weight.sum(), batch, FitConfig(steps=1), checkpoints=tmp_path)


def test_a_fit_of_no_steps_is_refused():
    with pytest.raises(ConfigError, match="steps=0"):
        FitConfig(steps=0)
