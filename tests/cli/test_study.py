"""`loopwise study`: what it prints, what it writes, what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loopwise.cli import main
from loopwise.engine.ladder import read_ladder
from loopwise.hub.checkpoints import load
from loopwise.hub.locate import locate

SMALL = ["units=128", "length=32", "data_bytes=1000000"]


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["study", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_arrays_with_named_axes_of_the_shipped_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "depth", "loops=3", *SMALL)
    assert found["model"] == "shipped"
    depth = found["results"]["depth"]
    assert depth["loops"] == {"axes": ["loops"], "values": [1, 2, 3]}
    assert depth["loss"]["values"][2] < depth["loss"]["values"][0]
    assert depth["units"] == 128


def test_pages_and_arrays_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    assert main(["study", "lens", "shipped", "--out", str(tmp_path), *SMALL]) == 0
    assert "wrote" in capsys.readouterr().out
    page = (tmp_path / "lens.html").read_text()
    assert "Plotly.newPlot" in page
    assert "http" not in page.split("<script>")[0]
    assert json.loads((tmp_path / "lens.json").read_text())["results"]["lens"]["lenses"] == ["readout"]


def test_a_ladder_is_kept_in_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(locate("shipped"), folder)
    found = told(capsys, "ladder", str(folder), *SMALL)["loop_ladder"]
    assert found["measured"]
    assert not read_ladder(load(folder)).measured
    assert main(["study", "ladder", str(folder), "--keep", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "xhigh" in shown
    assert read_ladder(load(folder)).measured


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dpth"], "did you mean depth; allowed: depth, exits"),
        (["depth", "shipped", "lops=3"], "did you mean loops"),
        (["depth", "nowhere"], "nowhere"),
        (["adaptivity", "shipped", *SMALL], "data=pointer-chasing"),
        (["grid"], "type lens"),
        (["depth", "--keep"], "study ladder"),
        (["report", "--json"], "one question with --json"),
        (["ladder", "shipped", "rule=delta:0.1"], "rule= has no effect"),
        (["calibration", "shipped", "rule=fixed:2", *SMALL], "cannot be replayed"),
        (["depth", "shipped", "device=cuda"], "device"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
