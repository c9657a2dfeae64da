"""The experiments' shared helper: a stopped one goes on, its page holds what was measured, intervals are right."""

import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load("_lab", monkeypatch)
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module, "EVIDENCE", tmp_path / "evidence")
    return module


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, kw_only=True)
class Sizes:
    gain: float = 10.0


def experiment(lab: ModuleType, calls: list[tuple[str, int]], *, fail_at: int | None = None, gain: float = 10.0) -> Any:
    def measure(cell: Any) -> dict[str, Any]:
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append((cell.variant, cell.seed))
        return {"accuracy": cell.seed + (cell.setting.gain if cell.variant == "looped" else 0.0)}

    def report(results: Any) -> Any:
        gain = results.difference("looped", "plain", "accuracy")
        rows = [[name, results.interval(name, "accuracy").text()] for name in results.records]
        table = lab.Table(head=["model", "accuracy"], rows=rows)
        return lab.Page(verdict=f"Gain {gain.text()}.", paper="Ten.", tables=[table], summary={"gain": gain.mean})

    return lab.Experiment(
        title="A gain",
        question="Is there one?",
        settings={"small": Sizes(gain=gain), "full": Sizes(gain=20.0)},
        variants=lambda setting: ["plain", "looped"],
        measure=measure,
        report=report,
    )


def test_a_stopped_experiment_goes_on(lab: ModuleType) -> None:
    calls: list[tuple[str, int]] = []
    with pytest.raises(KeyboardInterrupt):
        lab.run(experiment(lab, calls, fail_at=3), "gain.py", [])
    assert calls == [("plain", 0), ("looped", 0), ("plain", 1)]
    assert not (lab.EVIDENCE / "gain.md").exists()
    lab.run(experiment(lab, calls), "gain.py", [])
    assert calls[3:] == [("looped", 1), ("plain", 2), ("looped", 2)]
    lab.run(experiment(lab, calls), "gain.py", ["--report"])
    assert len(calls) == 6
    evidence = json.loads((lab.EVIDENCE / "gain.json").read_text())
    assert evidence["results"]["looped"]["2"]["accuracy"] == 12
    assert evidence["summary"] == {"gain": 10}
    assert evidence["command"] == "python experiments/gain.py --setting small --seeds 0,1,2"
    page = (lab.EVIDENCE / "gain.md").read_text()
    assert "**Gain 10.0 (10.0 to 10.0).**" in page
    assert "| plain | 1.0 (-1.5 to 3.5) |" in page
    assert "[A gain](gain.md) | Gain 10.0 (10.0 to 10.0)." in (lab.EVIDENCE / "README.md").read_text()


def test_another_setting_begins_anew(lab: ModuleType) -> None:
    calls: list[tuple[str, int]] = []
    lab.run(experiment(lab, calls), "gain.py", ["--seeds", "0,1"])
    lab.run(experiment(lab, calls, gain=5.0), "gain.py", ["--seeds", "0,1"])
    assert len(calls) == 8
    lab.run(experiment(lab, calls), "gain.py", ["--seeds", "0,1", "--setting", "full"])
    assert len(calls) == 12
    assert json.loads((lab.EVIDENCE / "gain.json").read_text())["summary"] == {"gain": 5}
    assert json.loads((lab.EVIDENCE / "gain-full.json").read_text())["summary"] == {"gain": 20}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "x"], "--seeds 'x': give numbers"),
        (["--variants", "deep"], "there is no variant 'deep'; allowed: plain; looped"),
        (["--report"], "still to be measured: plain seed 0"),
    ],
)
def test_mistakes_end_with_one_line(
    lab: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        lab.run(experiment(lab, []), "gain.py", arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_student_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = load("_intervals", monkeypatch)
    # Five values 1..5: mean 3, standard error sqrt(2.5 / 5), t(4) = 2.776.
    found = statistics.t_interval([1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.high - found.mean == pytest.approx(2.776 * math.sqrt(0.5), abs=1e-3)
    assert statistics.t_interval([1.0]).low == -math.inf
    # Published quantiles beyond the table: t(15) = 2.131, t(30) = 2.042.
    for freedom, quantile in ((15, 2.131), (30, 2.042)):
        assert statistics._t_quantile(freedom) == pytest.approx(quantile, rel=0.015)


def test_wilson_interval_of_a_known_example(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = load("_intervals", monkeypatch)
    # 15 of 148 (Newcombe 1998, table I, method 3): 0.0624 to 0.1605.
    found = statistics.share_interval(15, 148)
    assert (found.low, found.high) == pytest.approx((0.0624, 0.1605), abs=1e-4)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = load("_intervals", monkeypatch)
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        found = statistics.bootstrap(lambda x: x.mean(), rng.normal(size=60), draws=200, seed=trial)
        hits += found.low < 0 < found.high
    assert 88 <= hits <= 99
