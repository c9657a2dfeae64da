"""Gains over random mixing, read off a curve of thresholds."""

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

LOSSES = np.array([4.0, 3.0, 2.5, 2.6])


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
    return importlib.import_module("exit_rules")


def curves() -> SimpleNamespace:
    """Fixed depths 1 to 4."""

    def mixed(mean: float) -> float:
        return float(np.interp(mean, [1, 2, 3, 4], LOSSES))

    return SimpleNamespace(mixed_loss=mixed, mixed_accuracy=lambda mean: mean / 10)


def test_random_mixing_gains_nothing(rules: ModuleType) -> None:
    found = rules._against(curves(), np.arange(1.0, 5.0), LOSSES)
    assert found["gain"] == pytest.approx([0.0] * 25)
    assert found["area"] == pytest.approx(0)


def test_gain_between_thresholds_and_where_a_rule_cannot_stop(rules: ModuleType) -> None:
    means, losses, accuracies = np.array([2.0, 3.0, 4.0]), np.array([2.9, 2.3, 2.6]), np.array([0.3, 0.4, 0.4])
    found = rules._against(curves(), means, losses, accuracies)
    at = dict(zip(rules.GRID, found["gain"], strict=True))
    assert at[1.0] is None
    assert at[1.875] is None
    # At 2.5 the fixed depths mix to 2.75, half of each threshold to 2.6.
    assert [at[2.0], at[2.5], at[3.0], at[3.5], at[4.0]] == pytest.approx([0.1, 0.15, 0.2, 0.1, 0.0])
    assert found["area"] == pytest.approx((0.5 * (0.1 + 0.2) + 0.5 * 0.2 + 0.5 * 0.1 * 0.125) / 3, rel=1e-6)
    assert found["accuracy_gain"] == pytest.approx(0.35 - 0.25)
