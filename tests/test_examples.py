"""The examples run as they are printed, if not as long."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_a_loop_from_scratch_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["loop_from_scratch.py", "3"])
    left = runpy.run_path(str(EXAMPLES / "loop_from_scratch.py"))
    said = capsys.readouterr().out
    assert "4 loops, 3 steps" in said
    assert "step    3  loss by loop " in said
    assert said.index("held-out bits per byte") < said.index("\ndef ")
    # It learns from the first step on, and loops differ.
    assert float(left["losses"].max()) < 5.5
    assert left["shares"].sum().item() == pytest.approx(1, abs=1e-5)
