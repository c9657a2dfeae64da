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
from loopwise.hub.trm import save_trm
from loopwise.models.trm import TRM
from loopwise.models.trm_config import TRMConfig

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


def test_depth_of_several_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    depth = told(capsys, "depth", "loops=2", "others=shipped,shipped", *SMALL)["results"]["depth"]
    assert depth["models"] == ["shipped"] * 3
    assert depth["band"] == "95% interval over 3 seeds"
    assert depth["seed_loss"]["values"][0] == depth["seed_loss"]["values"][2]


def test_boards_of_a_saved_machine_for_the_studio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    config = TRMConfig(
        vocab_size=5,
        places=16,
        width=16,
        heads=2,
        layers=1,
        mlp_width=256,
        cycles=1,
        inner_cycles=1,
        trained_loops=(1, 3),
    )
    model = TRM(config)
    save_trm(model, tmp_path / "trm")
    words = ["sudoku.size=4", "sudoku.empties=[4,6]", "units=4", "number=2"]
    assert main(["study", "grid", str(tmp_path / "trm"), *words, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    written = json.loads((tmp_path / "grid.json").read_text())
    problem = written["problems"][0]
    assert (problem["rows"], problem["columns"], len(problem["answers"])) == (4, 4, 3)
    assert set(problem["problem"]) <= {"", "1", "2", "3", "4"}
    assert all(cell in {"1", "2", "3", "4"} for cell in problem["target"])
    assert all(given in ("", wanted) for given, wanted in zip(problem["problem"], problem["target"], strict=True))
    assert problem["attention"] is None
    assert len(problem["certainty"]) == 3
    assert all(0 <= share <= 1 for share in problem["certainty"])
    found = told(capsys, "depth", str(tmp_path / "trm"), "sudoku.size=4", "sudoku.empties=[4,6]", "units=20")
    assert len(found["results"]["depth"]["accuracy"]["values"]) == 6


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
    assert read_ladder(load(folder)).measured  # the shipped checkpoint has its own
    (folder / "generation_config.json").unlink()
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
        (["ladder", "shipped", "rule=delta:0.1"], "only calibration, adaptivity read it"),
        (["ladder", "shipped", "loops=3", *SMALL], "loops= has no effect"),
        (["depth", "shipped", "push=0.2"], "only convergence read it"),
        (["report", "shipped", "others=shipped"], "only depth read it"),
        (["calibration", "shipped", "rule=fixed:2", *SMALL], "cannot be replayed"),
        (["depth", "shipped", "device=cuda"], "device"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
