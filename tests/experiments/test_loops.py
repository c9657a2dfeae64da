"""Experiments with loops at inference: windows are the same layers, damped steps are what they say, gains are nats."""

import importlib
import itertools
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM, initialise

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module(name)


@pytest.fixture
def looped(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("looped_at_inference", monkeypatch)


@pytest.fixture
def model() -> LoopedLM:
    config = LoopedLMConfig(
        vocab_size=11,
        width=16,
        heads=2,
        kv_heads=2,
        head_width=8,
        mlp_width=24,
        prelude_layers=1,
        core_layers=2,
        coda_layers=1,
        loops=1,
        trained_loops=(1, 1),
        max_positions=8,
        tied_head=True,
    )
    model = LoopedLM(config).double()
    initialise(model, seed=0)
    return model.eval()


TOKENS = torch.arange(8)[None] % 5


@torch.no_grad()
def test_a_window_run_once_is_the_model_and_run_twice_repeats_its_layers(looped: ModuleType, model: LoopedLM) -> None:
    layers = [*model.prelude, *model.core, *model.coda]
    assert len(looped._windows(len(layers))) == 10
    for first, count in looped._windows(len(layers)):
        moved = looped.window(model, first, count).double()
        context = moved.encode(TOKENS)
        for times in (1, 2):
            state = model.embed(TOKENS)
            order = [*layers[:first], *(layers[first : first + count] * times), *layers[first + count :]]
            for layer in order:
                state = layer(state, context.rotary, context.memory.plane(0))
            expected = model.norm(state) @ model.head_weight.T
            found = moved.readout(looped.loop(moved, context, times, "naive"), context)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_damped_and_anchored_steps(looped: ModuleType, model: LoopedLM) -> None:
    context = model.encode(TOKENS)
    start = model.initial_state(context)

    def core(state: torch.Tensor) -> torch.Tensor:
        return model.step(state, context, 1)

    half = (start + core(start)) / 2
    damped = (half + core(half)) / 2
    torch.testing.assert_close(looped.loop(model, context, 2, "damped"), damped)
    torch.testing.assert_close(looped.loop(model, context, 2, "anchored"), (damped + core(start)) / 2)
    for way, other in itertools.pairwise(looped.WAYS):
        torch.testing.assert_close(looped.loop(model, context, 1, way), looped.loop(model, context, 1, other))


def test_the_loop_trained_model_on_fewer_steps_costs_what_the_plain_one_does(looped: ModuleType) -> None:
    setting = looped.SETTINGS["small"]

    def cost(variant: str) -> float:
        return float(looped._steps(setting, variant) * looped._step_flops(setting, variant))

    assert cost(looped.CHEAP) == pytest.approx(cost(looped.PLAIN), rel=0.01)
    assert cost(looped.LOOPED) > 1.5 * cost(looped.PLAIN)


def test_gains_are_nats_below_the_chord_between_fixed_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = load("depth_curve", monkeypatch)
    rule = {"mean_loops": [1.5, 3.0], "loss": [2.0, 1.0]}
    record = {"losses": [3.0, 2.0, 1.0], "exits": {"rules": {"kl": rule}, "oracle": rule}}
    # Mixing has 2.5 nats at a mean of 1.5; between two thresholds a rule is mixed too.
    assert curve._gain(record, "kl", 1.5) == pytest.approx(0.5)
    assert curve._gain(record, "oracle", 2.25) == pytest.approx(1.75 - 1.5)
    assert math.isnan(curve._gain(record, "kl", 1.2))
