"""The bridge's example scripts run as they stand, without a network."""

import runpy
from pathlib import Path

import pytest

import loopwise

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_adapter_script_learns_and_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("Loops are counted from one, and rows share a tick. " * 60)
    script = runpy.run_path(str(EXAMPLES / "finetune_lora.py"))
    script["main"](None, tmp_path, steps=6, text=str(tmp_path / "notes.txt"))
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    before, after = (float(lines[f"loss by loops, {when}"].split("4: ")[1]) for when in ("before", "after"))
    assert after < before - 0.1
    assert loopwise.load(tmp_path / "merged").config.gate


def test_the_evaluation_script_prints_every_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    script = runpy.run_path(str(EXAMPLES / "lm_eval_local.py"))
    script["write_task"](tmp_path)
    script["main"](script["tiny_model"](), (1, 2), tmp_path, "four_questions")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("loop ")] == ["loop 1", "loop 2"]


def test_the_page_on_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = runpy.run_path(str(EXAMPLES / "finetune_lora.py"))["tiny_model"]()
    loopwise.save(tiny, tmp_path / "tiny")
    page = (EXAMPLES.parent / "docs/transformers.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("ByteDance/Ouro-1.4B", str(tmp_path / "tiny")), names)
    assert len(blocks) == 5
    assert loopwise.load(tmp_path / "merged").config == tiny.config
